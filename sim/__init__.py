"""tracesim: how long will this training step take on that machine, and does it fit?"""
