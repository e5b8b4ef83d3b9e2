"""Kernel models against microbenchmarks: shapes that no fit saw, and GPUs predicted by the others.

Published sets (tools/fit_kernels.py names them); a fifth of the shapes is left out of every fit.  The float32 products
of T4 and L4 are the hard part: their 70 W let a short call run at up to twice the rate of a long one, as the
benchmark's own history had it (neighbouring batches differ by 40 %), so no model of shapes gets nearer.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sim.topology.abilities import PROCESS_EXPONENT
from sim.topology.device import load_device, shipped_devices

pytestmark = pytest.mark.validation


@pytest.fixture(scope="module")
def fit(shared_dir: Path, root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fit_kernels", root / "tools" / "fit_kernels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fit_kernels"] = module
    spec.loader.exec_module(module)
    module.SHARED = shared_dir  # type: ignore[attr-defined]
    return module


@pytest.fixture(scope="module")
def data(fit: ModuleType) -> tuple[Any, Any]:
    return fit.read_gemms(), fit.read_rows()


@pytest.fixture(scope="module")
def own(fit: ModuleType, data: tuple[Any, Any]) -> list[Any]:
    profiles = {name: load_device(name) for name in shipped_devices()}
    return list(fit.judge(*data, fit.themselves(profiles), everything=False))


@pytest.fixture(scope="module")
def left_out(fit: ModuleType, data: tuple[Any, Any]) -> list[Any]:
    profiles = {name: load_device(name) for name in shipped_devices()}
    return list(fit.judge(*data, fit.left_out(profiles), everything=True))


def error(judged: list[Any], op: str = "", device: str = "") -> tuple[float, float]:
    """Mean and median relative error in percent."""
    chosen = [j.ratio for j in judged if j.op.startswith(op) and j.device.startswith(device)]
    errors = 100 * np.abs(1 / np.concatenate(chosen) - 1)
    return float(errors.mean()), float(np.median(errors))


def test_shapes_left_out_are_within_8_percent(own: list[Any]) -> None:
    mean, median = error(own)
    assert mean < 8 and median < 5


@pytest.mark.parametrize(
    ("op", "device", "mean", "median"),
    [
        ("elementwise", "", 2, 2),
        ("softmax", "", 8, 7),
        ("layer_norm", "", 5, 4),
        ("gemm float16", "a40", 8, 7),
        ("gemm float16", "a100", 8, 7),
        ("gemm linear", "v100", 6, 4),
        ("gemm", "a100-pcie", 7, 5),
        ("gemm linear", "t4", 9, 6),
        ("gemm linear", "l4", 10, 8),
        ("gemm bmm", "t4", 20, 13),
        ("gemm bmm", "l4", 21, 18),
    ],
)
def test_shapes_left_out_by_op_and_device(own: list[Any], op: str, device: str, mean: float, median: float) -> None:
    found = error(own, op, device)
    assert found[0] < mean and found[1] < median


def test_a_gpu_left_out_is_within_15_percent(left_out: list[Any]) -> None:
    mean, median = error(left_out)
    assert mean < 15 and median < 8


@pytest.mark.parametrize(
    ("op", "mean"),
    [
        ("elementwise", 5), ("softmax", 12), ("layer_norm", 10), ("gemm float16", 10), ("gemm", 11),
        ("gemm linear", 12), ("gemm bmm", 17),
    ],
)  # fmt: skip
def test_a_gpu_left_out_by_op(left_out: list[Any], op: str, mean: float) -> None:
    assert error(left_out, op)[0] < mean


def test_float32_products_on_a_gpu_left_out_are_within_15_percent(left_out: list[Any]) -> None:
    errors = [np.abs(1 / j.ratio - 1) for j in left_out if j.op in ("gemm linear", "gemm bmm")]
    assert np.concatenate(errors).mean() < 0.15


def test_the_exponent_of_the_process_is_the_data_sheets() -> None:
    profiles = [load_device(name) for name in shipped_devices()]
    gpus = [p for p in profiles if p.kind == "gpu" and p.process_nm and p.tdp_w]
    rates = [p.tflops["float32"] / p.tdp_w for p in gpus if p.tdp_w]
    slope = np.polyfit(np.log([p.process_nm for p in gpus]), np.log(rates), 1)[0]
    assert len(gpus) == 17 and -slope == pytest.approx(PROCESS_EXPONENT, abs=0.005)


def test_the_intervals_hold_what_they_say(fit: ModuleType, data: tuple[Any, Any]) -> None:
    """Made from the shapes left out, they hold four fifths of all shapes too."""
    profiles = {name: load_device(name) for name in shipped_devices()}
    inside, total = 0, 0
    for judged in fit.judge(*data, fit.themselves(profiles), everything=True):
        name = {"gemm float16": "gemm_float16"}.get(judged.op, "gemm_float32" if "gemm" in judged.op else judged.op)
        spread = load_device(judged.device).calibration.spread[name]
        inside += int(((judged.ratio >= spread.p10) & (judged.ratio <= spread.p90)).sum())
        total += len(judged.ratio)
    assert 0.75 < inside / total < 0.85


def test_the_shipped_spreads_are_what_is_left_out(fit: ModuleType, own: list[Any], left_out: list[Any]) -> None:
    """A change of a formula moves them: `python tools/fit_kernels.py --write` writes them anew."""
    for device, spread in fit.spreads(own, left_out).items():
        shipped = load_device(device).calibration.spread
        assert {name: shipped[name].model_dump() for name in spread} == spread, device


def test_columns_n_and_k_of_the_float32_file_are_exchanged(fit: ModuleType, data: tuple[Any, Any]) -> None:
    """Read as labelled, the A100's batched products are three times as far off: their `k` is padded to tiles."""
    part = data[0]["a100-pcie-40gb", "bmm"]
    able = fit.themselves({name: load_device(name) for name in shipped_devices()})["a100-pcie-40gb"]
    as_read = fit.errors(part.predicted(able, alone=True), part.us).mean()
    as_labelled = fit.errors(part._replace(n=part.k, k=part.n).predicted(able, alone=True), part.us).mean()
    assert as_labelled > 2.5 * as_read


def test_fitting_again_gives_the_numbers_that_are_shipped(fit: ModuleType, data: tuple[Any, Any]) -> None:
    blocks = fit.fit_all(*data)
    for name, profile in fit.with_blocks(blocks).items():
        shipped = load_device(name).calibration
        assert profile.calibration == shipped.model_copy(update={"spread": {}}), name
