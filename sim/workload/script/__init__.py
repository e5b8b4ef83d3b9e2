"""A training script of the user's own, run under fake tensors as if on one GPU, and one of its steps written down."""
