"""Timelines made by hand (times in milliseconds) and at random, for the tests of what is told."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import strategies as st

from sim.ops import CollectiveKind
from sim.timeline import (
    CollectiveInfo,
    DurationSource,
    MemoryPeak,
    MemorySample,
    OutOfMemory,
    RankInfo,
    Span,
    SpanKind,
    Step,
    Timeline,
    Track,
)

MS = 1_000_000
GIB = 1 << 30


class Sketch:
    """Collects spans; every rank has a thread (number 100 + rank) and the streams 7 and 20."""

    def __init__(self, ranks: int = 1, devices: str = "gpu") -> None:
        self.ranks = tuple(
            RankInfo(rank=r, device=f"{devices}{r}", device_name="NVIDIA RTX A5000", memory_bytes=24 * GIB)
            for r in range(ranks)
        )
        self.tracks = tuple(
            track
            for r in range(ranks)
            for track in (
                Track(rank=r, kind="thread", id=100 + r, name="main"),
                Track(rank=r, kind="stream", id=7, name=""),
                Track(rank=r, kind="stream", id=20, name="nccl"),
            )
        )
        self.spans: list[Span] = []
        self.steps: list[Step] = []

    def call(self, rank: int, start: float, end: float, name: str = "cudaLaunchKernel", thread: int = 0) -> int:
        """A host call; returns its index."""
        self.spans.append(_span(3 * rank + thread, name, "host", start, end))
        return len(self.spans) - 1

    def work(
        self,
        rank: int,
        start: float,
        end: float,
        name: str,
        kind: SpanKind = "compute",
        *,
        launch: int = -1,
        source: DurationSource = "measured",
        collective: CollectiveInfo | None = None,
        transfer: float = 0,
    ) -> None:
        track = 3 * rank + (2 if kind == "communication" else 1)
        self.spans.append(
            _span(track, name, kind, start, end, launch=launch, source=source, collective=collective, transfer=transfer)
        )

    def step(self, rank: int, index: int, start: float, end: float) -> None:
        self.steps.append(
            Step(rank=rank, index=index, name=f"ProfilerStep#{index}", start_ns=_ns(start), end_ns=_ns(end))
        )

    def timeline(self, **more: object) -> Timeline:
        fields = {
            "name": "by hand", "origin": "predicted", "ranks": self.ranks, "tracks": self.tracks,
            "spans": tuple(self.spans), "steps": tuple(self.steps),
        } | more  # fmt: skip
        return Timeline(**fields)


def _ns(ms: float) -> int:
    return round(ms * MS)


def _span(
    track: int, name: str, kind: SpanKind, start: float, end: float, *, launch: int = -1,
    source: DurationSource = "measured", collective: CollectiveInfo | None = None, transfer: float = 0,
) -> Span:  # fmt: skip
    return Span(
        track=track, op=0, name=name, kind=kind, start_ns=_ns(start), duration_ns=_ns(end) - _ns(start), source=source,
        launch=launch, transfer_ns=_ns(transfer), collective=collective,
    )  # fmt: skip


def collective(kind: CollectiveKind = "all_reduce", nbytes: int = 1 << 20, seq: int = 0) -> CollectiveInfo:
    return CollectiveInfo(
        kind=kind, bytes=nbytes, ranks=2, algorithm="ring", protocol="simple", group="dp", seq=seq
    )  # fmt: skip


def two_ranks() -> Timeline:
    """Two ranks, two steps; the device runs behind the host.

    ms        0         5         10        15        20        25
    rank 0    |ProfilerStep#3     |ProfilerStep#4             |
      s7       gemmm.              .gelmm|gemmmmmmmmmm         .relu      ([5,6) Memcpy, [6,7) old)
      s20          ar...
    rank 1    |ProfilerStep#3         |ProfilerStep#4     |
    """
    s = Sketch(2)

    def all_reduce(rank: int, start: int, end: int) -> None:
        launch, told = s.call(rank, 1, 2, "c10d::allreduce_"), collective()
        name = "ncclDevKernel_AllReduce"
        s.work(rank, start, end, name, "communication", launch=launch, source="roofline", collective=told, transfer=2)

    s.step(0, 3, 0, 10)
    s.step(0, 4, 10, 24)
    s.step(1, 3, 0, 12)
    s.step(1, 4, 12, 22)
    s.work(0, 1, 5, "gemm", launch=s.call(0, 0, 1))
    all_reduce(0, 3, 8)
    s.work(0, 5, 6, "Memcpy DtoD (Device -> Device)", "memcpy", launch=s.call(0, 2, 3, "cudaMemcpyAsync"))
    s.work(0, 6, 7, "old")  # launched before the recording began
    s.work(0, 11, 13, "gelu", launch=s.call(0, 9, 10, "aten::gelu"), source="estimate")
    s.work(0, 13, 20, "gemm", launch=s.call(0, 10, 11), source="profile")
    s.work(0, 25, 26, "relu", launch=s.call(0, 20, 21))  # runs when the last step is over
    s.work(1, 2, 6, "gemm", launch=s.call(1, 0, 1))
    all_reduce(1, 4, 8)
    s.work(1, 8, 9, "Memset (Device)", "memset", launch=s.call(1, 2, 3, "cudaMemsetAsync"))
    s.work(1, 14, 16, "gemm", launch=s.call(1, 12, 13), source="profile")
    memory = (
        MemorySample(0, _ns(0.5), 2 * GIB, 4 * GIB),
        MemorySample(0, _ns(4), 5 * GIB, 6 * GIB),
        MemorySample(0, _ns(9), 1 * GIB, 6 * GIB),
        MemorySample(1, _ns(1), 3 * GIB, 4 * GIB),
    )
    peaks = (
        MemoryPeak(0, _ns(4), 5 * GIB, 6 * GIB, "aten::mm", {"parameter": 1 * GIB, "activation": 4 * GIB}),
    )  # fmt: skip
    return s.timeline(memory=memory, peaks=peaks, warnings=("1 op has no formula",))


def two_ranks_measured() -> Timeline:
    """The same job as a trace would have it: steps of 11 (rank 1: 10) and 16 (rank 1: 15) ms, nothing else."""
    s = Sketch(2)
    s.step(0, 3, 0, 11)
    s.step(0, 4, 11, 27)
    s.step(1, 3, 0, 10)
    s.step(1, 4, 10, 25)
    return s.timeline(origin="measured", warnings=("1 op has no formula", "a launch is missing"))


def out_of_memory() -> Timeline:
    """One rank that stops in its first step: 23 GiB reserved of 24, and 3 GiB more asked for."""
    s = Sketch(1)
    s.work(0, 1, 5, "gemm", launch=s.call(0, 0, 1))
    event = OutOfMemory(0, _ns(5), "aten::mm", 3 * GIB, 22 * GIB, 23 * GIB, 24 * GIB)
    samples = (MemorySample(0, _ns(0.5), 22 * GIB, 23 * GIB),)
    return s.timeline(out_of_memory=(event,), memory=samples)


@st.composite
def random_timelines(draw: st.DrawFn, ranks: int = 2) -> Timeline:
    """Legal predicted timelines: on every lane spans follow one another, some without a gap, some empty."""
    info = tuple(RankInfo(rank=r, device=f"gpu{r}", memory_bytes=GIB) for r in range(ranks))
    tracks: list[Track] = []
    spans: list[Span] = []
    steps: list[Step] = []
    for rank in range(ranks):
        edges = sorted(draw(st.lists(st.integers(0, 5000), min_size=2, max_size=4)))
        steps += [Step(rank, i, f"ProfilerStep#{i}", a, b) for i, (a, b) in enumerate(pairwise(edges))]
        calls: list[int] = []
        for lane in range(3):
            tracks.append(Track(rank, "stream" if lane else "thread", 7 + lane, ""))
            time = 0
            for gap, duration in draw(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 900)), max_size=6)):
                time += gap
                if lane == 0:
                    calls.append(len(spans))
                    spans.append(Span(len(tracks) - 1, 0, draw(_HOST_NAMES), "host", time, duration))
                else:
                    kind = draw(_DEVICE_KINDS)
                    launch = draw(st.sampled_from([-1, *calls]))
                    info_or_none = collective() if kind == "communication" else None
                    spans.append(
                        Span(
                            len(tracks) - 1, 0, f"k{lane}", kind, time, duration, launch=launch,
                            collective=info_or_none,
                        )
                    )  # fmt: skip
                time += duration
    return Timeline("random", "predicted", info, tuple(tracks), tuple(spans), tuple(steps))


_HOST_NAMES = st.sampled_from(["cudaLaunchKernel", "aten::mm", "cuLaunchKernel"])
_DEVICE_KINDS: st.SearchStrategy[SpanKind] = st.sampled_from(["compute", "communication", "memcpy", "memset"])
