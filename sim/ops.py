"""The operations of a workload: what host threads and device streams do, as plain frozen data.

A program is a list of operations.  Each runs on one *lane*: a host thread or a device stream.  The operations of
a lane run in list order, one at a time.  Other order is said by the index of an operation in the same list:

* ``launch``: the host call that puts a device operation on its stream;
* ``after``: operations that must have ended before this one starts (a stream waits for an event, a thread for
  another thread);
* ``waits``: operations that must have ended before a host call *returns* (``cudaStreamSynchronize``).

An index always points backwards in the list, so one rank alone cannot deadlock and one pass finds the critical
path.  Times are integer nanoseconds, sizes integer bytes.  ``measured_ns`` is what a trace measured for the
operation alone, without waiting; it is None in a synthesized workload, whose costs come from placement.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

LaneKind = Literal["thread", "stream"]
CopyKind = Literal["h2d", "d2h", "d2d", "p2p", "memset"]
CollectiveKind = Literal[
    "all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "all_to_all", "send", "recv", "barrier"
]
Category = Literal[
    "parameter", "gradient", "optimizer", "activation", "temporary", "input", "workspace", "communication", "unknown"
]

DTYPE_BYTES: dict[str, int] = {
    "float64": 8, "float32": 4, "tfloat32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "complex64": 8, "complex128": 16, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8,
    "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
}  # fmt: skip


class Lane(msgspec.Struct, frozen=True):
    """One host thread or one device stream of a rank, with the number and name it has in a trace."""

    kind: LaneKind
    id: int
    name: str


class TensorMeta(msgspec.Struct, frozen=True, array_like=True):
    """Shape, dtype (torch's name without ``torch.``) and, where it is not contiguous, the strides of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes that reading every element once moves; a dimension that is only expanded (stride 0) counts once."""
        count = self.elements
        for size, stride in zip(self.shape, self.stride or (), strict=False):
            if stride == 0 and size:
                count //= size
        return count * DTYPE_BYTES.get(self.dtype, 4)


class Work(msgspec.Struct, frozen=True):
    """What a kernel computes: an aten op with the tensors it reads and writes.  Costs are functions of this alone."""

    op: str
    inputs: tuple[TensorMeta, ...] = ()
    outputs: tuple[TensorMeta, ...] = ()
    scalars: tuple[tuple[str, bool | int | float | str], ...] = ()

    def scalar(self, name: str) -> bool | int | float | str | None:
        """The scalar argument of that name, or None."""
        return dict(self.scalars).get(name)


class _Op(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="op", gc=False):
    lane: int


class _HostOp(_Op, frozen=True, omit_defaults=True):
    """``before_ns``: the thread's own work between its previous operation (or the end of ``after``) and this one."""

    before_ns: int = 0
    after: tuple[int, ...] = ()


class HostCall(_HostOp, frozen=True, tag="host", omit_defaults=True):
    """A call on a host thread.  It starts when the thread is free and ``after`` has ended, plus ``before_ns``;
    it ends ``measured_ns`` after the later of its start and the end of ``waits``."""

    name: str = ""
    measured_ns: int | None = None
    waits: tuple[int, ...] = ()
    work: int | None = None
    module: str = ""


class Mark(_HostOp, frozen=True, tag="mark", omit_defaults=True):
    """Where a training step begins or ends on its thread."""

    name: str = ""
    step: int = 0
    edge: Literal["begin", "end"] = "begin"


class Alloc(_HostOp, frozen=True, tag="alloc", omit_defaults=True):
    """The host asks the caching allocator for ``bytes`` on ``stream`` (a lane); ``block`` names the answer."""

    block: int = 0
    bytes: int = 0
    stream: int = -1
    category: Category = "unknown"
    name: str = ""
    module: str = ""
    address: int | None = None


class Free(_HostOp, frozen=True, tag="free", omit_defaults=True):
    """The host gives ``block`` back."""

    block: int = 0


class _DeviceOp(_Op, frozen=True, omit_defaults=True):
    """Starts when its stream is free and ``after`` has ended, plus ``gap_ns`` (the device's own turn-around), but not
    before ``lag_ns`` after its launch began.  Without ``launch`` it is taken to be launched in time."""

    name: str = ""
    launch: int | None = None
    lag_ns: int | None = None
    gap_ns: int | None = None
    after: tuple[int, ...] = ()
    measured_ns: int | None = None


class Kernel(_DeviceOp, frozen=True, tag="kernel", omit_defaults=True):
    """A compute kernel; ``work`` is an index into the graph's works where the op and its shapes are known."""

    work: int | None = None
    module: str = ""


class Copy(_DeviceOp, frozen=True, tag="copy", omit_defaults=True):
    """A memcpy or memset of ``bytes``."""

    kind: CopyKind = "d2d"
    bytes: int = 0


class Collective(_DeviceOp, frozen=True, tag="collective", omit_defaults=True):
    """A communication kernel over ``group`` (a name in the graph's groups).

    ``seq`` counts the group's collectives on this rank: the n-th of one rank meets the n-th of the others.
    ``bytes`` is the whole tensor as nccl-tests counts it (all_gather: the gathered output; reduce_scatter: the
    input).  It starts on each rank when the rank arrives and ends on all when the last has arrived plus the
    transfer; ``measured_ns`` is that transfer.  The lane may be a host thread (gloo).  ``peer`` is the other
    rank of a send or recv, where it is the same for all ranks that run the program.
    """

    kind: CollectiveKind = "all_reduce"
    bytes: int = 0
    group: str = ""
    seq: int = 0
    dtype: str = ""
    peer: int | None = None


Op = HostCall | Mark | Alloc | Free | Kernel | Copy | Collective
DeviceOp = Kernel | Copy | Collective


def renumbered(op: Op, index_of: Mapping[Any, int]) -> Op:
    """The same operation in another list: every index it holds sent through ``index_of``."""
    changes: dict[str, object] = {}
    if op.after:
        changes["after"] = tuple(index_of[i] for i in op.after)
    if isinstance(op, HostCall) and op.waits:
        changes["waits"] = tuple(index_of[i] for i in op.waits)
    if isinstance(op, DeviceOp) and op.launch is not None:
        changes["launch"] = index_of[op.launch]
    return msgspec.structs.replace(op, **changes) if changes else op
