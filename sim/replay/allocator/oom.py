"""Out of memory: the numbers of PyTorch's message, as a value.

Source: ``DeviceCachingAllocator::malloc`` of c10/cuda/CUDACachingAllocator.cpp and ``format_size`` of
c10/core/CachingDeviceAllocator (PyTorch v2.13.0).  The message leaves out what it says of other processes
(NVML), which is not simulated.  Until 2.8 the link at its end was another one; the numbers are as old as 2.1.
"""

from __future__ import annotations

import dataclasses

from sim.units import GIB, KIB, MIB


@dataclasses.dataclass(frozen=True, slots=True)
class OutOfMemory:
    """Why a request failed.  All sizes are bytes.

    requested: what the program asked for.  tried: what the allocator asked of the device for it (whole
    segments).  free_cached: cached blocks that did not fit, private pools left out.
    """

    requested: int
    tried: int
    stream: int
    device_total: int
    device_free: int
    allowed: int | None
    allocated: int
    private_pools: int
    reserved: int
    device: int = 0

    @property
    def cached_but_unusable(self) -> int:
        """Reserved by PyTorch but unallocated: fragments, blocks of other streams or pools."""
        return self.reserved - self.allocated - self.private_pools

    def message(self) -> str:
        """PyTorch's own sentence about it, up to its advice."""
        allowed = "" if self.allowed is None else f"{format_size(self.allowed)} allowed; "
        private = (
            f"with {format_size(self.private_pools)} allocated in private pools (e.g., CUDA Graphs), "
            if self.private_pools
            else ""
        )
        return (
            f"CUDA out of memory. Tried to allocate {format_size(self.tried)}. GPU {self.device} has a total "
            f"capacity of {format_size(self.device_total)} of which {format_size(self.device_free)} is free. "
            f"{allowed}Of the allocated memory {format_size(self.allocated + self.private_pools)} is allocated by "
            f"PyTorch, {private}and {format_size(self.cached_but_unusable)} is reserved by PyTorch but unallocated."
        )


class OutOfMemoryError(Exception):
    """The simulated allocator cannot serve a request: a result to report, not a mistake of the user."""

    def __init__(self, report: OutOfMemory) -> None:
        super().__init__(report.message())
        self.report = report


def format_size(nbytes: int) -> str:
    """Bytes as PyTorch's message writes them: two decimals, powers of 1024, a unit's limit still in the lower unit."""
    if nbytes <= KIB:
        return f"{nbytes} bytes"
    for unit, name in ((KIB, "KiB"), (MIB, "MiB")):
        if nbytes <= unit * KIB:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes / GIB:.2f} GiB"
