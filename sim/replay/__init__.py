"""Time passes: the event loop, the streams and the memory of each rank.  The only room that knows SimPy."""
