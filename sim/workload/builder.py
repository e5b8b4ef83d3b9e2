"""ProgramBuilder: the operations of one synthesized rank, written down in the order the host issues them.

Eager PyTorch has one host thread for forward and optimizer and, on a CUDA device, a second one for backward: the
autograd engine's, for which the first waits.  A thread allocates an op's outputs, then launches the kernel.  Compute
goes onto the default stream (Kineto calls it stream 7) unless a stream context says otherwise; collectives go onto a
stream of their own for each process group, which waits for the current stream's last kernel, as ProcessGroupNCCL
does with an event before each collective.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from sim.graph import Program
from sim.ops import (
    Alloc,
    Category,
    Collective,
    CollectiveKind,
    Copy,
    CopyKind,
    Free,
    HostCall,
    Kernel,
    Lane,
    Mark,
    Op,
    Work,
)

THREAD = 0
COMPUTE = 1
# The driver holds 1,024 launches; with that many outstanding the next launch call blocks until the oldest operation
# has ended.  Measured: in a public V100 trace (HolisticTraceAnalysis) the outstanding launches saturate at 1,023.
LAUNCH_QUEUE = 1023


class Transfer(NamedTuple):
    """One tensor sent or received: over which group of two, and the block that holds it."""

    kind: CollectiveKind
    nbytes: int
    group: str
    dtype: str
    block: int
    peer: int | None = None


class ProgramBuilder:
    """Collects operations; ``uses`` remembers which blocks each position of the list touches.

    The programs of ranks that run different ones share the works of ``first``, the first rank's builder.
    """

    def __init__(self, first: ProgramBuilder | None = None) -> None:
        self.ops: list[Op] = []
        self.works: list[Work] = [] if first is None else first.works
        self.uses: dict[int, tuple[int, ...]] = {}
        self.module = ""
        self.stream = COMPUTE
        self._thread = THREAD
        self._lanes = [Lane("thread", 1, "main"), Lane("stream", 7, "compute")]
        self._work_index: dict[Work, int] = {} if first is None else first._work_index
        self._autograd_lane: int | None = None
        self._stream_lane: dict[str, int] = {}
        self._exchange_lanes: dict[str, list[int]] = {}
        self._group_seq: dict[str, int] = {}
        self._last_of_group: dict[str, int] = {}
        self._launched: dict[int, list[int]] = {}
        self._last_on: dict[int, int] = {}
        self._pending: dict[int, list[int]] = {}
        self._handoff: tuple[int, ...] = ()
        self._allocated_at: dict[int, int] = {}

    @property
    def lanes(self) -> tuple[Lane, ...]:
        return tuple(self._lanes)

    def program(self) -> Program:
        return Program(self.lanes, tuple(self.ops))

    # Host threads ----------------------------------------

    @contextlib.contextmanager
    def autograd_thread(self) -> Iterator[None]:
        """The engine's thread issues what comes; the main thread hands over to it and waits for it."""
        if self._autograd_lane is None:
            self._autograd_lane = self._new_lane(Lane("thread", 2, "autograd"))
        self._handoff = (self.host("autograd::Engine::execute"),)
        self._thread = self._autograd_lane
        yield
        self._thread = THREAD
        self._handoff = (len(self.ops) - 1,)

    def mark(self, name: str, step: int, edge: str) -> None:
        self._add(Mark(lane=self._thread, name=name, step=step, edge="begin" if edge == "begin" else "end"))

    def host(self, name: str, touches: Iterable[int] = ()) -> int:
        """A call that costs the host time and the device none: a view, a factory, metadata."""
        return self._add(HostCall(lane=self._thread, name=name, module=self.module), touches)

    def synchronize(self, name: str = "cudaDeviceSynchronize", awaited: tuple[int, ...] | None = None) -> None:
        """The host waits for the last operation of every stream, or of the current stream alone, or for an event."""
        last = tuple(sorted(self._last_on.values() if awaited is None else set(awaited)))
        if name == "cudaStreamSynchronize":
            last = (self._last_on[self.stream],) if self.stream in self._last_on else ()
        self._add(HostCall(lane=self._thread, name=name, waits=last))

    # Memory ----------------------------------------

    def alloc(self, block: int, nbytes: int, category: Category, name: str) -> None:
        op = Alloc(
            lane=self._thread, block=block, bytes=nbytes, stream=self.stream,
            category=category, name=name, module=self.module,
        )  # fmt: skip
        self._allocated_at[block] = self._add(op)

    def free(self, block: int) -> None:
        self._add(Free(lane=self._thread, block=block))

    def categorize(self, block: int, category: Category) -> None:
        """Say what a block turned out to be: a gradient, or an activation that backward needs."""
        index = self._allocated_at[block]
        self.ops[index] = msgspec.structs.replace(self.ops[index], category=category)

    # Device streams ----------------------------------------

    def stream_named(self, name: str) -> int:
        """The lane of the stream of that name, which begins with its first mention."""
        if name not in self._stream_lane:
            number = 16 + 4 * (len(self._stream_lane) + 1)
            self._stream_lane[name] = self._new_lane(Lane("stream", number, name))
        return self._stream_lane[name]

    def event(self, lane: int) -> tuple[int, ...]:
        """What an event recorded on that stream now stands for: its last operation, and what its next one awaits."""
        last = (self._last_on[lane],) if lane in self._last_on else ()
        return (*self._pending.get(lane, ()), *last)

    def stream_waits(self, lane: int, event: Iterable[int]) -> None:
        """The stream waits for an event before its next operation."""
        self.host("cudaStreamWaitEvent")
        self._pending.setdefault(lane, []).extend(event)

    def kernel(self, work: Work, touches: Iterable[int]) -> None:
        """One aten op that runs one kernel on the current stream."""
        launch = self._launch(work.op, self.stream)
        index = self._work_index.setdefault(work, len(self.works))
        if index == len(self.works):
            self.works.append(work)
        op = Kernel(
            lane=self.stream, name=work.op, launch=launch, after=self._waits(self.stream),
            work=index, module=self.module,
        )  # fmt: skip
        self._on_stream(op, touches)

    def copy(self, name: str, kind: CopyKind, nbytes: int, touches: Iterable[int]) -> None:
        launch = self._launch(name, self.stream)
        op = Copy(lane=self.stream, name=name, launch=launch, after=self._waits(self.stream), kind=kind, bytes=nbytes)
        self._on_stream(op, touches)

    def collective(
        self, kind: CollectiveKind, nbytes: int, group: str, dtype: str, touches: Iterable[int],
        *, own_stream: bool = True,
    ) -> int:  # fmt: skip
        """A collective on the group's own stream, after all that the current stream has been given so far; or, where
        it is issued synchronously (``async_op=False``), on the current stream itself (torch/csrc/distributed/c10d/
        ProcessGroupNCCL.cpp, collective(), since PyTorch 2.8).  A communicator's kernels run one after the other,
        whatever their streams (NCCL user guide, "Using multiple streams")."""
        lane = self.stream_named(f"nccl:{group}") if own_stream else self.stream
        launch = self._launch(f"c10d::{kind}", lane)
        after = set(self._waits(lane))
        if own_stream:
            after.update(self.event(self.stream))
        previous = self._last_of_group.get(group)
        if previous is not None and self.ops[previous].lane != lane:
            after.add(previous)
        seq = self._group_seq.get(group, 0)
        self._group_seq[group] = seq + 1
        op = Collective(
            lane=lane, name=f"ncclDevKernel_{kind}", launch=launch, after=tuple(sorted(after)),
            kind=kind, bytes=nbytes, group=group, seq=seq, dtype=dtype,
        )  # fmt: skip
        self._last_of_group[group] = self._on_stream(op, touches)
        return self._last_of_group[group]

    def exchange(self, transfers: Sequence[Transfer], stream: str) -> tuple[int, ...]:
        """Sends and receives that one kernel of NCCL's runs on the stream of that name, after all that the current
        stream has been given so far: they begin together, and what comes next on that stream waits for all of them.
        Each has a lane of its own, for a lane runs one operation at a time."""
        lanes = self._exchange_lanes.setdefault(stream, [])
        while len(lanes) < len(transfers):
            lanes.append(self.stream_named(f"{stream} + {len(lanes)}" if lanes else stream))
        after = set(self.event(self.stream)).union(*(self.event(lane) for lane in lanes))
        name = "batch_isend_irecv" if len(transfers) > 1 else transfers[0].kind
        launch = self._launch(f"c10d::{name}", lanes[0])
        indices = []
        for lane, transfer in zip(lanes, transfers, strict=False):
            seq = self._group_seq.get(transfer.group, 0)
            self._group_seq[transfer.group] = seq + 1
            op = Collective(
                lane=lane, name="ncclDevKernel_SendRecv", launch=launch, after=tuple(sorted(after)),
                kind=transfer.kind, bytes=transfer.nbytes, group=transfer.group, seq=seq, dtype=transfer.dtype,
                peer=transfer.peer,
            )  # fmt: skip
            indices.append(self._on_stream(op, [transfer.block]))
        return tuple(indices)

    def wait(self, collective: int) -> None:
        """The current stream waits for a collective before its next kernel."""
        self.stream_waits(self.stream, (collective,))

    def _waits(self, lane: int) -> tuple[int, ...]:
        return tuple(sorted(set(self._pending.pop(lane, ()))))

    def _launch(self, name: str, lane: int) -> int:
        launched = self._launched.setdefault(lane, [])
        waits = (launched[-LAUNCH_QUEUE],) if len(launched) >= LAUNCH_QUEUE else ()
        return self._add(HostCall(lane=self._thread, name=name, waits=waits, module=self.module))

    def _on_stream(self, op: Kernel | Copy | Collective, touches: Iterable[int]) -> int:
        index = self._add(op, touches)
        self._launched.setdefault(op.lane, []).append(index)
        self._last_on[op.lane] = index
        return index

    def _new_lane(self, lane: Lane) -> int:
        self._lanes.append(lane)
        return len(self._lanes) - 1

    def _add(self, op: Op, touches: Iterable[int] = ()) -> int:
        index = len(self.ops)
        if self._handoff and op.lane == self._thread:
            op = msgspec.structs.replace(op, after=self._handoff)
            self._handoff = ()
        self.ops.append(op)
        blocks = tuple(dict.fromkeys(touches))
        if blocks:
            self.uses[index] = blocks
        return index
