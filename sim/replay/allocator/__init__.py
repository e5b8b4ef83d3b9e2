"""PyTorch's CUDA caching allocator as a pure state machine, and recordings of the real one replayed through it."""
