"""What the allocator counts, and the record of what it asks of the device.

Source: ``DeviceStats`` of c10/core/CachingDeviceAllocator.h and ``record_trace`` of
c10/cuda/CUDACachingAllocator.cpp (PyTorch v2.13.0).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

from sim.replay.allocator.pools import PoolId

SegmentAction = Literal["segment_alloc", "segment_free", "segment_map", "segment_unmap"]
"""The names PyTorch's recordings use for cudaMalloc, cudaFree, and mapping and unmapping of pages."""


class SegmentEvent(NamedTuple):
    """One request to the device, in the order made: which range, for which stream and pool."""

    action: SegmentAction
    address: int
    size: int
    stream: int
    pool_id: PoolId


Listener = Callable[[SegmentEvent], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Statistics:
    """Bytes and counts now, and the largest they were (``torch.cuda.memory_stats``, pools together).

    allocated: blocks in use.  active: those, and freed ones that another stream still uses.  requested: as
    active, before rounding.  reserved: all memory taken from the device.
    """

    allocated: int
    active: int
    requested: int
    reserved: int
    peak_allocated: int
    peak_active: int
    peak_requested: int
    peak_reserved: int
    allocations: int
    retries: int
    out_of_memories: int
    device_allocations: int
    device_frees: int


class Ledger:
    """The running counts; the allocator's hot path updates them in place."""

    __slots__ = (
        "active",
        "allocated",
        "allocations",
        "device_allocations",
        "device_frees",
        "listener",
        "out_of_memories",
        "peak_active",
        "peak_allocated",
        "peak_requested",
        "peak_reserved",
        "requested",
        "reserved",
        "retries",
    )

    def __init__(self, listener: Listener | None) -> None:
        self.listener = listener
        self.allocated = self.active = self.requested = self.reserved = 0
        self.peak_allocated = self.peak_active = self.peak_requested = self.peak_reserved = 0
        self.allocations = self.retries = self.out_of_memories = 0
        self.device_allocations = self.device_frees = 0

    def hand_out(self, size: int, requested: int) -> None:
        """A block of ``size`` bytes is given to the program, which asked for ``requested``."""
        self.allocations += 1
        allocated = self.allocated = self.allocated + size
        if allocated > self.peak_allocated:  # noqa: PLR1730 - max() costs twice the time, and this runs every time
            self.peak_allocated = allocated
        active = self.active = self.active + size
        if active > self.peak_active:  # noqa: PLR1730
            self.peak_active = active
        asked = self.requested = self.requested + requested
        if asked > self.peak_requested:  # noqa: PLR1730
            self.peak_requested = asked

    def reserve(self, action: SegmentAction, address: int, size: int, stream: int, pool_id: PoolId) -> None:
        """Memory came from the device."""
        self.device_allocations += 1
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        if self.listener is not None:
            self.listener(SegmentEvent(action, address, size, stream, pool_id))

    def give_back(self, action: SegmentAction, address: int, size: int, stream: int, pool_id: PoolId) -> None:
        """Memory went back to the device."""
        self.device_frees += 1
        self.reserved -= size
        if self.listener is not None:
            self.listener(SegmentEvent(action, address, size, stream, pool_id))

    def reset_peaks(self) -> None:
        """As ``torch.cuda.reset_peak_memory_stats``: the peaks start again from what is now."""
        self.peak_allocated = self.allocated
        self.peak_active = self.active
        self.peak_requested = self.requested
        self.peak_reserved = self.reserved

    def statistics(self) -> Statistics:
        return Statistics(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Statistics)})
