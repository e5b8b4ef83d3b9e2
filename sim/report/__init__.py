"""What is told of a timeline: a summary as numbers, as text and as a picture, and a trace that viewers open."""
