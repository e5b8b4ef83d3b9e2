"""The memory of one rank's device: its caching allocator, stepped through the moments of a replay.

Memory decides no moment (what does not fit is told, and the replay goes on), so it is stepped when all are known: in
order of time, and where several threads of a rank ask in the same nanosecond, in the order of its program.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from sim.ops import Alloc, Category, Free, Op
from sim.place.captured import CPU
from sim.place.placement import PlacedRank
from sim.replay.allocator.caching import Allocation, CachingAllocator
from sim.replay.allocator.config import AllocatorConfig
from sim.replay.allocator.device import DeviceMemory
from sim.replay.allocator.oom import OutOfMemoryError
from sim.replay.allocator.workspace import cublas_workspace_bytes
from sim.timeline import MemoryPeak, MemorySample, OutOfMemory

# A device of which nothing is known (a trace replayed as captured) has room for everything.
UNLIMITED_BYTES = 1 << 60
WORKSPACE = "cublasSetWorkspace"


class Card(DeviceMemory):
    """A device that, once it could not serve a request, pretends to have room: so the whole need becomes known."""

    def pretend_room(self) -> None:
        self._free = UNLIMITED_BYTES


class HostMemory:
    """A run without a GPU asks the host's allocator: what is allocated is held, no more and no less."""

    def __init__(self) -> None:
        self.allocated_bytes = 0
        self._sizes: dict[int, int] = {}
        self._next = 1

    @property
    def reserved_bytes(self) -> int:
        return self.allocated_bytes

    def malloc(self, nbytes: int, stream: int) -> Allocation:
        address, self._next = self._next, self._next + 1
        self._sizes[address] = nbytes
        self.allocated_bytes += nbytes
        return Allocation(address, nbytes)

    def free(self, address: int) -> None:
        self.allocated_bytes -= self._sizes.pop(address)


class Holding(NamedTuple):
    """A block in use: who asked for it, its size in the allocator, what it is for."""

    name: str
    bytes: int
    category: Category
    module: str


def step_memory(
    placed: PlacedRank, ops: Sequence[Op], start: Sequence[int], end: Sequence[int], config: AllocatorConfig | None
) -> RankMemory:
    """The memory of a rank whose operations began at ``start`` and ended at ``end``."""
    memory = RankMemory(placed, config)
    workspaces = placed.costs.workspaces
    events = [(start[i] if i in workspaces else end[i], i) for i, op in enumerate(ops)
              if i in workspaces or isinstance(op, Alloc | Free)]  # fmt: skip
    for time, i in sorted(events):
        op = ops[i]
        if isinstance(op, Alloc):
            memory.allocate(op, time)
        elif isinstance(op, Free):
            memory.free(op, time)
        else:
            memory.take_workspace(workspaces[i], time)
    return memory


class RankMemory:
    """Sends a rank's allocations and frees through its allocator and remembers curve, peak and first failure.

    After a request that does not fit the replay goes on as if the device were larger; ``out_of_memory`` says when
    that was, and the peaks say how much would be needed.
    """

    def __init__(self, placed: PlacedRank, config: AllocatorConfig | None = None) -> None:
        self.rank = placed.rank
        self.samples: list[MemorySample] = []
        self.out_of_memory: OutOfMemory | None = None
        self._capability = placed.compute_capability
        self._capacity = placed.memory_bytes  # what PyTorch's allocator can have of it
        total = placed.memory_bytes or UNLIMITED_BYTES
        outside = min(sum(placed.outside.values()), total)
        if self._capacity is not None:
            self._capacity -= outside
        self._card = Card(total, outside)
        self._allocator = HostMemory() if placed.device_name == CPU else CachingAllocator(config, self._card)
        self._live: dict[int, tuple[int, Holding]] = {}
        self._history: list[tuple[Holding, int]] = []  # what came (+1) and went (-1), a pair a sample
        self._most = -1  # the sample at which most was allocated

    def allocate(self, op: Alloc, time: int) -> None:
        """Serve a request; the block lives until :meth:`free`."""
        address, size = self._serve(op.bytes, max(op.stream, 0), op.name, time)
        holding = Holding(op.name, size, op.category, op.module or op.name.rpartition(".")[0])
        self._live[op.block] = (address, holding)
        self._note(holding, 1, time)

    def take_workspace(self, stream: int, time: int) -> None:
        """cuBLAS takes its workspace at the first matrix product of a stream and keeps it."""
        if self._capability:
            major, minor = self._capability.split(".")
            _, size = self._serve(cublas_workspace_bytes((int(major), int(minor))), stream, WORKSPACE, time)
            self._note(Holding(WORKSPACE, size, "workspace", ""), 1, time)

    def _serve(self, nbytes: int, stream: int, name: str, time: int) -> Allocation:
        try:
            return self._allocator.malloc(nbytes, stream)
        except OutOfMemoryError as error:
            self._remember(error, nbytes, name, time)
            self._card.pretend_room()
            if isinstance(self._allocator, CachingAllocator):
                self._allocator.set_memory_fraction(1.0)
            return self._allocator.malloc(nbytes, stream)

    def free(self, op: Free, time: int) -> None:
        """Give a block back."""
        address, holding = self._live.pop(op.block)
        if holding.bytes:
            self._allocator.free(address)
        self._note(holding, -1, time)

    def peak(self) -> MemoryPeak | None:
        """The instant at which most was allocated, with what was alive; None where nothing was."""
        if self._most < 0:
            return None
        by_category: Counter[Category] = Counter()
        by_module: Counter[str] = Counter()
        for holding, sign in self._history[: self._most + 1]:
            by_category[holding.category] += sign * holding.bytes
            by_module[holding.module] += sign * holding.bytes
        sample = self.samples[self._most]
        return MemoryPeak(
            rank=self.rank,
            time_ns=sample.time_ns,
            allocated_bytes=sample.allocated_bytes,
            reserved_bytes=sample.reserved_bytes,
            op=self._history[self._most][0].name,
            by_category={category: held for category, held in by_category.items() if held},
            by_module={module: held for module, held in by_module.most_common() if held and module},
        )

    def _note(self, holding: Holding, sign: int, time: int) -> None:
        held = self._allocator
        if self._most < 0 or held.allocated_bytes > self.samples[self._most].allocated_bytes:
            self._most = len(self.samples)
        self.samples.append(MemorySample(self.rank, time, held.allocated_bytes, held.reserved_bytes))
        self._history.append((holding, sign))

    def _remember(self, error: OutOfMemoryError, nbytes: int, name: str, time: int) -> None:
        if self.out_of_memory is None and self._capacity is not None:
            report = error.report
            capacity = self._capacity if report.allowed is None else min(self._capacity, report.allowed)
            self.out_of_memory = OutOfMemory(self.rank, time, name, nbytes, report.allocated, report.reserved, capacity)
