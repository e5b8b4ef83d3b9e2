"""Time passes: the placed graph is replayed, and memory with it."""
