"""A trace's file as it is written, decoded; what does not fit its type is skipped and counted."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from sim.errors import InputError
from sim.workload.kineto.events import ABSENT, Args

_NO_ARGS = Args()


class Event(msgspec.Struct, gc=False):
    """One event, of any phase and category; ``ts`` and ``dur`` are microseconds."""

    ph: str = ""
    cat: str = ""
    name: str = ""
    pid: int | str = -1
    tid: int | str = -1
    ts: float | None = None
    dur: float | None = None
    id: int | str | None = None
    args: Args = _NO_ARGS


class Group(msgspec.Struct):
    """A process group, where the file names its ranks."""

    pg_name: str | int = ""
    ranks: list[int] = []


class Distributed(msgspec.Struct, frozen=True):
    """Which rank of how many this is."""

    rank: int | None = None
    world_size: int | None = None
    backend: str = ""
    pg_config: list[Group] = []


class Device(msgspec.Struct):
    """A device that the profiler saw; ``memory`` is bytes."""

    id: int = 0
    name: str = ""
    memory: int | None = msgspec.field(default=None, name="totalGlobalMem")


class File(msgspec.Struct):
    """The whole file."""

    events: list[Event] = msgspec.field(name="traceEvents")
    distributed: Distributed = msgspec.field(default=Distributed(), name="distributedInfo")
    devices: list[Device] = msgspec.field(default_factory=list, name="deviceProperties")
    base_ns: int | None = msgspec.field(default=None, name="baseTimeNanoseconds")
    tracesim_device: str = ""
    host_name: str = ""


def read_file(path: Path) -> tuple[File, Counter[str]]:
    """The file, and how many of its events could not be decoded, by why.  InputError where it is no trace."""
    return _decode(path, _bytes(path))


def _bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise InputError(path, "no such file; give a torch.profiler trace (.json or .json.gz)") from None
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror}); give a torch.profiler trace") from None
    if raw[:2] != b"\x1f\x8b":
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(path, f"not a whole gzip file ({error}); copy or record it again") from None


def _decode(path: Path, raw: bytes) -> tuple[File, Counter[str]]:
    try:
        return msgspec.json.decode(raw, type=File), Counter()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _decode_leniently(path, raw)


def _decode_leniently(path: Path, raw: bytes) -> tuple[File, Counter[str]]:
    """Event by event: what does not fit its type is skipped and counted."""
    try:
        decoded = msgspec.json.decode(_well_formed(path, raw), type=dict[str, msgspec.Raw] | list[msgspec.Raw])
        top: dict[str, msgspec.Raw] = decoded if isinstance(decoded, dict) else {}
        if isinstance(decoded, dict):
            events = msgspec.json.decode(decoded.get("traceEvents", ABSENT), type=list[msgspec.Raw])
        else:
            events = decoded
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        problem = "JSON, but no trace: it has no list of traceEvents; give what torch.profiler exported"
        raise InputError(path, problem) from None
    skipped: Counter[str] = Counter()
    return File(
        events=[event for event in (_event(r, skipped) for r in events) if event is not None],
        distributed=_part(top.get("distributedInfo"), Distributed, Distributed()),
        devices=_part(top.get("deviceProperties"), list[Device], []),
        base_ns=_part(top.get("baseTimeNanoseconds"), int, None),
        tracesim_device=_part(top.get("tracesim_device"), str, ""),
        host_name=_part(top.get("host_name"), str, ""),
    ), skipped


def _event(raw: msgspec.Raw, skipped: Counter[str]) -> Event | None:
    try:
        return msgspec.json.decode(raw, type=Event, strict=False)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        skipped["fields of the wrong type"] += 1
        return None


def _part(raw: msgspec.Raw | None, kind: Any, missing: Any) -> Any:
    """A part of the file's head, or what stands for it where it is missing or of another type."""
    if raw is None:
        return missing
    try:
        return msgspec.json.decode(raw, type=kind, strict=False)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return missing


def _well_formed(path: Path, raw: bytes) -> bytes:
    """The same JSON in strict form: some versions of Kineto wrote nan, inf and raw control characters."""
    try:
        msgspec.json.decode(raw, type=msgspec.Raw)
        raw.decode()
        return raw
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    text = re.sub(r":\s*-?(nan|inf)\b", ": null", raw.decode("utf-8", "replace"))
    try:
        value = json.loads(text, strict=False, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        what = "is empty" if not text.strip() else f"not JSON, or cut off ({error})"
        raise InputError(path, f"{what}; give a trace that torch.profiler exported whole") from None
    return msgspec.json.encode(value)
