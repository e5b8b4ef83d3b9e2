"""A device's calibration, fitted to measurements of it: the same formulas that price kernels, with the numbers that
come nearest.

A sample holds, besides its kernel, the stream's turn-around (GPU) or the call around it (CPU); both were measured and
are taken off first.  The numbers are fitted to all samples.  How far off they are is seen by cross-validation: five
more fits, each without a fifth of the sizes, and that fifth predicted by it; between which of these ratios one more
lies with 80 % probability is the profile's spread.  A layer's weight is left out with all numbers of tokens together,
so that a fit is judged by what it has seen nothing like.  What cannot be seen in the samples is lent by shipped
devices, as for every profile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from sim.measurements import Measurements, Sample
from sim.place.calibration.descent import HELD_OUT, Floats, descend, errors, folds, holding, with_block
from sim.place.kernels.gemm import products, products_us
from sim.place.kernels.memory import BESIDE, beside, element_us, floor_us, l2_bytes, memory_us, op_us
from sim.place.kernels.rows import RowOp, rows_us
from sim.topology.abilities import Abilities, family, resolve, shipped_lenders
from sim.topology.calibration import Calibration
from sim.topology.device import DeviceProfile

Block = dict[str, Any]
ROW_OPS: tuple[RowOp, ...] = ("softmax", "layer_norm")
FITTED_STREAMS = ("add", "mulu", "relu")  # which compute next to nothing, so bytes alone decide
LEAST_POINTS = 5
SHARE = 0.8  # of what the spread holds
LEAST_JUDGED = 10  # samples of a kind that say something about its tenth
LEAST_ELEMENTS, TINY_ELEMENTS = 4096, 256  # fewer show the call; no more show nothing else
TENSORS = {"add": 3}

# What libraries compute products in: tiles of CUTLASS's usual sizes; for the lanes of an SM smaller
# ones too.
TENSOR_TILES = (
    (128, 256), (256, 128), (128, 128), (256, 64), (64, 256), (128, 64), (64, 128), (64, 64), (128, 32), (64, 32),
)  # fmt: skip
LANE_TILES = ((128, 128), (128, 64), (64, 128), (64, 64), (128, 32), (32, 128), (64, 32), (32, 32))
CPU_TILES = ((1, 1),)  # not used: see sim/place/kernels/gemm.py, _by_cores_us
GEMM_START = {
    "efficiency": 0.9, "operand_elements": 8.0, "prologue_k": 10.0, "tail": 0.1, "split_us": 5.0, "fixed_us": 1.0,
    "memory_efficiency": 0.85, "overlap": 4.0, "unaligned_efficiency": 0.9,
}  # fmt: skip
GEMM_LIMITS = {
    "efficiency": (0.05, 1.0), "operand_elements": (0.2, 60.0), "prologue_k": (0.2, 200.0), "tail": (0.01, 1.0),
    "split_us": (0.2, 60.0), "fixed_us": (0.05, 30.0), "memory_efficiency": (0.05, 1.0), "overlap": (1.0, 12.0),
    "unaligned_efficiency": (0.3, 1.0),
}  # fmt: skip
_NO_TILES = {"tail": 0.0, "split_us": 0.0}  # a CPU's cores share one tile
CPU_GEMM_START = GEMM_START | _NO_TILES | {"store_exposed": 0.3}
CPU_GEMM_LIMITS = {key: limit for key, limit in GEMM_LIMITS.items() if key not in _NO_TILES}
CPU_GEMM_LIMITS |= {"store_exposed": (0.01, 1.0)}
ROWS_START = {"setup_us": 1.2, "pass_us": 0.3, "miss_from": 0.7, "miss_span": 0.7, "overlap": 2.5}
ROWS_LIMITS = {
    "setup_us": (0.001, 20.0), "pass_us": (1e-5, 10.0), "miss_from": (0.2, 4.0), "miss_span": (0.2, 4.0),
    "overlap": (1.0, 8.0),
}  # fmt: skip
# FlashAttention-2's abstract: memory-efficient attention takes 1.7 times as long (docs/kernels.md, "Attention").
EFFICIENT_SLOWER = 1.7


class Judged(NamedTuple):
    """One class of ops: measured over predicted of each sample by a fit that had not seen it."""

    name: str
    ratio: Floats


class Fitted(NamedTuple):
    """A calibration as plain data, and how near it comes."""

    block: Block
    judged: tuple[Judged, ...]


class _Class(NamedTuple):
    """Samples of one class of ops, net; which of them this fit does not see; and what the model says about them."""

    name: str
    us: Floats
    held: NDArray[np.bool_]
    predict: Callable[[Abilities, Any], Floats]
    odd: NDArray[np.bool_] | None = None
    """Of a product: whether a side is no multiple of 8, for which libraries have worse kernels."""

    def loss(self, abilities: Abilities) -> float:
        fitted = ~self.held
        return float(errors(self.predict(abilities, fitted), self.us[fitted]).mean())


def fit(profile: DeviceProfile, taken: Measurements, source: str) -> Fitted:
    """The calibration of ``profile``, which has its data sheet, launch times and measured curves already."""
    bare = profile.model_copy(update={"calibration": Calibration()})
    whole = _Fit(bare, taken, source)
    lent = resolve(bare, whole.lenders)
    parts = [_Fit(bare, taken, source, fold) for fold in range(HELD_OUT)]
    judged = []
    for one in whole.classes:
        ratios = [np.concatenate(of_kind) for of_kind in zip(*(part.unseen(one.name) for part in parts), strict=True)]
        ratio = np.concatenate(ratios)
        if not len(ratio):
            continue
        judged.append(Judged(one.name, ratio))
        ends = (*_holding_each(ratios), *np.quantile(one.us / one.predict(lent, ~one.held), [0.1, 0.9]))
        names = ("p10", "p90", "borrowed_p10", "borrowed_p90")
        whole.block.setdefault("spread", {})[one.name] = {
            name: float(f"{end:.3g}") for name, end in zip(names, ends, strict=True)
        }
    return Fitted(whole.block, tuple(judged))


def _holding_each(ratios: Sequence[Floats]) -> tuple[float, float]:
    """What holds so many of each kind: which kinds somebody asks for is not known."""
    ends = [holding(ratio, SHARE) for ratio in ratios if len(ratio) >= LEAST_JUDGED] or [
        holding(np.concatenate(ratios), SHARE)
    ]
    return min(low for low, _ in ends), max(high for _, high in ends)


class _Fit:
    """The fit of all classes to all samples, or without the fifth ``fold`` of each class's sizes."""

    def __init__(self, profile: DeviceProfile, taken: Measurements, source: str, fold: int | None = None) -> None:
        self.bare = profile
        self.fold = fold
        self.taken = taken
        self.source = source
        self.cpu = profile.kind == "cpu"
        self.lenders = shipped_lenders()
        self.block: Block = {}
        self.tries = 0
        self.classes: list[_Class] = []
        self._call()
        self._memory()
        for op in ROW_OPS:
            self._rows(op)
        for dtype in self.taken.whats("gemm"):
            self._products(dtype)
        self._attention()

    def unseen(self, name: str) -> tuple[Floats, Floats]:
        """Measured over predicted of the samples of a class that this fit was not shown; of odd sizes apart."""
        one = next(each for each in self.classes if each.name == name)
        ratio = np.asarray(one.us[one.held] / one.predict(self._able(), one.held))
        odd = np.zeros(len(ratio), dtype=np.bool_) if one.odd is None else one.odd[one.held]
        return ratio[~odd], ratio[odd]

    def _held(self, groups: Sequence[tuple[object, ...]]) -> NDArray[np.bool_]:
        if self.fold is None:
            return np.zeros(len(groups), dtype=np.bool_)
        return np.asarray(folds(groups) == self.fold)

    def _able(self, **tried: Any) -> Abilities:
        profile = with_block(self.bare, **{**self.block, **tried})
        self.tries += 1
        # A source of its own: what is kept for a profile is found by name and source, and compared whole after that.
        return resolve(profile.model_copy(update={"source": f"try {self.tries}"}), self.lenders)

    def _said(self, what: str, samples: int) -> dict[str, str]:
        return {"source": self.source, "data": f"{what}: {samples} samples"}

    def _net(self, samples: Iterable[Sample], call: float = 0.0) -> Floats:
        """Without what a sample holds besides its kernel; never less than half of the shortest kernel."""
        launch = self.bare.launch
        gap = (launch.kernel_gap_us or 0.0) if launch is not None else 0.0
        us = np.array([sample.us for sample in samples]) - (call if self.cpu else gap)
        return np.asarray(np.maximum(us, 0.5 * floor_us(self.bare)))

    # The host's part of a call ----------------------------------------

    def _call(self) -> None:
        calls = {op: self.taken.us("host", f"call {op}") for op in ("elementwise", *ROW_OPS, "linear", "bmm")}
        if None in calls.values():
            return
        if self.cpu:  # what a call of a product takes is part of its samples, and so of fixed_us
            calls |= {"linear": 0.0, "bmm": 0.0}
        floor = floor_us(self.bare)
        numbers = {op: float(f"{max(cast(float, us) - floor, 0.0):.3g}") for op, us in calls.items()}
        self.block["call"] = {
            "source": self.source,
            "data": "one call of 8 x 8 elements, less kernel_floor_us",
            **numbers,
        }

    def _call_us(self, op: str) -> float:
        return float(self.block["call"][op]) if "call" in self.block else 0.0

    # Bytes ----------------------------------------

    def _memory(self) -> None:
        samples = self.taken.of("elementwise")
        fitted = [s for s in samples if s.what in FITTED_STREAMS]
        if len(fitted) < LEAST_POINTS:
            return
        streams, calls = self._streams(fitted), self._op_us(samples)
        start = {"efficiency": 0.85, "cache_speedup": 2.5}

        def loss(values: dict[str, float]) -> float:
            return streams.loss(self._able(memory={"source": "x", "data": "x", "op_us": calls, **values}))

        found = descend(start, loss, {"efficiency": (0.02, 1.0), "cache_speedup": (1.0, 30.0)})
        self.block["memory"] = {**self._said("add, mul and relu of float32", len(fitted)), **found}
        if calls:
            self.block["memory"]["op_us"] = calls
        computing = self._element_ns(samples)
        if computing:
            self.block["memory"]["element_ns"] = computing
        self.classes.append(self._streams(samples))

    def _op_us(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Of a CPU: what the shortest calls of an op take beyond the shortest of all: the median over tiny sizes."""
        found: dict[str, float] = {}
        for op in sorted({s.what for s in samples}) if self.cpu else ():
            tiny = [s for s in self._shown(samples, op) if s.sizes[1] <= TINY_ELEMENTS]
            us = self._net(tiny, self._call_us("elementwise")) - floor_us(self.bare)
            beyond = float(np.median(us)) if tiny else 0.0
            if beyond > 0:
                found[op] = float(f"{beyond:.3g}")
        return found

    def _shown(self, samples: Sequence[Sample], op: str) -> list[Sample]:
        """The samples of an op that this fit sees."""
        shown = zip(samples, ~self._held([s.sizes for s in samples]), strict=True)
        return [s for s, take in shown if take and s.what == op]

    def _element_ns(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Of a CPU: what ops that compute take beside their bytes: the median over sizes that the cache holds."""
        able, found = self._able(), {}
        for op in sorted({s.what for s in samples} - set(FITTED_STREAMS)) if self.cpu else ():
            cached = l2_bytes(self.bare)
            seen = [s for s in self._shown(samples, op) if LEAST_ELEMENTS <= s.sizes[1] <= cached / 8]
            elements = np.array([float(s.sizes[1]) for s in seen])
            us = self._net(seen, self._call_us("elementwise")) - floor_us(self.bare) - op_us(op, able)
            us = np.maximum(us, 0.0)
            moving = memory_us(8.0 * elements, able) - floor_us(self.bare)
            working = np.maximum(us**BESIDE - moving**BESIDE, 0.0) ** (1.0 / BESIDE)
            ns = float(np.median(1e3 * working * self.bare.sms / elements)) if seen else 0.0
            if ns > 0:
                found[op] = float(f"{ns:.3g}")
        return found

    def _streams(self, samples: Sequence[Sample]) -> _Class:
        nbytes = np.array([4.0 * s.sizes[0] * s.sizes[1] * TENSORS.get(s.what, 2) for s in samples])
        held = self._held([s.sizes for s in samples])
        us = self._net(samples, self._call_us("elementwise"))
        elements = np.array([float(s.sizes[1]) for s in samples])
        floor = floor_us(self.bare)

        def predicted(able: Abilities, part: Any) -> Floats:
            chosen = [s.what for s, take in zip(samples, part, strict=True) if take]
            computing = np.array([element_us(op, n, able) for op, n in zip(chosen, elements[part], strict=True)])
            calls = np.array([op_us(op, able) for op in chosen])
            return floor + calls + beside(np.maximum(memory_us(nbytes[part], able) - floor, 0.0), computing)

        return _Class("elementwise", us, held, predicted)

    def _rows(self, op: RowOp) -> None:
        samples = self.taken.of(op)
        if len(samples) < LEAST_POINTS:
            return
        rows, columns = (np.array([float(s.sizes[i]) for s in samples]) for i in (0, 1))
        held = self._held([s.sizes for s in samples])
        us = self._net(samples, self._call_us(op))
        kernels = _Class(op, us, held, lambda able, part: rows_us(op, rows[part], columns[part], 4, able))

        def loss(values: dict[str, float]) -> float:
            return kernels.loss(
                self._able(rows={**self.block.get("rows", {}), op: {"source": "x", "data": "x", **values}})
            )

        start = ROWS_START | ({"setup_us": 0.05, "pass_us": 0.001} if self.cpu else {})
        found = descend(start, loss, ROWS_LIMITS)
        self.block.setdefault("rows", {})[op] = {**self._said(f"{op} of float32", len(samples)), **found}
        self.classes.append(kernels)

    # Products ----------------------------------------

    def _products(self, dtype: str) -> None:
        """Dtypes of one family share their numbers: those of float16 where it was measured, else of its first."""
        samples = self.taken.of("gemm", dtype)
        name = family(dtype)
        shadowed = any(family(other) == name and other == "float16" for other in self.taken.whats("gemm"))
        if len(samples) < LEAST_POINTS or name in self.block.get("gemm", {}) or (shadowed and dtype != "float16"):
            return
        tiles = CPU_TILES if self.cpu else LANE_TILES if name == "float32" else TENSOR_TILES
        fixed = {"tiles": [list(t) for t in tiles], "splits": [1] if self.cpu else [1, 2, 4, 8]}
        start, limits = (CPU_GEMM_START, CPU_GEMM_LIMITS) if self.cpu else (GEMM_START, GEMM_LIMITS)
        kernels = self._product_class(f"gemm_{name}", dtype, samples)

        def loss(values: dict[str, float]) -> float:
            block = {name: {"source": "x", "data": "x", **fixed, **values}}
            return kernels.loss(self._able(gemm={**self.block.get("gemm", {}), **block}))

        found = descend(start, loss, limits)
        block = {**self._said(f"products of {dtype}", len(samples)), **found, **fixed}
        self.block.setdefault("gemm", {})[name] = block
        self.classes.append(kernels)

    def _product_class(self, name: str, dtype: str, samples: Sequence[Sample]) -> _Class:
        """A square lies on the profile's curve, so no square is judged."""
        batch, m, n, k = (np.array([float(s.sizes[i]) for s in samples]) for i in range(4))
        square = (batch == 1) & (m == n) & (n == k)
        groups = [s.sizes[2:] if s.sizes[0] == 1 else s.sizes for s in samples]  # a weight with any number of tokens
        held = self._held(groups) & ~square
        odd = (m % 8 != 0) & (m > 1) | (n % 8 != 0) | (k % 8 != 0)
        shapes = products(batch, m, n, k, dtype)
        return _Class(
            name, self._net(samples), held, lambda able, part: products_us(shapes.part(part), dtype, able).us, odd
        )

    # Attention ----------------------------------------

    def _attention(self) -> None:
        """The share of the products' rate at which fused attention runs: the median over lengths of 256 and more."""
        shares = {what: self._share(what) for what in ("flash", "flash_backward", "efficient", "efficient_backward")}
        if shares["flash"] is None or shares["flash_backward"] is None:
            return
        told = self._said("attention: median share of the data sheet's rate", len(self.taken.of("attention")))
        for what in ("efficient", "efficient_backward"):
            if shares[what] is None:  # a CPU has one fused kernel, whatever is asked for
                flash = cast(float, shares[what.replace("efficient", "flash")])
                shares[what] = flash if self.cpu else flash / EFFICIENT_SLOWER
                if not self.cpu:
                    told["data"] += f"; {what}: not measured, {EFFICIENT_SLOWER} times slower than flash as published"
        self.block["attention"] = {**told, **{k: float(f"{cast(float, v):.3g}") for k, v in shares.items()}}

    def _share(self, what: str) -> float | None:
        samples = [s for s in self.taken.of("attention") if s.what.split()[0] == what]
        long = [s for s in samples if s.sizes[1] >= 256] or samples
        if not long:
            return None
        dtype = long[0].what.split()[1]
        tflops = self.bare.tflops.get(dtype) or self.bare.tflops["float32"]
        flops = np.array([(10.0 if "backward" in what else 4.0) * np.prod([float(n) for n in s.sizes]) for s in long])
        share = float(np.median(flops / self._net(long) / (tflops * 1e6)))
        return min(share, 1.0)
