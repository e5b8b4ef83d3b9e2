"""The memory of one rank's device, on the simulation's clock: what the allocator holds after every event."""

from __future__ import annotations

from sim.ops import Alloc, Category, Free
from sim.timeline import MemoryPeak, MemorySample, OutOfMemory

ROUNDING = 512


class DeviceMemory:
    """Runs a rank's allocations and frees through the allocator and remembers the curve and the peak."""

    def __init__(self, rank: int, capacity_bytes: int | None) -> None:
        self.rank = rank
        self.capacity_bytes = capacity_bytes
        self.samples: list[MemorySample] = []
        self.out_of_memory: OutOfMemory | None = None
        self._live: dict[int, Alloc] = {}
        self._allocated = 0
        self._peak: MemoryPeak | None = None

    def allocate(self, op: Alloc, time: int) -> None:
        size = _rounded(op.bytes)
        if self.capacity_bytes is not None and self._allocated + size > self.capacity_bytes:
            self.out_of_memory = self.out_of_memory or OutOfMemory(
                self.rank, time, op.name, op.bytes, self._allocated, self._allocated, self.capacity_bytes
            )
        self._live[op.block] = op
        self._allocated += size
        self._sample(time)
        if self._peak is None or self._allocated > self._peak.allocated_bytes:
            self._peak = MemoryPeak(self.rank, time, self._allocated, self._allocated, op.name, self._by_category())

    def free(self, op: Free, time: int) -> None:
        self._allocated -= _rounded(self._live.pop(op.block).bytes)
        self._sample(time)

    def peak(self) -> MemoryPeak | None:
        return self._peak

    def _sample(self, time: int) -> None:
        self.samples.append(MemorySample(self.rank, time, self._allocated, self._allocated))

    def _by_category(self) -> dict[Category, int]:
        totals: dict[Category, int] = {}
        for op in self._live.values():
            totals[op.category] = totals.get(op.category, 0) + _rounded(op.bytes)
        return totals


def _rounded(nbytes: int) -> int:
    return max(ROUNDING, -(-nbytes // ROUNDING) * ROUNDING)
