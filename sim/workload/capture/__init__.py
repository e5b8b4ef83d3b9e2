"""Capturing: a model or a script runs under torch.profiler, and its steps become one trace file a rank."""
