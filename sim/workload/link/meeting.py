"""What a rank knows of a collective: what it moves, and the place where it meets the other ranks."""

from __future__ import annotations

from dataclasses import dataclass

from sim.ops import CollectiveKind

# The process group of all ranks, where a trace names none.
WORLD = "world"


@dataclass(frozen=True)
class Meeting:
    """One collective of one rank; ``seq`` counts those of the group, ``recorded_seq`` is what the trace itself says."""

    kind: CollectiveKind
    bytes: int
    dtype: str
    group: str
    seq: int
    members: tuple[int, ...]
    peer: int | None = None
    recorded_seq: int | None = None
