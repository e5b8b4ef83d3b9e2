"""OpGraph: a workload as programs of operations, one program for all ranks that run the same one.

``check()`` states the laws; ``read`` and ``write`` are the round trip to a ``.workload.json.gz`` file.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

import msgspec

from sim.errors import InputError, UserError
from sim.files import compressed, write_whole
from sim.ops import Alloc, Collective, Copy, Free, HostCall, Kernel, Lane, Op, Work

FORMAT = "tracesim.workload/1"


class Program(msgspec.Struct, frozen=True):
    """The operations of one rank, in an order in which every index points backwards."""

    lanes: tuple[Lane, ...]
    ops: tuple[Op, ...]


class RankProgram(msgspec.Struct, frozen=True, omit_defaults=True):
    """Which program a rank runs, and the device it ran on where the graph was captured."""

    rank: int
    program: int
    device: str = ""


class OpGraph(msgspec.Struct, frozen=True, omit_defaults=True):
    """A workload.

    ``groups`` maps a process group's or mesh axis' name to its instances: ``{"tp": ((0, 1), (2, 3))}``; a rank is
    in at most one instance.  ``gpus`` are the topology's GPUs that the ranks go onto where the workload names
    them.  ``warnings`` say what was tolerated or estimated while the graph was made.  ``provenance`` says from
    what it was made: model, command, versions.
    """

    name: str
    programs: tuple[Program, ...]
    ranks: tuple[RankProgram, ...]
    works: tuple[Work, ...] = ()
    groups: dict[str, tuple[tuple[int, ...], ...]] = {}
    gpus: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    provenance: dict[str, str] = {}
    format: str = FORMAT

    def program_of(self, rank: RankProgram) -> Program:
        return self.programs[rank.program]

    def group_of(self, group: str, rank: int) -> tuple[int, ...]:
        """The ranks of the instance of ``group`` that ``rank`` is in."""
        for members in self.groups.get(group, ()):
            if rank in members:
                return members
        raise UserError(f"{self.name}: rank {rank} is in no instance of the process group {group!r}")

    def check(self) -> None:
        """Raise UserError with the first law that does not hold, and where."""
        if not self.ranks:
            raise UserError(f"{self.name}: no ranks")
        if len({r.rank for r in self.ranks}) != len(self.ranks):
            raise UserError(f"{self.name}: a rank is there twice")
        for r in self.ranks:
            if not 0 <= r.program < len(self.programs):
                raise UserError(f"{self.name}: rank {r.rank} runs program {r.program}, which is not there")
        for name, instances in self.groups.items():
            members = [m for instance in instances for m in instance]
            if len(set(members)) != len(members):
                raise UserError(f"{self.name}: process group {name!r} has a rank in two instances")
        for p, program in enumerate(self.programs):
            for i, problem in _problems(program, len(self.works), self.groups):
                raise UserError(f"{self.name}: programs[{p}].ops[{i}]: {problem}")


def _problems(program: Program, works: int, groups: Collection[str]) -> Iterator[tuple[int, str]]:
    live: set[int] = set()
    for i, op in enumerate(program.ops):
        if not 0 <= op.lane < len(program.lanes):
            yield i, f"lane {op.lane} is not there"
            continue
        for ref in _references(op):
            if not 0 <= ref < i:
                yield i, f"refers to operation {ref}, which does not come before it"
        if _negative(op):
            yield i, "has a negative duration or size"
        lane = program.lanes[op.lane].kind
        if not isinstance(op, Collective) and (lane == "stream") != isinstance(op, Kernel | Copy):
            yield i, f"{type(op).__name__} on a {lane}"
        if isinstance(op, Kernel | HostCall) and op.work is not None and not 0 <= op.work < works:
            yield i, f"work {op.work} is not there"
        if isinstance(op, Collective) and op.group not in groups:
            yield i, f"process group {op.group!r} is not there"
        yield from ((i, problem) for problem in _block_problems(op, live))


def _block_problems(op: Op, live: set[int]) -> Iterator[str]:
    if isinstance(op, Alloc):
        if op.block in live:
            yield f"block {op.block} is allocated twice"
        live.add(op.block)
    elif isinstance(op, Free):
        if op.block not in live:
            yield f"block {op.block} is freed but not allocated"
        live.discard(op.block)


def _references(op: Op) -> Iterator[int]:
    yield from op.after
    if isinstance(op, HostCall):
        yield from op.waits
    if isinstance(op, Kernel | Copy | Collective) and op.launch is not None:
        yield op.launch


def _negative(op: Op) -> bool:
    if isinstance(op, Kernel | Copy | Collective):
        times = (op.measured_ns or 0, op.gap_ns or 0, 0 if isinstance(op, Kernel) else op.bytes)
    elif isinstance(op, HostCall):
        times = (op.before_ns, op.measured_ns or 0, 0)
    else:
        times = (op.before_ns, op.bytes if isinstance(op, Alloc) else 0, 0)
    return min(times) < 0


def write(graph: OpGraph, path: Path) -> None:
    """Write a ``.workload.json.gz`` file, whole or not at all; the same graph gives the same bytes."""
    write_whole(path, compressed(msgspec.json.encode(graph)))


def read(path: Path) -> OpGraph:
    """Read a workload file; InputError where it is not one or breaks a law."""
    try:
        raw = gzip.decompress(path.read_bytes())
        graph = msgspec.json.decode(raw, type=OpGraph)
    except FileNotFoundError:
        raise InputError(path, "no such file; make one with `tracesim synth MODEL ... --out FILE`") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(path, f"not a whole gzip file ({error}); make it again with `tracesim synth`") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(path, f"not a workload file ({error}); make it again with `tracesim synth`") from None
    if graph.format != FORMAT:
        raise InputError(path, f"format {graph.format!r}; this version reads {FORMAT!r}: synthesize it again")
    try:
        graph.check()
    except UserError as error:
        raise InputError(path, str(error)) from None
    return graph
