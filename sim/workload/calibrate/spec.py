"""What to measure: sections and grids of sizes; checked before torch is loaded."""

from __future__ import annotations

from pathlib import Path

import msgspec

from sim.errors import UnknownNameError, UserError
from sim.files import check_can_appear
from sim.measurements import SECTIONS
from sim.units import GIB, KIB, MIB

Product = tuple[int, int, int, int]
Pair = tuple[int, int]


class Grid(msgspec.Struct, frozen=True):
    """Sizes of every section, and how long a point may take.

    ``squares``: sides; ``layers``: (m, n, k) of a linear layer on m tokens; ``batched``: (batch, m, n, k);
    ``streams``: elements; ``rows``: (rows, columns); ``attention``: (heads of all sequences, length, head size);
    ``copies`` and ``collectives``: bytes.  ``point_ms``: repeats are taken until they lasted so long (three at
    least); ``longest_ms``: a call that is expected to take longer is left out.
    """

    squares: tuple[int, ...]
    layers: tuple[tuple[int, int, int], ...]
    batched: tuple[Product, ...]
    streams: tuple[int, ...]
    rows: tuple[Pair, ...]
    attention: tuple[tuple[int, int, int], ...]
    copies: tuple[int, ...]
    collectives: tuple[int, ...]
    point_ms: float
    longest_ms: float


def _layers(tokens: tuple[int, ...], weights: tuple[Pair, ...]) -> tuple[tuple[int, int, int], ...]:
    return tuple((m, n, k) for m in tokens for n, k in weights)


def _doubling(first: int, last: int, factor: int = 2) -> tuple[int, ...]:
    sizes = [first]
    while sizes[-1] * factor <= last:
        sizes.append(sizes[-1] * factor)
    return tuple(sizes)


def _odd(count: int) -> tuple[tuple[int, int, int], ...]:
    """Shapes as no designer chooses them, spread evenly over m to 2,048 and n and k from 64 to 4,096 (Halton)."""
    return tuple(
        (int(2 ** (11 * _halton(i, 2))), int(2 ** (6 + 6 * _halton(i, 3))), int(2 ** (6 + 6 * _halton(i, 5))))
        for i in range(1, count + 1)
    )


def _halton(i: int, base: int) -> float:
    value, share = 0.0, 1.0
    while i:
        share /= base
        value += share * (i % base)
        i //= base
    return value


# Weights [out, in] of layers from 0.1 to 7 billion parameters, a vocabulary, and sides that are no multiple of 8.
_WEIGHTS = (
    (768, 768), (2304, 768), (3072, 768), (768, 3072), (4096, 4096), (11008, 4096), (4096, 11008), (32000, 1024),
    (1365, 1023),
)  # fmt: skip
_FULL = Grid(
    squares=(16, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384),
    layers=(*_layers((1, 8, 32, 128, 512, 2048, 8192), _WEIGHTS), *_odd(30)),
    batched=tuple(
        (batch, m, n, k)
        for batch in (12, 96, 384)
        for m, n, k in ((64, 64, 64), (128, 128, 64), (512, 512, 64), (512, 64, 512), (1024, 1024, 128))
    ),
    streams=(*_doubling(16, 4 * MIB, 4), 6 * MIB, 16 * MIB, 64 * MIB, 256 * MIB),
    rows=tuple((rows, columns) for rows in (1, 64, 512, 2048, 8192, 32768) for columns in (64, 768, 1024, 4096, 32000)),
    attention=tuple(
        (heads, length, size)
        for heads in (12, 64)
        for length in (64, 128, 256, 512, 1024, 2048, 4096)
        for size in (64, 128)
    ),
    copies=(*_doubling(4 * KIB, 16 * MIB, 4), 28 * MIB, 64 * MIB, 256 * MIB, GIB),
    collectives=_doubling(256, GIB),
    point_ms=40,
    longest_ms=400,
)
_QUICK = Grid(
    squares=(16, 128, 256, 512, 1024, 2048, 4096, 8192),
    layers=(*_layers((1, 32, 256, 2048), ((768, 768), (3072, 768), (4096, 4096), (1365, 1023))), *_odd(15)),
    batched=((12, 64, 64, 64), (96, 512, 512, 64), (96, 512, 64, 512)),
    streams=_doubling(16, 64 * MIB, 8),
    rows=tuple((rows, columns) for rows in (1, 512, 4096, 32768) for columns in (64, 768, 4096)),
    attention=((12, 128, 64), (12, 512, 64), (48, 1024, 64), (48, 1024, 128)),
    copies=_doubling(4 * KIB, 256 * MIB, 16),
    collectives=_doubling(256, 64 * MIB, 4),
    point_ms=20,
    longest_ms=100,
)
_TINY = Grid(  # for tests: every section, in seconds
    squares=(16, 64, 128, 256),
    layers=(*_layers((1, 32), ((96, 64), (256, 256))), *_odd(6)),
    batched=((4, 32, 32, 16), (8, 64, 64, 32)),
    streams=_doubling(16, MIB, 8),
    rows=((1, 64), (64, 64), (64, 256), (512, 256), (1024, 512)),
    attention=((4, 64, 32), (4, 128, 32)),
    copies=_doubling(4 * KIB, 4 * MIB, 8),
    collectives=(256, 16 * KIB, MIB),
    point_ms=2,
    longest_ms=50,
)
GRIDS = {"full": _FULL, "quick": _QUICK, "tiny": _TINY}


class CalibrateSpec(msgspec.Struct, frozen=True):
    """``sections`` by name, in the order they are measured; ``threads`` of a CPU, as many as PyTorch takes where None;
    ``command`` is told in the profile."""

    sections: tuple[str, ...]
    grid: Grid = _FULL
    threads: int | None = None
    command: tuple[str, ...] = ()


def sections_of(only: str | None, links: bool) -> tuple[str, ...]:
    """The sections that ``--only A,B`` and ``--links`` choose.  UnknownNameError for a name that is none."""
    if only is None:
        return tuple(name for name in SECTIONS if name != "links" or links)
    wanted = [name.strip() for name in only.split(",")]
    for name in wanted:
        if name not in SECTIONS:
            raise UnknownNameError("section", name, SECTIONS, "--only takes names with commas")
    if links:
        wanted.append("links")
    return tuple(name for name in SECTIONS if name in wanted)


def partial_file(out: Path) -> Path:
    """Where the samples of an unfinished run are kept: beside its result."""
    return out.with_name(f"{out.name}.partial.jsonl")


def check_out(out: Path) -> None:
    """UserError where the name would not be read as a profile."""
    if not out.name.endswith(".yaml") or out.name == ".yaml":
        raise UserError(f"--out {out}: the name of a device profile ends in .yaml")
    check_can_appear(out)
