"""Fits the kernel models to the microbenchmarks of ../shared and writes the numbers into the device profiles.

    python tools/fit_kernels.py                 fit, report errors on shapes left out and on whole GPUs left out
    python tools/fit_kernels.py --write         the same, and write the `calibration` blocks of topologies/devices/

A fifth of the shapes is left out of every fit: those whose CRC-32 of "batch,m,n,k" (or "rows,columns") is a multiple
of five.  The fit goes down one number after another (coordinate descent) on the mean relative error, and is the same
every time.  docs/kernels.md lists every number with what it was fitted to.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sim.place.calibration.descent import descend, errors, held_out, with_block
from sim.place.kernels.gemm import call_us, products, products_us
from sim.place.kernels.memory import Floats, memory_us
from sim.place.kernels.rows import RowOp, rows_us
from sim.topology.abilities import Abilities, resolve
from sim.topology.calibration import Calibration
from sim.topology.device import DeviceProfile, load_device, shipped_devices
from tools.predictive import by_device, new_device_interval

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("TRACESIM_SHARED", ROOT.parent / "shared"))
NEUSIGHT = "NeuSight, scripts/asplos/data/dataset/test (sitar-lab, MIT), PyTorch 2.1, device events around one call"
VIDUR = "Vidur, data/profiling/compute (microsoft, MIT), medians of profiled kernels"
TORCHCAP = "TorchCAP, configs/a5000_24g_gala1.json, commit c03b753 (MIT), device events"
DEVICES = {
    "NVIDIA A100-PCIE-40GB": "a100-pcie-40gb",
    "NVIDIA L4": "l4",
    "Tesla T4": "t4",
    "Tesla V100-PCIE-32GB": "v100-pcie",
    "A40": "a40",
    "A100": "a100-sxm4-80gb",
}
TWO_INPUTS = ("add", "mul", "div", "pow")
ROW_OPS: dict[str, RowOp] = {"softmax": "softmax", "ln": "layer_norm"}
MOST_POINTS = 900  # of one fit; more points move the numbers by less than they are rounded by


class Gemms(NamedTuple):
    """Measured products of one device: shapes, microseconds, and which of them no fit sees."""

    batch: Floats
    m: Floats
    n: Floats
    k: Floats
    us: Floats
    held: np.ndarray[Any, np.dtype[np.bool_]]
    dtype: str

    def part(self, chosen: Any) -> Gemms:
        return Gemms(*(column[chosen] for column in self[:6]), self.dtype)

    def predicted(self, abilities: Abilities, alone: bool) -> Floats:
        shapes = products(self.batch, self.m, self.n, self.k, self.dtype)
        return products_us(shapes, self.dtype, abilities, alone).us + call_us(shapes, self.dtype, abilities)


class Rows(NamedTuple):
    """Measured elementwise ops or row kernels of one device."""

    rows: Floats
    columns: Floats
    tensors: Floats
    us: Floats
    held: np.ndarray[Any, np.dtype[np.bool_]]
    op: str

    def part(self, chosen: Any) -> Rows:
        return Rows(*(column[chosen] for column in self[:5]), self.op)

    def predicted(self, abilities: Abilities) -> Floats:
        call = abilities.call.fit
        if self.op == "elementwise":
            return memory_us(4.0 * self.rows * self.columns * self.tensors, abilities) + call.elementwise
        op: RowOp = "softmax" if self.op == "softmax" else "layer_norm"
        host = call.softmax if op == "softmax" else call.layer_norm
        return rows_us(op, self.rows, self.columns, 4, abilities) + host


# Reading ----------------------------------------


def read_csv(name: str) -> list[dict[str, str]]:
    with gzip.open(SHARED / "data" / "kernels" / name, "rt") as stream:
        return list(csv.DictReader(stream))


def read_gemms() -> dict[tuple[str, str], Gemms]:
    """By profile name and class (linear, bmm, or float16).

    The float32 file's columns n and k stand in the other's place: its first dimension and its `k` are padded to the
    tile of the kernel it names, its `n` never is (docs/kernels.md, "What the float32 file's columns mean").
    """
    found: dict[tuple[str, str], dict[tuple[int, ...], list[float]]] = {}
    for row in read_csv("fp32_gemm.csv.gz"):
        shape = (int(row["batch"]), int(row["m"]), int(row["k"]), int(row["n"]))
        found.setdefault((DEVICES[row["device"]], row["op"]), {}).setdefault(shape, []).append(float(row["ms"]) * 1e3)
    for row in read_csv("fp16_gemm_vidur.csv.gz"):
        shape = (1, int(row["m"]), int(row["n"]), int(row["k"]))
        us = float(row["median_ms"]) * 1e3
        found.setdefault((DEVICES[row["device"]], "float16"), {}).setdefault(shape, []).append(us)
    return {key: _gemms(shapes, "float16" if key[1] == "float16" else "float32") for key, shapes in found.items()}


def _gemms(shapes: Mapping[tuple[int, ...], Sequence[float]], dtype: str) -> Gemms:
    keys = sorted(shapes)
    columns = np.array(keys, dtype=np.float64).T
    us = np.array([float(np.median(shapes[key])) for key in keys])
    return Gemms(*columns, us, np.array([held_out(*key) for key in keys]), dtype)


def read_rows() -> dict[tuple[str, str], Rows]:
    """By profile name and op class (elementwise, softmax, layer_norm)."""
    found: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for row in read_csv("fp32_elementwise.csv.gz"):
        op = ROW_OPS.get(row["op"], "elementwise")
        tensors = 3 if row["op"] in TWO_INPUTS else 2
        rows, columns = int(row["rows"]), int(row["columns"])
        held = held_out(rows, columns)
        found.setdefault((DEVICES[row["device"]], op), []).append(
            (rows, columns, tensors, float(row["ms"]) * 1e3, held)
        )
    return {
        key: Rows(*(c := np.array(values, dtype=np.float64).T)[:4], c[4].astype(bool), key[1])
        for key, values in found.items()
    }


# Fitting ----------------------------------------


def bare(name: str) -> DeviceProfile:
    """A shipped profile without its calibration."""
    return load_device(name).model_copy(update={"calibration": Calibration()})


def thinned(part: Any) -> Any:
    return part.part(slice(None, None, max(1, len(part.us) // MOST_POINTS)))


# What the libraries have.  Float32: the tiles in the kernel names of fp32_gemm.csv.gz.  Tensor cores: cuBLAS's and
# CUTLASS's usual ones.
SIMT_TILES = [[128, 128], [128, 64], [64, 128], [64, 64], [128, 32], [32, 128], [64, 32], [32, 32]]
TENSOR_TILES = [
    [128, 256], [256, 128], [128, 128], [256, 64], [64, 256], [128, 64], [64, 128], [64, 64], [128, 32], [64, 32],
]  # fmt: skip
GEMM_LIMITS = {
    "operand_elements": (0.5, 40.0), "prologue_k": (0.5, 100.0), "tail": (0.01, 0.6), "split_us": (0.5, 30.0),
}  # fmt: skip
GEMM_START = {
    "efficiency": 1.0, "operand_elements": 6.0, "prologue_k": 8.0, "tail": 0.1, "split_us": 6.0, "fixed_us": 2.0,
    "memory_efficiency": 0.85, "overlap": 8.0, "long_k_efficiency": 1.0,
}  # fmt: skip
CALL_US = {"elementwise": 16.0, "softmax": 22.0, "layer_norm": 46.0}  # where a fit begins
ROWS_START = {"setup_us": 1.2, "pass_us": 0.3, "miss_from": 0.7, "miss_span": 0.7, "overlap": 2.5}
ROWS_LIMITS = {
    "setup_us": (0.1, 8.0), "pass_us": (0.02, 3.0), "miss_from": (0.2, 2.0), "miss_span": (0.2, 4.0),
    "overlap": (1.2, 8.0),
}  # fmt: skip
NO_DATA = {"source": "x", "data": "x"}


def fit_products(
    profile: DeviceProfile, parts: Sequence[Gemms], fixed: dict[str, Any], limits: dict[str, tuple[float, float]],
    power: dict[str, tuple[float, float]], start: dict[str, float], alone: bool,
) -> tuple[dict[str, float], dict[str, float]]:  # fmt: skip
    """Numbers of one dtype's products and of its power limit together (a limit that never bites is left out)."""
    dtype = parts[0].dtype
    pieces = [thinned(p.part(~p.held)) for p in parts]
    calls = {"linear", "bmm"}
    powers = {"gflop_per_joule"}

    def able(values: dict[str, float]) -> Abilities:
        gemm = {**NO_DATA, **fixed, **{k: v for k, v in values.items() if k not in powers | calls}}
        sections: dict[str, Any] = {"gemm": {dtype: gemm}}
        if calls & values.keys():
            sections["call"] = {**NO_DATA, **CALL_US, **{k: v for k, v in values.items() if k in calls}}
        if power:
            sections["power"] = {dtype: {**NO_DATA, **{k: v for k, v in values.items() if k in powers}}}
        return resolve(with_block(profile, **sections), LENDERS)

    def loss(values: dict[str, float]) -> float:
        abilities = able(values)
        return float(np.concatenate([errors(p.predicted(abilities, alone), p.us) for p in pieces]).mean())

    values = descend(start, loss, {**limits, **power})
    return {k: v for k, v in values.items() if k not in powers}, {k: v for k, v in values.items() if k in powers}


LENDERS: list[DeviceProfile] = []


def seed_lender() -> DeviceProfile:
    """A device that lends what a fit does not fit, so that every section is there."""
    data = {
        "memory": {**NO_DATA, "efficiency": 0.9},
        "attention": {**NO_DATA, "flash": 0.5, "flash_backward": 0.43, "efficient": 0.29, "efficient_backward": 0.25},
        "call": {**NO_DATA, **CALL_US},
        "gemm": {"float32": {**NO_DATA, **GEMM_START, "tiles": SIMT_TILES}},
        "rows": {
            op: {**NO_DATA, "setup_us": 1.0, "pass_us": 0.5, "miss_from": 0.7, "miss_span": 0.7, "overlap": 2.0}
            for op in ROW_OPS.values()
        },
    }
    profile = bare("h100-sxm")
    return profile.model_copy(update={"name": "seed", "calibration": Calibration.model_validate(data)})


def fit_float32(name: str, gemms: Mapping[tuple[str, str], Gemms], like: Mapping[str, Any]) -> dict[str, Any]:
    """V100, A100, T4: everything but the efficiency, which a limit of power would hide in: SMs whose lanes leave every
    second instruction free are taken to reach their rate in an endless tile, as the V100's do.  L4: its power limit
    alone, which hides the rest (``like``: taken from there)."""
    profile = bare(name)
    parts = [gemms[name, "linear"], gemms[name, "bmm"]]
    fixed: dict[str, Any] = {"tiles": SIMT_TILES, "splits": [1, 2, 4]}
    start = GEMM_START | {key: like[key] for key in GEMM_START if key in like}
    limits = {} if like else GEMM_LIMITS | {"long_k_efficiency": (0.5, 1.0)}
    limits = limits | {"linear": (5.0, 65.0), "bmm": (5.0, 65.0)}
    start |= {"linear": 30.0, "bmm": 15.0}
    power: dict[str, tuple[float, float]] = {}
    if name != "v100-pcie":  # its longest products run at the data sheet's rate: no limit to see
        power = {"gflop_per_joule": (30.0, 300.0)}
        start |= {"gflop_per_joule": 70.0}
    gemm, limit = fit_products(profile, parts, fixed, limits, power, start, alone=True)
    call = {name: gemm.pop(name) for name in ("linear", "bmm")}
    said = f"{NEUSIGHT}: fp32_gemm, linear and bmm on {profile.full_name}, four fifths of the shapes"
    shape = f"as on the RTX A5000: the power limit of {profile.full_name} hides its own" if like else said
    block = {"gemm": {"float32": {"source": NEUSIGHT, "data": shape, **gemm, **fixed}}}
    if power:
        block["power"] = {"float32": {"source": NEUSIGHT, "data": said, **limit}}
    else:
        block["power"] = {"float32": least_power(profile, parts, NEUSIGHT, said)}
    return block | {"call": call}


def fit_float16(name: str, gemms: Mapping[tuple[str, str], Gemms]) -> dict[str, Any]:
    profile = bare(name)
    fixed: dict[str, Any] = {"tiles": TENSOR_TILES, "splits": [1, 2, 4, 8], "unaligned_efficiency": 0.91}
    limits = GEMM_LIMITS | {
        "efficiency": (0.3, 1.0), "fixed_us": (1.0, 8.0), "memory_efficiency": (0.5, 1.0), "overlap": (2.0, 12.0),
        "store_exposed": (0.0, 1.0),
    }  # fmt: skip
    start = {**GEMM_START, "operand_elements": 20.0, "prologue_k": 30.0, "fixed_us": 4.0, "overlap": 5.0,
             "store_exposed": 0.3}  # fmt: skip
    part = gemms[name, "float16"]
    gemm, _ = fit_products(profile, [part], fixed, limits, {}, start, alone=False)
    said = f"{VIDUR}: fp16 linear layers on {profile.full_name}, four fifths of the shapes"
    unaligned = f"; unaligned_efficiency: {TORCHCAP}, squares whose side is a multiple of 8 beside the others"
    return {
        "gemm": {"float16": {"source": VIDUR, "data": said + unaligned, **gemm, **fixed}},
        "power": {"float16": least_power(profile, [part], VIDUR, said)},
    }


def least_power(profile: DeviceProfile, parts: Sequence[Gemms], source: str, said: str) -> dict[str, Any]:
    """Where no limit is to be seen: the highest rate measured, at the board's power, is a lower bound."""
    best = max(float((2 * p.batch * p.m * p.n * p.k / p.us).max()) for p in parts) / 1e3
    assert profile.tdp_w is not None
    said += "; a lower bound: the highest rate measured, at the data sheet's power"
    return {
        "source": source, "data": said, "gflop_per_joule": float(f"{best / profile.tdp_w:.3g}"), "lower_bound": True,
    }  # fmt: skip


def fit_a5000(like: Mapping[str, Any]) -> dict[str, Any]:
    """From its own curves: the share of float32 that 128 lanes an SM reach, the power of float16, and the bandwidth.

    float32 stays at 16 TFLOP/s from 1 ms to 4 s, which no power limit does: it is the share that an SM with 128 lanes
    reaches of its rate.  The other numbers of float32 are those of the A100, whose kernels they are.  Whether power or
    the lanes hold it there is not to be told, so as a power limit it is a lower bound.
    """
    profile = bare("rtx-a5000")
    curve, copies = profile.measured.gemm, profile.measured.copy_
    assert curve is not None and copies is not None
    flops = np.array(curve.flops)
    side = np.round((flops / 2) ** (1 / 3))
    overhead = np.array([times[0] for times in (curve.us["float32"],)]) - 1.5
    rate = flops / (np.array(curve.us["float32"]) - overhead) / 1e6
    gemm = dict(like["gemm"]["float32"])
    large = float(np.median(rate[5:])) / profile.tflops["float32"]
    shown = 1.0 / (1.0 + 2 * gemm["operand_elements"] / 128)  # what large tiles pay for their operands
    gemm |= {"efficiency": float(f"{large / shown:.3g}"), "source": TORCHCAP, "long_k_efficiency": 1.0,
             "data": f"{TORCHCAP}: efficiency, median of squares above N = 5000; the rest as on the A100"}  # fmt: skip
    aligned = (side % 8 == 0) & (side > 5000)
    half = flops[aligned] / np.array(curve.us["bfloat16"])[aligned] / 1e3
    moved = np.array(copies.bytes_moved[5:]) / (np.array(copies.us[5:]) - copies.us[0] + 3.0) / 1e3
    return {
        "gemm": {"float32": gemm},
        "power": {"float32": {
            "source": TORCHCAP, "data": f"{TORCHCAP}: median of squares above N = 5000",
            "gflop_per_joule": float(f"{np.median(rate[5:]) * 1e3 / profile.tdp_w:.3g}"), "lower_bound": True,
        }, "float16": {
            "source": TORCHCAP, "data": f"{TORCHCAP}: median of the bfloat16 squares of N a multiple of 8 above 5000",
            "gflop_per_joule": float(f"{np.median(half) / profile.tdp_w:.3g}"),
            "lower_bound": True,  # an A40's SMs, with as many watts each, reach no more a clock, and show no limit
        }},
        "memory": {"source": TORCHCAP, "data": f"{TORCHCAP}: median of the copies of 0.5 GB and more",
                   "efficiency": float(f"{np.median(moved) / profile.memory_bandwidth_gb_s:.3g}")},
    }  # fmt: skip


def fit_memory(name: str, rows: Mapping[tuple[str, str], Rows]) -> dict[str, Any]:
    """Bandwidth and the call's time, from elementwise ops by bytes; then the row kernels."""
    profile = bare(name)
    said = f"{NEUSIGHT}: %s on {profile.full_name}, four fifths of the shapes"
    block: dict[str, Any] = {}

    def loss(part: Rows) -> Callable[[dict[str, float]], float]:
        def of(values: dict[str, float]) -> float:
            efficiency = values["efficiency"] if part.op == "elementwise" else block["memory"]["efficiency"]
            sections: dict[str, Any] = {
                "memory": {**NO_DATA, "efficiency": efficiency},
                "call": {**NO_DATA, **CALL_US, part.op: values["call"]},
            }
            if part.op != "elementwise":
                numbers = {k: v for k, v in values.items() if k != "call"}
                sections["rows"] = {part.op: {**NO_DATA, **numbers}}
            abilities = resolve(with_block(profile, **sections), LENDERS)
            return float(errors(part.predicted(abilities), part.us).mean())

        return of

    streams = rows[name, "elementwise"]
    call = {}
    found = descend({"efficiency": 0.85, "call": 16.0}, loss(thinned(streams.part(~streams.held))),
                    {"efficiency": (0.4, 1.0), "call": (10.0, 20.0)})  # fmt: skip
    block["memory"] = {"source": NEUSIGHT, "data": said % "elementwise ops", "efficiency": found["efficiency"]}
    call["elementwise"] = found["call"]
    block["rows"] = {}
    for op in ROW_OPS.values():
        part = rows[name, op]
        start = {"call": CALL_US[op], **ROWS_START}
        limits = {"call": (20.0, 35.0) if op == "softmax" else (35.0, 55.0), **ROWS_LIMITS}
        found = descend(start, loss(thinned(part.part(~part.held))), limits)
        call[op] = found.pop("call")
        block["rows"][op] = {"source": NEUSIGHT, "data": said % op, **found}
    block["call"] = {"source": NEUSIGHT, "data": said % "all ops", **call}
    return block


ATTENTION: dict[str, dict[str, Any]] = {
    "a100-sxm4-80gb": {
        "source": "Dao, FlashAttention-2 (arXiv 2307.08691), abstract and section 4.1: on an A100 50 to 73 % of the "
        "tensor-core rate forward and up to 63 % backward; xformers issue 712: the memory-efficient kernel on an A100",
        "data": "published figures for heads of 64 and 1,024 tokens: flash at its lower end; memory-efficient, 16 "
        "sequences of 16 heads in 786 us; its backward at 0.6 of its forward share (published: 0.4 to 0.75)",
        "flash": 0.50,
        "flash_backward": 0.43,  # 0.50 x 63 / 73
        "efficient": 0.28,  # 68.7 GFLOP in 786 us
        "efficient_backward": 0.17,
    },
    "rtx-a5000": {
        "source": "gpu-mode/ring-attention issue 10 (two RTX A5000): FlashAttention-2 with 16 x 1,024 tokens, heads of "
        "64, 81.0 TFLOP/s forward and 62.5 backward; xformers issue 712 for the memory-efficient kernel on an A100",
        "data": "published figures; memory-efficient: what a score costs beside its products on the A100 (0.316 clocks "
        "of an SM), times what it costs here and there in flash (0.093, 0.125), beside products of 0.25 clocks",
        "flash": 0.73,
        "flash_backward": 0.56,
        "efficient": 0.51,
        "efficient_backward": 0.31,
    },
    "h100-sxm": {
        "source": "an H100 trace with PyTorch 2.6 (TraceLens tests, Qwen1.5-0.5B forward): flash_fwd_kernel",
        "data": "16 sequences of 16 heads of 64, 559 tokens, in 113.8 us (its FlashAttention-2 does not use the "
        "warp-group products of Hopper); the others in the proportions of the A100",
        "flash": 0.22,
        "flash_backward": 0.19,
        "efficient": 0.12,
        "efficient_backward": 0.073,
    },
}


# Of the time: at the upper ends of the published figures (73 % of the rate, 3.0 times slower before) 0.68 and 1.77 of
# what the lower ends say; nothing is known of where other devices lie, so a tenth more on either side there.
ATTENTION_SPREAD = {"p10": 0.68, "p90": 1.3, "borrowed_p10": 0.61, "borrowed_p90": 1.77}


def fit_all(gemms: Mapping[tuple[str, str], Gemms], rows: Mapping[tuple[str, str], Rows]) -> dict[str, dict[str, Any]]:
    """The calibration of every device that was measured, by profile name."""
    LENDERS[:] = [seed_lender()]  # and each profile is fitted from nothing, whatever its file says by now
    blocks: dict[str, dict[str, Any]] = {}
    for name in ("a100-pcie-40gb", "v100-pcie", "t4"):
        blocks[name] = fit_float32(name, gemms, {})
    blocks["rtx-a5000"] = fit_a5000(blocks["a100-pcie-40gb"])
    blocks["l4"] = fit_float32("l4", gemms, blocks["rtx-a5000"]["gemm"]["float32"])
    for name in sorted({name for name, _ in rows}):
        products_call = blocks[name].pop("call")
        blocks[name] |= fit_memory(name, rows)
        blocks[name]["call"] |= products_call
    # Operands move at a share of what streams reach, which others lend to the two devices of the float16 file.
    LENDERS.extend(with_block(bare(n), memory=block["memory"]) for n, block in blocks.items())
    for name in ("a40", "a100-sxm4-80gb"):
        blocks[name] = fit_float16(name, gemms)
    for name, block in ATTENTION.items():
        blocks.setdefault(name, {})["attention"] = block
    return blocks


# Judging ----------------------------------------


class Judged(NamedTuple):
    """Measured over predicted of points that a fit had not seen."""

    device: str
    op: str
    ratio: Floats

    def line(self) -> str:
        error = np.abs(1.0 / self.ratio - 1.0)
        return (
            f"| {self.device} | {self.op} | {len(error)} | {100 * error.mean():.1f} | {100 * np.median(error):.1f} | "
            f"{100 * np.quantile(error, 0.9):.1f} |"
        )


def judge(
    gemms: Mapping[tuple[str, str], Gemms], rows: Mapping[tuple[str, str], Rows], able: Mapping[str, Abilities], *,
    everything: bool,
) -> list[Judged]:  # fmt: skip
    """Errors on the shapes left out, or (a whole GPU left out) on every shape."""
    judged = []
    for (name, op), part in sorted(gemms.items()):
        seen = part.part(slice(None) if everything else part.held)
        judged.append(Judged(name, f"gemm {op}", seen.us / seen.predicted(able[name], alone=op != "float16")))
    for (name, op), stream in sorted(rows.items()):
        left = stream.part(slice(None) if everything else stream.held)
        judged.append(Judged(name, op, left.us / left.predicted(able[name])))
    return judged


def op_class(op: str) -> str:
    return "gemm_float16" if op == "gemm float16" else "gemm_float32" if op.startswith("gemm") else op


def spreads(own: Iterable[Judged], borrowed: Iterable[Judged]) -> dict[str, dict[str, dict[str, float]]]:
    """By device and op class: the device's own percentiles, and those of one more device than were left out."""
    lent: dict[str, list[tuple[str, Floats]]] = {}
    for judged in borrowed:
        lent.setdefault(op_class(judged.op), []).append((judged.device, judged.ratio))
    mine: dict[tuple[str, str], list[Floats]] = {}
    for judged in own:
        mine.setdefault((judged.device, op_class(judged.op)), []).append(judged.ratio)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (device, name), ratios in mine.items():
        low, high = np.quantile(np.concatenate(ratios), [0.1, 0.9])
        far, near = new_device_interval(list(by_device(lent[name]).values()))
        numbers = {"p10": low, "p90": high, "borrowed_p10": far, "borrowed_p90": near}
        found.setdefault(device, {})[name] = {k: float(f"{v:.3f}") for k, v in numbers.items()}
    return found


def table(title: str, judged: Sequence[Judged]) -> None:
    print(f"\n{title}\n\n| device | op | shapes | mean % | median % | 90th percentile % |\n|---|---|---|---|---|---|")
    for one in judged:
        print(one.line())
    by_class: dict[str, list[Floats]] = {}
    for one in judged:
        by_class.setdefault(op_class(one.op), []).append(np.abs(1.0 / one.ratio - 1.0))
    for name, parts in sorted(by_class.items()):
        print(Judged("all", name, 1.0 / (1.0 + np.concatenate(parts))).line())
    everything = np.concatenate([e for parts in by_class.values() for e in parts])
    print(Judged("all", "all", 1.0 / (1.0 + everything)).line())


# Writing ----------------------------------------

BEGIN = "# What follows was written by tools/fit_kernels.py; docs/kernels.md says what each number is.\n"


def write_block(name: str, block: Mapping[str, Any]) -> None:
    path = ROOT / "topologies" / "devices" / f"{name}.yaml"
    text = path.read_text().split(BEGIN)[0]
    order = ("gemm", "power", "memory", "rows", "attention", "call", "spread")
    plain = json.loads(json.dumps({key: block[key] for key in order if key in block}))
    dumped = io.StringIO()
    yaml.safe_dump({"calibration": plain}, dumped, sort_keys=False, width=112, default_flow_style=None)
    path.write_text(text + BEGIN + dumped.getvalue())


Profiles = Mapping[str, DeviceProfile]


def with_blocks(blocks: Mapping[str, Mapping[str, Any]]) -> dict[str, DeviceProfile]:
    """Every shipped profile with its new calibration, or none."""
    return {
        name: bare(name).model_copy(update={"calibration": Calibration.model_validate(blocks.get(name, {}))})
        for name in shipped_devices()
    }


def themselves(profiles: Profiles) -> dict[str, Abilities]:
    """Abilities of each device with its own calibration."""
    lenders = [p for p in profiles.values() if p.calibration != Calibration()]
    return {name: resolve(profile, lenders) for name, profile in profiles.items()}


def left_out(profiles: Profiles) -> dict[str, Abilities]:
    """Abilities of each device by its data sheet and all others: no calibration and no curve of its own.

    Nobody else lends attention when the A100 that carries it is left out; it is published, not fitted.
    """
    attention = with_block(bare("h100-sxm"), attention=ATTENTION["a100-sxm4-80gb"])
    found = {}
    for name, profile in profiles.items():
        others = [p for p in profiles.values() if p.name != name and p.calibration != Calibration()]
        sheet = profile.model_copy(update={"calibration": Calibration(), "measured": type(profile.measured)()})
        found[name] = resolve(sheet, [attention, *others])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--write", action="store_true", help="write the calibration blocks into topologies/devices/")
    arguments = parser.parse_args()
    gemms, rows = read_gemms(), read_rows()
    blocks = fit_all(gemms, rows)
    fitted = with_blocks(blocks)
    own = judge(gemms, rows, themselves(fitted), everything=False)
    borrowed = judge(gemms, rows, left_out(fitted), everything=True)
    table("Shapes left out", own)
    table("Whole GPU left out", borrowed)
    for name, spread in spreads(own, borrowed).items():
        blocks[name]["spread"] = spread
    for name in ATTENTION:
        blocks[name].setdefault("spread", {})["attention"] = ATTENTION_SPREAD
    if arguments.write:
        for name, block in blocks.items():
            write_block(name, block)
        print("\nwritten:", ", ".join(sorted(blocks)))
    else:
        print(json.dumps(blocks, indent=1))


if __name__ == "__main__":
    main()
