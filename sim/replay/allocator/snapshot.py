"""A recorded memory history replayed through the simulated allocator, every address and segment compared.

What the driver decides is taken from the recording: the base address of a new segment, and when it has no
more memory.  So is what other streams decide: when a block they used is free.  Everything else is predicted:
which block serves a request and at which address, when memory is asked of the device and how much, which
cached segments are given back and in which order.

Where the history is not complete, the state at its start is worked out backwards
(:mod:`sim.replay.allocator.history`).  Where that cannot be done, or does not hold, only memory that the
history itself shows being taken from the device is checked, and the rest is counted as not predictable.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sim.replay.allocator.comparison import Mismatch, SnapshotReplay, best_of, together
from sim.replay.allocator.history import History, read_history, start_state
from sim.replay.allocator.ordering import ORDERINGS, Ordering
from sim.replay.allocator.recording import DeviceRecording, Recording, read_recording
from sim.replay.allocator.segments import SegmentView
from sim.replay.allocator.stepping import DeviceReplay

__all__ = ["Mismatch", "SnapshotReplay", "replay_device", "replay_recording", "replay_snapshot"]


def replay_snapshot(path: str | Path) -> SnapshotReplay:
    """Read a snapshot pickle and replay it.  Raises :class:`~sim.errors.InputError` for what is no recording."""
    return replay_recording(read_recording(path))


def replay_recording(recording: Recording) -> SnapshotReplay:
    """Replay every device of a recording; the counts are added up."""
    replayed = [replay_device(device, recording) for device in recording.devices if device.events]
    return together(replayed)


def replay_device(recording: DeviceRecording, whole: Recording) -> SnapshotReplay:
    """Replay the history of one device, by the rules of the PyTorch release that explains it.

    A recording does not say which release made it, and of free blocks of one size each takes another
    (:mod:`sim.replay.allocator.ordering`).
    """
    history = read_history(recording, whole.path)
    old_segments = any(view.address not in history.born for view in recording.segments)
    if not old_segments:
        history.refuse_unknown_frees(recording.device, whole.path)
    complete = history.complete and not old_segments
    replays: list[SnapshotReplay] = []
    for start in _starts(recording, history, whole, complete=complete):
        replays += [_replay(recording, history, whole, start, ordering) for ordering in ORDERINGS]
        if any(replay.exact for replay in replays):
            break
    return best_of(replays)


def _starts(
    recording: DeviceRecording, history: History, whole: Recording, *, complete: bool
) -> Iterator[tuple[SegmentView, ...] | None]:
    """What the memory may have been like before the first event; ``None`` at last, which leaves it out."""
    if complete:
        yield ()
        return
    near = start_state(recording, history, whole.config, whole.path)
    if near is not None:
        yield near
        wide = start_state(recording, history, whole.config, whole.path, wide=True)
        if wide is not None and wide != near:
            yield wide
    yield None


def _replay(
    recording: DeviceRecording,
    history: History,
    whole: Recording,
    start: tuple[SegmentView, ...] | None,
    ordering: Ordering,
) -> SnapshotReplay:
    """``start`` is the state before the first event; ``None`` leaves all memory from then out."""
    return DeviceReplay(recording, history, whole, start or (), complete=start is not None, ordering=ordering).run()
