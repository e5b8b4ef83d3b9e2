"""The events of a trace, typed, on one integer clock."""

from __future__ import annotations

import msgspec

ABSENT = msgspec.Raw()  # an argument that is not there


class Args(msgspec.Struct, frozen=True, gc=False):
    """The arguments of an event that are used, under the names they have in the file."""

    correlation: int | None = None
    external: int | None = msgspec.field(default=None, name="External id")
    external_old: int | None = msgspec.field(default=None, name="external id")
    device: int | None = None
    stream: int | str | None = None
    bytes: int | None = None
    dims: msgspec.Raw = msgspec.field(default=ABSENT, name="Input Dims")
    types: msgspec.Raw = msgspec.field(default=ABSENT, name="Input type")
    strides: msgspec.Raw = msgspec.field(default=ABSENT, name="Input Strides")
    concrete: msgspec.Raw = msgspec.field(default=ABSENT, name="Concrete Inputs")
    collective: str | None = msgspec.field(default=None, name="Collective name")
    in_elements: int | None = msgspec.field(default=None, name="In msg nelems")
    out_elements: int | None = msgspec.field(default=None, name="Out msg nelems")
    group_size: int | None = msgspec.field(default=None, name="Group size")
    group_name: str | int | None = msgspec.field(default=None, name="Process Group Name")
    group_ranks: str | list[int] | None = msgspec.field(default=None, name="Process Group Ranks")
    sequence: int | None = msgspec.field(default=None, name="Seq")
    dtype: str | None = None
    source_rank: int | None = msgspec.field(default=None, name="Src Rank")
    target_rank: int | None = msgspec.field(default=None, name="Dst Rank")
    sync_kind: str | None = msgspec.field(default=None, name="cuda_sync_kind")
    wait_stream: int | None = msgspec.field(default=None, name="wait_on_stream")
    wait_record: int | None = msgspec.field(default=None, name="wait_on_cuda_event_record_corr_id")
    memory_bytes: int | None = msgspec.field(default=None, name="Bytes")
    address: int | None = msgspec.field(default=None, name="Addr")
    device_type: int | None = msgspec.field(default=None, name="Device Type")
    device_id: int | None = msgspec.field(default=None, name="Device Id")
    allocated: int | None = msgspec.field(default=None, name="Total Allocated")
    reserved: int | None = msgspec.field(default=None, name="Total Reserved")
    thread_name: str | None = msgspec.field(default=None, name="name")


class Thread(msgspec.Struct, frozen=True):
    """A host thread, by the process and thread number it has in the file."""

    pid: int
    tid: int
    name: str


class HostEvent(msgspec.Struct, gc=False):
    """An op or annotation on a host thread (``thread`` is an index into ``KinetoTrace.threads``).

    An annotation names a region; the thread may be silent inside it.  Old traces call both ``Operator``; an op's
    name has a namespace (``aten::mm``), a region's has none.
    """

    name: str
    start_ns: int
    end_ns: int
    thread: int
    annotation: bool
    args: Args


class RuntimeEvent(msgspec.Struct, gc=False):
    """A call of the device's runtime or driver."""

    name: str
    start_ns: int
    end_ns: int
    thread: int
    correlation: int
    external: int


class DeviceEvent(msgspec.Struct, gc=False):
    """A kernel, memcpy or memset; ``correlation`` is -1 where the file gives none."""

    kind: str
    name: str
    start_ns: int
    end_ns: int
    device: int
    stream: int
    correlation: int
    args: Args


class SyncEvent(msgspec.Struct, gc=False):
    """What a synchronising call waited for: streams and the correlation id of the cudaEventRecord; -1 is unknown."""

    kind: str
    correlation: int
    stream: int
    wait_stream: int
    wait_record: int


class MemoryEvent(msgspec.Struct, gc=False):
    """An allocation (positive) or free (negative ``bytes``) of the caching allocator of a device."""

    time_ns: int
    thread: int
    device: int
    bytes: int
    address: int | None
    allocated: int | None
    reserved: int | None


class DeviceProperties(msgspec.Struct, frozen=True):
    """A device of the machine the trace was taken on."""

    name: str
    memory_bytes: int | None


class KinetoTrace(msgspec.Struct):
    """One rank's trace.  Lists of events are in order of time; times are nanoseconds of the file's own clock.

    ``rank`` is None where the file does not say.  ``cpu_is_device`` is the trace's own statement that it was taken
    where the CPU is the device.  ``skipped`` counts events that could not be used, by why.
    """

    path: str
    rank: int | None
    world_size: int | None
    groups: dict[str, tuple[int, ...]]
    devices: dict[int, DeviceProperties]
    cpu_is_device: bool
    host_name: str
    threads: list[Thread]
    host: list[HostEvent]
    runtime: list[RuntimeEvent]
    device: list[DeviceEvent]
    syncs: list[SyncEvent]
    memory: list[MemoryEvent]
    skipped: dict[str, int]
