"""The memory of one rank's device: its caching allocator, stepped by the replay on the replay's clock."""

from __future__ import annotations

from sim.ops import Alloc, Category, Free
from sim.place.placement import PlacedRank
from sim.replay.allocator.caching import Allocation, CachingAllocator
from sim.replay.allocator.config import AllocatorConfig
from sim.replay.allocator.device import DeviceMemory
from sim.replay.allocator.oom import OutOfMemoryError
from sim.replay.allocator.workspace import cublas_workspace_bytes
from sim.timeline import MemoryPeak, MemorySample, OutOfMemory

# A device of which nothing is known (a trace replayed as captured) has room for everything.
UNLIMITED_BYTES = 1 << 50
WORKSPACE = "cublasSetWorkspace"


class Card(DeviceMemory):
    """A device that, once it could not serve a request, pretends to have room: so the whole need becomes known."""

    def pretend_room(self) -> None:
        self._free = UNLIMITED_BYTES


class RankMemory:
    """Sends a rank's allocations and frees through its allocator and remembers curve, peak and first failure.

    After a request that does not fit the replay goes on as if the device were larger; ``out_of_memory`` says when
    that was, and the peaks say how much would be needed.
    """

    def __init__(self, placed: PlacedRank, config: AllocatorConfig | None = None) -> None:
        self.rank = placed.rank
        self.samples: list[MemorySample] = []
        self.out_of_memory: OutOfMemory | None = None
        self.peak: MemoryPeak | None = None
        self._capacity = placed.memory_bytes
        self._capability = placed.compute_capability
        self._card = Card(self._capacity or UNLIMITED_BYTES)
        self._allocator = CachingAllocator(config, self._card)
        self._live: dict[int, tuple[int, int, Category]] = {}
        self._by_category: dict[Category, int] = {}

    def allocate(self, op: Alloc, time: int) -> None:
        """Serve a request; the block lives until :meth:`free`."""
        address, size = self._serve(op.bytes, max(op.stream, 0), op.name, time)
        self._live[op.block] = (address, size, op.category)
        self._held(size, op.category, op.name, time)

    def take_workspace(self, stream: int, time: int) -> None:
        """cuBLAS takes its workspace at the first matrix product of a stream and keeps it."""
        if self._capability:
            major, minor = self._capability.split(".")
            _, size = self._serve(cublas_workspace_bytes((int(major), int(minor))), stream, WORKSPACE, time)
            self._held(size, "workspace", WORKSPACE, time)

    def _serve(self, nbytes: int, stream: int, name: str, time: int) -> Allocation:
        try:
            return self._allocator.malloc(nbytes, stream)
        except OutOfMemoryError as error:
            self._remember(error, nbytes, name, time)
            self._card.pretend_room()
            return self._allocator.malloc(nbytes, stream)

    def _held(self, size: int, category: Category, name: str, time: int) -> None:
        self._by_category[category] = self._by_category.get(category, 0) + size
        self._sample(time)
        allocated = self._allocator.allocated_bytes
        if self.peak is None or allocated > self.peak.allocated_bytes:
            alive = {kind: total for kind, total in self._by_category.items() if total}
            self.peak = MemoryPeak(self.rank, time, allocated, self._allocator.reserved_bytes, name, alive)

    def free(self, op: Free, time: int) -> None:
        """Give a block back."""
        address, size, category = self._live.pop(op.block)
        self._by_category[category] -= size
        if size:
            self._allocator.free(address)
        self._sample(time)

    def _sample(self, time: int) -> None:
        held = self._allocator
        self.samples.append(MemorySample(self.rank, time, held.allocated_bytes, held.reserved_bytes))

    def _remember(self, error: OutOfMemoryError, nbytes: int, name: str, time: int) -> None:
        if self.out_of_memory is None and self._capacity is not None:
            report = error.report
            self.out_of_memory = OutOfMemory(
                self.rank, time, name, nbytes, report.allocated, report.reserved, self._capacity
            )
