"""ProgramBuilder: the operations of one synthesized rank, written down in the order the host issues them.

Eager PyTorch has one host thread; it allocates an op's outputs, then launches the kernel.  Compute goes onto the
default stream (Kineto calls it stream 7); collectives go onto a stream of their own for each process group, which
waits for the compute stream's last kernel, as ProcessGroupNCCL does with an event before each collective.
"""

from __future__ import annotations

from collections.abc import Iterable

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


class ProgramBuilder:
    """Collects operations; ``uses`` remembers which blocks each position of the list touches."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.works: list[Work] = []
        self.uses: dict[int, tuple[int, ...]] = {}
        self.module = ""
        self._lanes = [Lane("thread", 1, "main"), Lane("stream", 7, "compute")]
        self._work_index: dict[Work, int] = {}
        self._group_lane: dict[str, int] = {}
        self._group_seq: dict[str, int] = {}
        self._launched: dict[int, list[int]] = {}
        self._last_on: dict[int, int] = {}
        self._pending: list[int] = []

    @property
    def lanes(self) -> tuple[Lane, ...]:
        return tuple(self._lanes)

    def program(self) -> Program:
        return Program(self.lanes, tuple(self.ops))

    def mark(self, name: str, step: int, edge: str) -> None:
        self._add(Mark(lane=THREAD, name=name, step=step, edge="begin" if edge == "begin" else "end"))

    def host(self, name: str, touches: Iterable[int] = ()) -> int:
        """A call that costs the host time and the device none: a view, a factory, metadata."""
        return self._add(HostCall(lane=THREAD, name=name, module=self.module), touches)

    def synchronize(self, name: str = "cudaDeviceSynchronize") -> None:
        """The host waits for the last operation of every stream, or of the compute stream alone."""
        last = tuple(sorted(self._last_on.values()))
        if name == "cudaStreamSynchronize":
            last = (self._last_on[COMPUTE],)
        self._add(HostCall(lane=THREAD, name=name, waits=last))

    def alloc(self, block: int, nbytes: int, category: Category, name: str) -> None:
        op = Alloc(
            lane=THREAD, block=block, bytes=nbytes, stream=COMPUTE, category=category, name=name, module=self.module
        )
        self._add(op)

    def free(self, block: int) -> None:
        self._add(Free(lane=THREAD, block=block))

    def kernel(self, work: Work, touches: Iterable[int]) -> None:
        """One aten op that runs one kernel on the compute stream."""
        launch = self._launch(work.op, COMPUTE)
        index = self._work_index.setdefault(work, len(self.works))
        if index == len(self.works):
            self.works.append(work)
        op = Kernel(lane=COMPUTE, name=work.op, launch=launch, after=self._waits(), work=index, module=self.module)
        self._on_stream(op, touches)

    def copy(self, name: str, kind: CopyKind, nbytes: int, touches: Iterable[int]) -> None:
        launch = self._launch(name, COMPUTE)
        op = Copy(lane=COMPUTE, name=name, launch=launch, after=self._waits(), kind=kind, bytes=nbytes)
        self._on_stream(op, touches)

    def collective(self, kind: CollectiveKind, nbytes: int, group: str, dtype: str, touches: Iterable[int]) -> int:
        """A collective on the group's own stream, after all that compute has issued so far."""
        lane = self._lane_of(group)
        launch = self._launch(f"c10d::{kind}", lane)
        seq = self._group_seq.get(group, 0)
        self._group_seq[group] = seq + 1
        after = (self._last_on[COMPUTE],) if COMPUTE in self._last_on else ()
        op = Collective(
            lane=lane, name=f"ncclDevKernel_{kind}", launch=launch, after=after,
            kind=kind, bytes=nbytes, group=group, seq=seq, dtype=dtype,
        )  # fmt: skip
        return self._on_stream(op, touches)

    def wait(self, collective: int) -> None:
        """The compute stream waits for a collective before its next kernel."""
        self.host("cudaStreamWaitEvent")
        self._pending.append(collective)

    def _waits(self) -> tuple[int, ...]:
        waits = tuple(sorted(set(self._pending)))
        self._pending.clear()
        return waits

    def _launch(self, name: str, lane: int) -> int:
        launched = self._launched.setdefault(lane, [])
        waits = (launched[-LAUNCH_QUEUE],) if len(launched) >= LAUNCH_QUEUE else ()
        return self._add(HostCall(lane=THREAD, name=name, waits=waits, module=self.module))

    def _on_stream(self, op: Kernel | Copy | Collective, touches: Iterable[int]) -> int:
        index = self._add(op, touches)
        self._launched.setdefault(op.lane, []).append(index)
        self._last_on[op.lane] = index
        return index

    def _lane_of(self, group: str) -> int:
        if group not in self._group_lane:
            self._group_lane[group] = len(self._lanes)
            self._lanes.append(Lane("stream", 16 + 4 * len(self._group_lane), f"nccl:{group}"))
        return self._group_lane[group]

    def _add(self, op: Op, touches: Iterable[int] = ()) -> int:
        index = len(self.ops)
        self.ops.append(op)
        blocks = tuple(dict.fromkeys(touches))
        if blocks:
            self.uses[index] = blocks
        return index
