"""``tracesim kernel``: rows, files of shapes, intervals, and how it refuses."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sim.errors import InputError
from sim.place.kernels.single import OPS, kernel_rows, needed
from sim.topology.device import DeviceProfile, load_device, shipped_devices, validate_device
from sim.yaml_text import parse_yaml

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(run: Run) -> Run:
    """``tracesim kernel`` with these words."""
    return lambda *args: run("kernel", *args)


@pytest.fixture
def rows(run: Run) -> Callable[..., list[dict[str, Any]]]:
    def command(*args: object) -> list[dict[str, Any]]:
        code, out, err = run(*args, "--json", "-")
        assert code == 0, err
        found: list[dict[str, Any]] = json.loads(out)["rows"]
        return found

    return command


A5000 = ("--dtype", "float16", "--device", "rtx-a5000")


def test_a_product_as_the_contract_has_it(rows: Callable[..., list[dict[str, Any]]]) -> None:
    (row,) = rows("gemm", "--m", 8008, "--n", 8008, "--k", 8008, *A5000)
    named = {"op": "gemm", "batch": 1, "m": 8008, "n": 8008, "k": 8008, "dtype": "float16", "device": "rtx-a5000"}
    assert row.items() >= named.items()
    assert row["bound"] == "compute" and row["from"] == "profile"
    # The measured curve: 12,695.9 us, of which the smallest product shows 13.8 as the call.
    assert row["us"] == pytest.approx(12_682, rel=0.01)
    assert row["us_p10"] < row["us"] < row["us_p90"]


def test_rows_and_columns_for_the_rest(rows: Callable[..., list[dict[str, Any]]]) -> None:
    (row,) = rows("add", "--rows", 8192, "--columns", 8192, *A5000)
    # Two tensors in, one out: 3 x 134,217,728 bytes at 684.3 GB/s are 588.4 us, and the floor of 1.5 us.
    assert row["kernel_us"] == pytest.approx(588.4 + 1.5, rel=0.01)
    assert row["us"] == row["kernel_us"] + row["call_us"]
    assert row["bound"] == "memory"
    assert "m" not in row and row["columns"] == 8192
    # A number in place of the second tensor: two thirds of the bytes.
    (scalar,) = rows("addu", "--rows", 8192, "--columns", 8192, *A5000)
    assert scalar["kernel_us"] == pytest.approx(row["kernel_us"] * 2 / 3, rel=0.01)


def test_a_borrowed_calibration_is_said(rows: Callable[..., list[dict[str, Any]]], run: Run) -> None:
    shape = ("--m", 4096, "--n", 4096, "--k", 4096, "--dtype", "bfloat16", "--device", "h100-sxm")
    (row,) = rows("gemm", *shape)
    assert (row["from"], row["calibrated_on"]) == ("roofline", "a100-sxm4-80gb")
    code, out, _ = run("gemm", *shape)
    assert code == 0
    assert "the data sheet, calibrated on a100-sxm4-80gb" in out
    assert max(map(len, out.splitlines())) <= 100


def test_a_file_of_ten_thousand_shapes_takes_less_than_two_seconds(
    rows: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    numbers = random.Random(7)
    sizes = [[numbers.randint(1, 9000) for _ in range(3)] for _ in range(10_000)]
    file = tmp_path / "shapes.csv"
    file.write_text("m,n,k\n" + "".join(f"{m},{n},{k}\n" for m, n, k in sizes))
    begun = time.process_time()
    found = rows("gemm", "--shapes", file, *A5000)
    assert time.process_time() - begun < 2.0
    assert [[row["m"], row["n"], row["k"]] for row in found] == sizes


def test_a_file_gives_what_one_shape_gives(rows: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    file = tmp_path / "shapes.csv"
    # A column that nobody asked for is left alone; a byte order mark and blanks too.
    file.write_text("﻿batch, m, n, k, ms\n4,128,256,512,0.1\n1,4096,4096,4096,2\n", encoding="utf-8")
    first, second = rows("gemm", "--shapes", file, *A5000)
    assert first == rows("gemm", "--batch", 4, "--m", 128, "--n", 256, "--k", 512, *A5000)[0]
    assert second == rows("gemm", "--m", 4096, "--n", 4096, "--k", 4096, *A5000)[0]


def test_bad_lines_are_told_all_at_once(refused: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "shapes.csv"
    file.write_text("m,n,k\n1,2,3\n-4,2,x\n1,,3\n1,2\n1,024,3,4\n")
    told = refused("gemm", "--shapes", file, *A5000)
    assert f"{file}: line 3: m must be a whole number above 0, found '-4'" in told
    assert "line 3: k must be a whole number above 0, found 'x'; line 4: n" in told
    assert "line 5: k must be a whole number above 0, found nothing" in told
    assert "line 6: more values than the header has columns" in told
    file.write_text("m,n,k,m\n1,2,3,4\n")
    assert "line 1: the column m stands twice; which is meant?" in refused("gemm", "--shapes", file, *A5000)


def test_a_file_without_its_columns(refused: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "shapes.csv"
    file.write_text("rows,columns\n1,2\n")
    assert "line 1: no column m and no n and no k (gemm needs them); found rows, columns" in refused(
        "gemm", "--shapes", file, *A5000
    )
    file.write_text("")
    assert "no column" in refused("gemm", "--shapes", file, *A5000)
    file.write_text("m,n,k\n")
    assert "has no shapes" in refused("gemm", "--shapes", file, *A5000)
    file.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refused("gemm", "--shapes", file, *A5000)
    assert "cannot be read" in refused("gemm", "--shapes", tmp_path, *A5000)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("gem", "--m", 1, "--n", 1, "--k", 1, *A5000), "unknown op 'gem': did you mean 'gemm'"),
        (("gemm", "--m", 1, "--n", 1, "--k", 1, "--dtype", "float61", "--device", "t4"), "or 'float16' or"),
        (("gemm", "--m", 1, "--n", 1, "--k", 1, "--dtype", "float16", "--device", "t5"), "unknown device 't5'"),
        (("gemm", "--m", 1, *A5000), "gemm: n is missing; k is missing (it needs m, n, k)"),
        (("gemm", "--m", -1, "--n", 0, "--k", 1, *A5000), "m must be above 0, found -1; n must be above 0, found 0"),
        (("relu", "--rows", 1, "--m", 4, *A5000), "relu: columns is missing"),
        (("gemm", "--m", 1, "--n", 1, "--k", 1, "--rows", 4, *A5000), "gemm: rows is no size of it (it needs m, n, k)"),
        (("relu", "--rows", 1, "--columns", 1, "--batch", 4, *A5000), "relu: batch is no size of it"),
        (("gemm", "--m", 10**9, "--n", 10**9, "--k", 10**9, *A5000), "larger than any memory"),
    ],
)
def test_what_is_refused(refused: Callable[..., str], args: tuple[object, ...], told: str) -> None:
    assert told in refused(*args)


def test_a_file_and_a_shape_at_once_are_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "not both" in refused("gemm", "--shapes", tmp_path / "x.csv", "--m", 1, *A5000)


def test_every_op_has_a_time_on_every_shipped_device() -> None:
    for name in shipped_devices():
        profile = load_device(name)
        for op in OPS:
            products = {"m": 1024, "n": 1024, "k": 64, "batch": 8}
            shape = products if "m" in needed(op) else {"rows": 4096, "columns": 2048}
            (row,) = kernel_rows(op, [shape], "float32", profile)
            assert 0 < row.us_p10 < row.us_p90, (op, name)
            assert row.us_p10 <= row.us * 1.3 and row.us_p90 >= row.us * 0.7


# Profiles ----------------------------------------

PROFILE = """
name: mine
full_name: My GPU
architecture: Ampere
chip: GA102
source: a test
sms: 10
memory_gib: 8
memory_bandwidth_gb_s: 500
l2_mib: 4
tflops: {float16: 20, float32: 10}
tdp_w: 100
"""


def mine(**changes: object) -> DeviceProfile:
    return validate_device({**parse_yaml(PROFILE, "mine.yaml"), **changes}, "mine.yaml")


def test_a_profile_of_a_user_borrows_too(rows: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(PROFILE)
    (row,) = rows("gemm", "--m", 512, "--n", 512, "--k", 512, "--dtype", "float16", "--device", file)
    assert (row["device"], row["from"], row["calibrated_on"]) == ("mine", "roofline", "a40")


def test_impossible_numbers_are_told_all_at_once() -> None:
    wrong = {
        "tflops": {"float16": -20, "float17": 3},
        "tdp_w": "plenty",
        "calibration": {
            "memory": {"source": "x", "data": "x", "efficiency": 1.2},
            "power": {"float16": {"source": "x", "data": "x", "gflop_per_joule": 0}},
            "spread": {"softmax": {"p10": 1.2, "p90": 0.9, "borrowed_p10": 0.8, "borrowed_p90": 1.2}},
        },
    }
    with pytest.raises(InputError) as caught:
        mine(**wrong)
    told = str(caught.value)
    assert told.startswith("mine.yaml: ")
    assert "tflops.float16: must be > 0, found -20" in told
    assert "unknown dtype 'float17': did you mean 'float16'" in told
    assert "tdp_w: must be a number, found 'plenty'" in told
    assert "calibration.memory.efficiency: must be <= 1, found 1.2" in told
    assert "calibration.power.float16.gflop_per_joule: must be > 0, found 0" in told
    assert "p10 must not exceed p90" in told
    assert "\n" not in told


def test_an_empty_block_is_told_by_its_missing_keys() -> None:
    with pytest.raises(InputError, match=r"calibration\.memory\.efficiency: is missing"):
        mine(calibration={"memory": {"source": "x", "data": "x"}})


def test_a_dtype_without_a_rate_is_told_and_refused_where_strict(run: Run, refused: Callable[..., str]) -> None:
    asked = ("gemm", "--m", 4096, "--n", 4096, "--k", 4096, "--dtype", "bfloat16", "--device", "v100-sxm2")
    code, out, _ = run(*asked)
    assert code == 0 and "no rate for bfloat16: estimated as float32" in out
    # Half the bytes, the same arithmetic: as long as float32 takes.
    rows = [kernel_rows("gemm", [{"m": 4096, "n": 4096, "k": 4096}], d, load_device("v100-sxm2")) for d in
            ("bfloat16", "float32")]  # fmt: skip
    assert rows[0][0].kernel_us == pytest.approx(rows[1][0].kernel_us, rel=0.02)
    assert rows[0][0].computed_in == "float32" and rows[1][0].computed_in is None
    # How sure float32's time is says nothing of another dtype.
    assert (rows[0][0].us_p10, rows[0][0].us_p90) == (rows[0][0].us / 2, rows[0][0].us * 2)
    err = refused(*asked, "--strict")
    assert "--strict: the profile of v100-sxm2 has no rate for bfloat16 (it has float16, float32)" in err
    assert "did you mean 'softmax'" in refused("softmx", "--dtype", "float16", "--device", "t4", "--strict")
