"""Device profiles: every shipped one loads, figures have sources, and no unknown GPU becomes another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sim.errors import InputError, UnknownNameError
from sim.topology.device import find_device, load_device, shipped_devices
from sim.topology.yaml_file import read_named

NAMES = [
    "a100-pcie-40gb",
    "a100-pcie-80gb",
    "a100-sxm4-40gb",
    "a100-sxm4-80gb",
    "a40",
    "h100-pcie",
    "h100-sxm",
    "h200-sxm",
    "l4",
    "l40s",
    "rtx-3090",
    "rtx-4090",
    "rtx-a5000",
    "rtx-a6000",
    "t4",
    "v100-pcie",
    "v100-sxm2",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_named_profile_ships_and_says_where_its_numbers_are_from(name: str) -> None:
    profile = load_device(name)
    assert profile.name == name
    assert profile.source
    assert profile.launch is not None
    assert profile.launch.source
    assert profile.tflops["float16"] > profile.tflops["float32"]


def test_the_a5000_by_hand() -> None:
    profile = load_device("rtx-a5000")
    # Data sheet: 64 SMs x 128 cores x 2 FLOP x 1.695 GHz boost = 27.8 TFLOP/s; 24 GiB = 25,769,803,776 bytes.
    assert abs(64 * 128 * 2 * 1.695e9 / 1e12 - profile.tflops["float32"]) < 0.05
    assert profile.memory_bytes == 25_769_803_776
    assert profile.capability == (8, 6)


def test_the_a5000_carries_its_measured_curves(shared_dir: Path) -> None:
    facts = json.loads((shared_dir / "facts" / "a5000_gala1_measured.json").read_text())
    measured = load_device("rtx-a5000").measured
    assert measured.gemm is not None
    assert measured.copy_ is not None
    assert list(measured.gemm.flops) == facts["gemm"]["flops"]
    for dtype in ("float16", "bfloat16", "float32"):
        assert list(measured.gemm.us[dtype]) == pytest.approx(facts["gemm"][f"{dtype}_us"], rel=1e-5)
    assert list(measured.copy_.us) == pytest.approx(facts["memory_copy"]["us"], rel=1e-5)
    # Two copies of N = 32768 float32 matrices: 16 N^2 = 17,179,869,184 bytes in 25,095 us is 684.6 GB/s.
    rate = measured.copy_.bytes_moved[-1] / measured.copy_.us[-1] / 1e3
    assert rate == pytest.approx(684.6, abs=0.1)
    assert measured.copy_.copies == 2


@pytest.mark.parametrize(
    ("name", "profile"),
    [
        ("NVIDIA RTX A5000", "rtx-a5000"),
        ("Tesla V100-DGXS-32GB", "v100-sxm2"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA A100-PG509-200", "a100-sxm4-40gb"),
        ("rtx-a6000", "rtx-a6000"),
    ],
)
def test_a_device_is_known_by_the_name_a_trace_gives_it(name: str, profile: str) -> None:
    assert find_device(name).name == profile


def test_an_unknown_gpu_never_becomes_another() -> None:
    with pytest.raises(UnknownNameError, match="NVIDIA RTX A5000") as error:
        find_device("NVIDIA RTX A5500")
    assert "\n" not in str(error.value)


def test_no_two_profiles_answer_to_one_name() -> None:
    names = [n for device in shipped_devices() for p in [load_device(device)] for n in (p.full_name, *p.aliases)]
    assert len(names) == len(set(names))


def test_a_curve_that_does_not_fit_its_places_is_told(tmp_path: Path) -> None:
    text = (
        "name: x\nfull_name: X\narchitecture: a\nchip: c\nsource: s\nsms: 1\nmemory_gib: 1\n"
        "memory_bandwidth_gb_s: -3\nl2_mib: 1\ntflops: {float16: 1}\n"
        "measured: {copy: {source: s, bytes_moved: [1, 2], us: [1]}}\n"
    )
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        load_device(str(tmp_path / "x.yaml"))
    assert "memory_bandwidth_gb_s: must be > 0, found -3" in str(error.value)
    assert "measured.copy: us must have 2 values, found 1" in str(error.value)


def test_missing_and_impossible_numbers_are_told_at_once(tmp_path: Path) -> None:
    """A negative rate, shares above 1, a dtype that there is not, a missing count, text and nan for numbers."""
    text, _ = read_named("device", "rtx-a5000", "devices")
    for good, bad in {
        "memory_bandwidth_gb_s: 768": "memory_bandwidth_gb_s: -768",
        "efficiency: 0.891": "efficiency: 1.2",
        "{float16: 111.1": "{flaot16: 111.1",
        "sms: 64\n": "",
        "tdp_w: 230": "tdp_w: .nan",
        "gflop_per_joule: 353.0": "gflop_per_joule: 0",
        "l2_mib: 6": "l2_mib: six",
        "flash: 0.73": "flash: 1.5",
        "process_nm: 10": "process_nm: true",
        "  spread:\n": "  spread:\n    sofmax: {p10: 1, p90: 1, borrowed_p10: 1, borrowed_p90: 1}\n",
    }.items():
        assert good in text, good
        text = text.replace(good, bad, 1)
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_device(str(path))
    told = str(caught.value)
    assert "\n" not in told
    for problem in (
        "sms: is missing",
        "memory_bandwidth_gb_s: must be > 0, found -768",
        "l2_mib: must be a number, found 'six'",
        "tflops.flaot16: unknown dtype 'flaot16': did you mean 'float16'",
        "tdp_w: must be a finite number",
        "calibration.power.float16.gflop_per_joule: must be > 0, found 0",
        "calibration.memory.efficiency: must be <= 1, found 1.2",
        "calibration.attention.flash: must be <= 1, found 1.5",
        "process_nm: must be a number, found true",
        "calibration.spread.sofmax: unknown class of kernels 'sofmax': did you mean 'softmax'",
    ):
        assert problem in told, told


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "must be a mapping of keys, found nothing"),
        (b"- a\n- b\n", "must be a mapping of keys, found a list"),
        (b"64\n", "must be a mapping of keys, found a number"),
        (b"sms: 64\nsms: 32\n", "line 2: not valid YAML: the key 'sms' stands twice"),
        (b"tflops: {float16: 1, float16: 2}\n", "line 1: not valid YAML: the key 'float16' stands twice"),
        (b"name: x\n\tsms: 1\n", "line 2: not valid YAML"),
        (b"name: \xff\xfe\n", "is not UTF-8 text"),
        (b"tflops: {}\nmemory_gb: 24\n", "tflops: must hold something, found {}; "),
        (b"memory_gb: 24\n", "memory_gb: unknown key (did you mean 'memory_gib'?)"),
        (b"tflops: [1, 2]\nsms: 64.5\n", "sms: must be a whole number, found 64.5; "),
    ],
)  # fmt: skip
def test_a_file_that_is_no_profile_is_one_line(
    refused: Callable[..., str], tmp_path: Path, content: bytes, told: str
) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    assert told in refused("kernel", "relu", "--rows", 1, "--columns", 8, "--dtype", "float32", "--device", path)
