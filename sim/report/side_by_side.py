"""Several timelines in one trace file: for every rank one process group each, one below the other, from a common zero.

Perfetto then shows what the same rank does in the base and in each variant on one ruler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from sim.errors import UserError
from sim.report.chrome import Event, check_name, encode_events, trace_events, write_content
from sim.timeline import Timeline

Named = tuple[str, Timeline]

# Beyond every number that one timeline's file uses: processes (device numbers and host processes), arrows and
# correlations (places in the list of spans).
_PROCESSES = 1_000_000
_ARROWS = 1_000_000_000


def write_side_by_side(timelines: Sequence[Named], path: Path) -> None:
    """Write the timelines into one ``.json`` or ``.json.gz`` file; the same timelines give the same bytes.

    InputError where the name ends otherwise or the file cannot be written, UserError where there is no timeline.
    """
    check_name(path)
    write_content(encode_side_by_side(timelines), path)


def encode_side_by_side(timelines: Sequence[Named]) -> bytes:
    """The file's JSON; what it says of itself is of the first timeline."""
    if not timelines:
        raise UserError("no timeline to write side by side")
    head, _ = trace_events(timelines[0][1])
    return encode_events(head, _events(timelines))


def _events(timelines: Sequence[Named]) -> Iterator[Event]:
    for place, (name, timeline) in enumerate(timelines):
        _, events = trace_events(timeline)
        for event in events:
            if isinstance(event["pid"], int):
                yield _moved(event, name, place, len(timelines))
            elif place == 0:  # the extent of the recording, which a file has once
                yield event


def _moved(event: Event, name: str, place: int, count: int) -> Event:
    """The event in this timeline's own processes, named after it."""
    moved = {**event, "pid": event["pid"] + place * _PROCESSES}
    args = event.get("args", {})
    if event["name"] == "process_name":
        moved["args"] = {"name": f"{name}: {args['name']}"}
    elif event["name"] == "process_sort_index":
        rank, device = divmod(args["sort_index"], 2)
        moved["args"] = {"sort_index": (rank * count + place) * 2 + device}
    else:
        offsets = {key: args[key] + place * _ARROWS for key in ("correlation", "External id") if key in args}
        if offsets:
            moved["args"] = args | offsets
    if "id" in event:
        moved["id"] = event["id"] + place * _ARROWS
    return moved
