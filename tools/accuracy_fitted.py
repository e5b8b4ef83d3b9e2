"""What docs/accuracy.md says was fitted, and to what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import sim
from sim.topology.device import load_device, shipped_devices
from tools.accuracy_page import Report
from tools.fit_kernels import ROOT


def fitted(report: Report) -> None:
    report.section(
        "Every fitted constant, and its data",
        "From the calibration blocks of topologies/devices (docs/kernels.md says what each number is). Devices that "
        "are not in this list carry data-sheet figures alone and borrow from those that are.",
    )
    report.table(("device", "block", "numbers", "fitted to"), _blocks())
    report.say("Curves that are measurements themselves, and are read and not fitted:")
    report.lines.append("")
    report.table(("file", "curve", "source"), _curves())
    report.say("Constants outside of these files:")
    report.lines.append("")
    report.table(("where", "what", "fitted to"), OUTSIDE)
    report.say(
        "The rest is NCCL's, PyTorch's or CUDA's own, or a published figure, each with its source beside it. Nothing "
        "is fitted to the published table, to Lambda's throughputs, to the snapshots."
    )


OUTSIDE = (
    ("sim/place/kernels/convolution.py", "the share of a product's speed that convolutions reach",
     "the sums of ResNet50's traces on V100 and A100"),
    ("sim/place/kernels/layout.py, memory.py", "clocks an element of strided, broadcast and converting kernels, and "
     "how they add to bytes", "the elementwise kernels of the H100 trace, each kind once (tools/fit_layout.py); its "
     "steps as captured do not depend on them"),
    ("devices/h100-sxm, rtx-a5000", "launch latency, floor, gap; the H100's attention", "percentiles of the H100 "
     "trace, and of an A100's for the rest"),
    ("sim/topology/abilities.py", "PROCESS_EXPONENT, energy by process", "data sheets of the 17 GPUs in "
     "topologies/devices: float32 operations a second and watt"),
    ("sim/place/kernels/gemm.py", "OPERAND_ENERGY, BOOST, BOOST_US: a board at its power limit", "round numbers, "
     "chosen on the float32 products of T4, A100, L4 and V100 together"),
    ("sim/place/nccl_tables.py", "SENDER_COPY_GB_S", "every second size of vidur's sends between two bridged A100s"),
    ("sim/place/nccl_tables.py, docs/collectives.md", "what PCIe, NVLink and staging reach", "published "
     "p2pBandwidthLatencyTest runs"),
    ("sim/place/doubt.py", "shares of doubt in common", "the same microbenchmarks (tools/doubt_shares.py)"),
    ("sim/place/doubt.py", "the host's pace, launches", "paces of public traces' hosts, the traces above among them"),
    ("sim/place/collective_spread.py", "spreads of collectives", "vidur's A100 hosts"),
)  # fmt: skip


def _blocks() -> Iterator[list[str]]:
    for name in shipped_devices():
        calibration = load_device(name).calibration
        for section, value in calibration.model_dump(exclude={"spread"}, exclude_none=True).items():
            for key, block in value.items() if _is_nested(value) else [("", value)]:
                numbers = ", ".join(f"{k} {v:g}" for k, v in block.items() if isinstance(v, int | float))
                if numbers:
                    yield [name, f"{section} {key}".strip(), numbers, block.get("data") or block.get("source", "")]


def _is_nested(value: Mapping[str, Any]) -> bool:
    return all(isinstance(each, Mapping) for each in value.values())


def _curves() -> Iterator[list[str]]:
    for name in shipped_devices():
        for curve, block in load_device(name).measured.model_dump(by_alias=True, exclude_none=True).items():
            yield [f"devices/{name}", curve, block["source"]]
    for path in sorted((ROOT / "topologies").glob("*.yaml")):
        for each in sim.load_topology(path.stem).collectives.measured:
            yield [path.stem, f"{each.kind}, {each.ranks} ranks", each.source]
