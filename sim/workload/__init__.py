"""Where graphs come from: real traces, or a model run under fake tensors.  The only room that imports torch."""
