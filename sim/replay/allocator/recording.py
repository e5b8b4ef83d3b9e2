"""A recording of torch.cuda.memory: read from its pickle without running anything, checked and typed.

Source of the format: ``THCPModule_memorySnapshot`` of torch/csrc/cuda/Module.cpp and the description in
torch/cuda/memory.py (PyTorch 2.1 to 2.13).  The ``size`` of alloc and free events is what the program
requested (``orig_size``, ``block->requested_size``) since 2.1 and the rounded block before; rounding what is
rounded changes nothing, so both replay to the same addresses.  ``addr`` of an oom event is ``device_free``.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

from sim.errors import InputError, UserError, nearest
from sim.replay.allocator.config import AllocatorConfig, parse_alloc_conf
from sim.replay.allocator.pools import COMMON_POOL, PoolId
from sim.replay.allocator.rounding import ROUNDUP_INTERVALS
from sim.replay.allocator.segments import BlockState, BlockView, SegmentView

ACTIONS = (
    "alloc", "free_requested", "free_completed", "segment_alloc", "segment_free", "segment_map", "segment_unmap",
    "snapshot", "oom",
)  # fmt: skip
_WITHOUT_MEMORY = ("snapshot", "user_defined")  # marks in the history; user_defined was there before 2.6
_PLAIN_GLOBALS = {("builtins", name) for name in ("set", "frozenset", "bytearray", "complex")}
_STATES: dict[str, BlockState] = {
    "active_allocated": "active_allocated",
    "active_pending_free": "active_pending_free",
    "active_awaiting_free": "active_pending_free",  # the name in PyTorch's own description
    "inactive": "inactive",
}
_ADDRESSES = 1 << 64
_HOW_TO_RECORD = (
    "record one with torch.cuda.memory._record_memory_history() before the work "
    "and torch.cuda.memory._dump_snapshot(FILE) after it"
)


class TraceEvent(NamedTuple):
    """One entry of a history.  Bytes; for an oom event ``address`` is what the device had free."""

    position: int
    action: str
    address: int
    size: int
    stream: int
    pool_id: PoolId | None


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceRecording:
    """The history of one device, oldest first, and its segments when the snapshot was taken."""

    device: int
    events: tuple[TraceEvent, ...]
    segments: tuple[SegmentView, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Recording:
    """A snapshot file: every device with a history, and the settings the snapshot names.

    ``settings_known`` is false for snapshots of versions that did not store them (before 2.2).
    """

    path: str
    devices: tuple[DeviceRecording, ...]
    config: AllocatorConfig
    settings_known: bool


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings and containers; a pickle that names anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN_GLOBALS:
            return super().find_class(module, name)
        raise _NotPlainError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _NotPlainError(f"persistent object {pid!r}")


class _NotPlainError(Exception):
    """The pickle names something that is not plain data."""


def read_recording(path: str | Path) -> Recording:
    """The recording in a snapshot pickle.  Raises :class:`~sim.errors.InputError`, one line."""
    return typed_recording(_unpickle(Path(path)), str(path))


def _unpickle(path: Path) -> object:
    try:
        with path.open("rb") as file:
            return cast(object, _PlainUnpickler(file).load())
    except _NotPlainError as problem:
        raise InputError(
            path, f"the pickle wants to run {problem}: a memory snapshot is plain data, and nothing else is loaded"
        ) from None
    except OSError as problem:
        raise InputError(path, f"cannot be read: {problem.strerror or problem}") from None
    except MemoryError:
        raise InputError(path, "the pickle claims more data than fits into memory: it is damaged") from None
    except Exception as problem:  # a damaged pickle raises nearly anything
        reason = str(problem) or type(problem).__name__
        raise InputError(path, f"not a whole pickle ({reason}): dump the snapshot again") from None


def typed_recording(data: object, path: str) -> Recording:
    """The same from the loaded data, as ``torch.cuda.memory._snapshot()`` returns it."""
    if not isinstance(data, Mapping):
        raise InputError(path, f"not a memory snapshot but a {type(data).__name__}; {_HOW_TO_RECORD}")
    if "device_traces" not in data:
        raise InputError(path, f"has no device_traces, so no history to replay; {_HOW_TO_RECORD}")
    checked = _Checked(path)
    devices = checked.devices(data["device_traces"], data.get("segments", []))
    settings = data.get("allocator_settings")
    config = checked.config(settings)
    checked.complain()
    if not any(device.events for device in devices):
        raise InputError(path, f"device_traces are empty: no history was recorded; {_HOW_TO_RECORD}")
    return Recording(path, devices, config, settings is not None)


class _Checked:
    """Turns plain data into typed values and collects what is wrong with it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._problems: list[str] = []

    def complain(self) -> None:
        if self._problems:
            more = f" (and {len(self._problems) - 1} more problems)" if len(self._problems) > 1 else ""
            raise InputError(self._path, self._problems[0] + more)

    def devices(self, traces: object, segments: object) -> tuple[DeviceRecording, ...]:
        if not isinstance(traces, (list, tuple)):
            self._problems.append(f"device_traces is a {type(traces).__name__}, not a list with one list a device")
            return ()
        if not isinstance(segments, (list, tuple)):
            self._problems.append(f"segments is a {type(segments).__name__}, not a list")
            return ()
        by_device: dict[int, list[SegmentView]] = {}
        for at, segment in enumerate(segments):
            typed = self._segment(segment, f"segments[{at}]")
            if typed is not None:
                by_device.setdefault(typed[0], []).append(typed[1])
        recordings = []
        for device, trace in enumerate(traces):
            place = f"device_traces[{device}]"
            if not isinstance(trace, (list, tuple)):
                self._problems.append(f"{place} is a {type(trace).__name__}, not a list of events")
                continue
            events = tuple(self._events(trace, place))
            views = sorted(by_device.get(device, []), key=lambda view: view.address)
            recordings.append(DeviceRecording(device, events, tuple(views)))
        return tuple(recordings)

    def _events(self, trace: list[Any] | tuple[Any, ...], place: str) -> Iterator[TraceEvent]:
        for index, entry in enumerate(trace):
            action = entry.get("action") if isinstance(entry, Mapping) else None
            if action not in ACTIONS:
                if action not in _WITHOUT_MEMORY:
                    self._bad_action(f"{place}[{index}]", entry, action)
                continue
            if action in _WITHOUT_MEMORY:
                continue
            key = "device_free" if action == "oom" and "device_free" in entry else "addr"
            address, size, stream = entry.get(key), entry.get("size"), entry.get("stream", 0)
            whole = type(address) is int and type(size) is int and type(stream) is int
            if whole and size >= 0 and 0 <= address < _ADDRESSES:
                yield TraceEvent(index, action, address, size, stream, self._pool_of(entry, f"{place}[{index}]"))
                continue
            self._bad_event(f"{place}[{index}]", action, {key: address, "size": size, "stream": stream})

    def _bad_action(self, place: str, entry: object, action: object) -> None:
        if not isinstance(entry, Mapping):
            self._problems.append(f"{place} is a {type(entry).__name__}, not an event")
        elif action is None:
            self._problems.append(f"{place} has no action")
        else:
            self._problems.append(f"{place}: unknown action {action!r}: {nearest(str(action), ACTIONS)}")

    def _bad_event(self, place: str, action: str, fields: Mapping[str, object]) -> None:
        for name, value in fields.items():
            if type(value) is not int:
                said = "is missing" if value is None else f"is {value!r}, not a whole number"
                self._problems.append(f"{place} ({action}): {name} {said}")
            elif name != "stream" and value < 0:
                self._problems.append(f"{place} ({action}): {name} is {value}, which cannot be negative")
            elif name != "stream" and value >= _ADDRESSES:
                self._problems.append(f"{place} ({action}): {name} is {value}, beyond every address")

    def _pool_of(self, entry: Mapping[Any, Any], place: str) -> PoolId | None:
        for key in ("segment_pool_id", "pool_id", "mempool_id"):
            if key in entry:
                return self._pool_id(entry[key], f"{place}.{key}")
        return None

    def _pool_id(self, value: object, place: str) -> PoolId:
        if isinstance(value, (list, tuple)) and len(value) == 2 and all(type(part) is int for part in value):
            return (value[0], value[1])
        self._problems.append(f"{place} is {value!r}, not a pair of whole numbers")
        return COMMON_POOL

    def _integer(self, entry: Mapping[Any, Any], key: str, place: str, default: int | None = None) -> int:
        value = entry.get(key, default)
        if type(value) is not int:
            said = "is missing" if value is None else f"is {value!r}, not a whole number"
            self._problems.append(f"{place}: {key} {said}")
            return 0
        if value < 0 and key != "stream":
            self._problems.append(f"{place}: {key} is {value}, which cannot be negative")
        return value

    def _segment(self, segment: object, place: str) -> tuple[int, SegmentView] | None:
        if not isinstance(segment, Mapping):
            self._problems.append(f"{place} is a {type(segment).__name__}, not a segment")
            return None
        address = self._integer(segment, "address", place)
        size = self._integer(segment, "total_size", place)
        kind = segment.get("segment_type")
        if kind not in ("small", "large"):
            self._problems.append(f"{place}: segment_type is {kind!r}, not 'small' or 'large'")
        blocks = tuple(self._blocks(segment.get("blocks"), address, place))
        if sum(block.size for block in blocks) != size:
            self._problems.append(f"{place}: its blocks do not add up to its total_size of {size}")
        view = SegmentView(
            address=address,
            size=size,
            stream=self._integer(segment, "stream", place, 0),
            small=kind == "small",
            expandable=bool(segment.get("is_expandable", False)),
            pool_id=self._pool_id(segment.get("segment_pool_id", COMMON_POOL), f"{place}.segment_pool_id"),
            blocks=blocks,
        )
        return self._integer(segment, "device", place, 0), view

    def _blocks(self, blocks: object, address: int, place: str) -> Iterator[BlockView]:
        if not isinstance(blocks, (list, tuple)):
            self._problems.append(f"{place}: blocks is a {type(blocks).__name__}, not a list")
            return
        for at, block in enumerate(blocks):
            where = f"{place}.blocks[{at}]"
            if not isinstance(block, Mapping):
                self._problems.append(f"{where} is a {type(block).__name__}, not a block")
                continue
            state = _STATES.get(str(block.get("state")))
            if state is None:
                self._problems.append(
                    f"{where}: state {block.get('state')!r}: {nearest(str(block.get('state')), _STATES)}"
                )
                continue
            size = self._integer(block, "size", where)
            requested = self._integer(block, "requested_size", where, size) if state != "inactive" else 0
            yield BlockView(address, size, requested, state)
            address += size

    def config(self, settings: object) -> AllocatorConfig:
        """The settings of the snapshot: the string first, then what it spells out."""
        if settings is None:
            return AllocatorConfig()
        if not isinstance(settings, Mapping):
            self._problems.append(f"allocator_settings is a {type(settings).__name__}, not settings by name")
            return AllocatorConfig()
        for key, types in _SETTINGS.items():
            if key in settings and type(settings[key]) not in types:
                self._problems.append(f"allocator_settings: {key} is {settings[key]!r}, not {types[0].__name__}")
        text = settings.get("PYTORCH_CUDA_ALLOC_CONF", settings.get("PYTORCH_ALLOC_CONF", ""))
        try:
            config = parse_alloc_conf(text if isinstance(text, str) else "")
        except UserError:
            config = AllocatorConfig()  # keys of another version: what matters is spelt out beside it
        return dataclasses.replace(config, **_spelt_out(settings))


# What is read of a snapshot's settings (torch/csrc/cuda/Module.cpp, THCPModule_memorySnapshot); others are left alone.
_SETTINGS: dict[str, tuple[type, ...]] = {
    "PYTORCH_CUDA_ALLOC_CONF": (str,), "PYTORCH_ALLOC_CONF": (str,), "max_split_size": (int,),
    "garbage_collection_threshold": (float, int), "expandable_segments": (bool,), "roundup_power2_divisions": (dict,),
}  # fmt: skip


def _spelt_out(settings: Mapping[Any, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    split = settings.get("max_split_size")
    if type(split) is int:
        found["max_split_size"] = split if 0 < split < _ADDRESSES - 1 else None
    threshold = settings.get("garbage_collection_threshold")
    if isinstance(threshold, (int, float)) and not isinstance(threshold, bool):
        found["garbage_collection_threshold"] = float(threshold)
    expandable = settings.get("expandable_segments")
    if isinstance(expandable, bool):
        found["expandable_segments"] = expandable
    roundups = settings.get("roundup_power2_divisions")
    if isinstance(roundups, Mapping) and len(roundups) == ROUNDUP_INTERVALS:
        values = tuple(roundups.values())
        if all(type(value) is int and value >= 0 for value in values):
            found["roundup_power2_divisions"] = values
    return found
