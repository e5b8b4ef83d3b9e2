"""Small programs that tests replay: ranks, lanes and placements in a line."""

from __future__ import annotations

from collections.abc import Sequence

from sim.graph import OpGraph, Program, RankProgram
from sim.ops import Lane, Op
from sim.place.captured import place_as_captured
from sim.replay.replay import replay
from sim.timeline import Span, Timeline

MAIN, STREAM, COMM = 0, 1, 2
LANES = (Lane("thread", 1, "main"), Lane("stream", 7, "compute"), Lane("stream", 20, "nccl"))


def graph_of(*programs: Sequence[Op], groups: dict[str, tuple[tuple[int, ...], ...]] | None = None) -> OpGraph:
    """One rank a program."""
    graph = OpGraph(
        name="test",
        programs=tuple(Program(LANES, tuple(ops)) for ops in programs),
        ranks=tuple(RankProgram(rank, rank) for rank in range(len(programs))),
        groups=groups or {},
    )
    graph.check()
    return graph


def replayed(*programs: Sequence[Op], groups: dict[str, tuple[tuple[int, ...], ...]] | None = None) -> Timeline:
    """The timeline of measured programs, as captured."""
    timeline = replay(place_as_captured(graph_of(*programs, groups=groups)))
    timeline.check()
    return timeline


def span(timeline: Timeline, name: str, rank: int = 0) -> Span:
    """The only span of that name on a rank."""
    found = [s for s in timeline.spans if s.name == name and timeline.tracks[s.track].rank == rank]
    assert len(found) == 1, f"{len(found)} spans named {name} on rank {rank}"
    return found[0]
