"""Device memory that PyTorch's allocator does not hand out: the CUDA context and NCCL's buffers.

Both are estimates: the context depends on driver and GPU, NCCL's connections on its version.
"""

from __future__ import annotations

from sim.units import MIB

# "around 400MB if CUDA >= 11.7 is used and lazy module loading enabled" (a PyTorch maintainer in
# github.com/pytorch/pytorch/issues/109888, September 2023; 300 MB in issue 107667).
CUDA_CONTEXT_BYTES = 400 * MIB

# Receive buffers of one connection, one for each protocol (NVIDIA/nccl, src/init.cc and src/include/device.h, 2.28):
# Simple NCCL_BUFFSIZE, 4 MiB; LL 8 lines x 512 threads x 8 steps x 16 bytes; LL128 120 elements x 640 threads x 8 steps
# x 8 bytes.
NCCL_CONNECTION_BYTES = 4 * MIB + 8 * 512 * 8 * 16 + 120 * 640 * 8 * 8
# A communicator connects a channel's ring and its tree: one neighbour to receive from in the ring, and in the tree at
# least one.
CONNECTIONS_PER_CHANNEL = 2


def nccl_bytes(channels: int) -> int:
    """Buffers of one communicator with that many channels, on each of its GPUs."""
    return channels * CONNECTIONS_PER_CHANNEL * NCCL_CONNECTION_BYTES
