"""cuBLAS workspaces: memory the matrix library takes from the caching allocator, one for each stream.

Source: ``parseChosenWorkspaceSize``, ``parseCUDABlasLtWorkspaceSize`` and ``setCublasWorkspace`` of
aten/src/ATen/cuda/CublasHandlePool.cpp (PyTorch v2.11 to v2.13).  The first GEMM on a stream allocates it on
that stream, and it stays until the process ends (or ``torch._C._cuda_clearCublasWorkspaces``).  All sizes are
bytes.

Not counted by the allocator, and so not here: the CUDA context, NCCL's buffers, and cuBLAS's own memory.
"""

from __future__ import annotations

import re

from sim.errors import UserError
from sim.units import KIB, MIB

DEFAULT_WORKSPACE = 2 * 4096 * KIB + 8 * 16 * KIB
"""``:4096:2:16:8``: two buffers of 4 MiB and eight of 16 KiB, 8.125 MiB."""

HOPPER_WORKSPACE = 32 * MIB
"""What cuBLAS's documentation of cublasSetWorkspace recommends for Hopper and Blackwell."""

SEPARATE_LT_WORKSPACE = 1 * MIB
"""A cublasLt workspace of its own, where TORCH_CUBLASLT_UNIFIED_WORKSPACE=0 (the default until 2.10)."""


def cublas_workspace_bytes(
    compute_capability: tuple[int, int], config: str | None = None, torch_version: tuple[int, int] = (2, 13)
) -> int:
    """Workspace of one stream on a GPU of this compute capability, for example (8, 6).

    ``config`` is CUBLAS_WORKSPACE_CONFIG: pairs ``:SIZE_IN_KIB:COUNT``, added up; where it has none, PyTorch
    warns and takes the default.  Raises UserError for a compute capability that cannot be.

    Hopper (9.0) has 32 MiB since 2.1, Blackwell (10.x, 12.x) since 2.12 (pytorch/pytorch#175344; seen in the
    compiled function of the 2.11.0, 2.12.1 and 2.13.0 wheels).
    """
    major, minor = compute_capability
    if major < 1 or minor < 0:
        raise UserError(f"compute capability {major}.{minor} is none of a GPU: write it as (8, 6)")
    pairs = re.findall(r":([0-9]+):([0-9]+)", config or "")
    if pairs:
        return sum(int(size) * KIB * int(count) for size, count in pairs)
    blackwell = major in (10, 12) and torch_version >= (2, 12)
    return HOPPER_WORKSPACE if blackwell or (major, minor) == (9, 0) else DEFAULT_WORKSPACE


def cublaslt_workspace_bytes(compute_capability: tuple[int, int], *, unified: bool = True) -> int:
    """Further workspace when a stream also uses cublasLt: none where the two share one (the default since 2.11).

    Shared by default since pytorch/pytorch#168175 (January 2026); ``unified`` is
    TORCH_CUBLASLT_UNIFIED_WORKSPACE.
    """
    if compute_capability[0] < 1:
        raise UserError(f"compute capability {compute_capability} is none of a GPU: write it as (8, 6)")
    return 0 if unified else SEPARATE_LT_WORKSPACE
