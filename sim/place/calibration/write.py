"""The files of a calibration: the device profile, the topology beside it, and what is told about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from sim.files import appearing
from sim.measurements import Measurements
from sim.place.calibration.fit import Judged
from sim.place.calibration.machine import machine_of
from sim.place.calibration.profile import Profiled, as_yaml, profile_of
from sim.topology.load import load_topology

SUFFIX = ".yaml"
# From this share of disturbed batches on it is said that others used the machine.
BUSY = 0.1


class Written(NamedTuple):
    """What was written, and how near the models come to samples that no fit saw."""

    device: Path
    topology: Path
    samples: int
    disturbed: float
    threads: int
    judged: Sequence[Judged]


def topology_file(out: Path) -> Path:
    """The machine's file beside the device's: ``cpu.yaml`` and ``cpu.topology.yaml``."""
    return out.with_name(f"{out.name.removesuffix(SUFFIX)}.topology{SUFFIX}")


def write_files(taken: Measurements, out: Path) -> Written:
    """Both files appear when both are written and can be read again."""
    name = out.name.removesuffix(SUFFIX)
    profiled = profile_of(taken, name)
    beside = topology_file(out)
    machine = machine_of(taken, name, profiled.profile, out.name)
    with appearing(out) as device_file, appearing(beside) as machine_file:
        device_file.write_text(
            as_yaml(profiled.data, "A device profile that tracesim calibrate measured; see docs/calibrate.md.")
        )
        machine_file.write_text(as_yaml(machine, "A topology that tracesim calibrate measured; see docs/calibrate.md."))
    load_topology(str(beside))
    return _told(taken, out, beside, profiled)


def _told(taken: Measurements, out: Path, beside: Path, profiled: Profiled) -> Written:
    kept = sum(s.repeats for s in taken.samples)
    disturbed = sum(s.disturbed for s in taken.samples)
    return Written(
        out, beside, len(taken.samples), disturbed / max(kept + disturbed, 1), taken.machine.threads, profiled.judged
    )


def tell_fits(done: Written, left_out: Sequence[str], console: Console) -> None:
    """What was written, how well it predicts, why sizes were left out, and what to do with it."""
    if done.judged:
        table = Table(
            title="Each sample by a fit that had not seen it: measured over predicted",
            title_justify="left",
            box=None,
            pad_edge=False,
        )
        for name in ("", "samples", "p10", "median", "p90", "mean error"):
            table.add_column(name, justify="right" if name else "left")
        for one in done.judged:
            low, middle, high = (f"{value:.2f}" for value in np.quantile(one.ratio, [0.1, 0.5, 0.9]))
            mean = f"{100 * float(np.abs(1 / one.ratio - 1).mean()):.1f} %"
            table.add_row(one.name, str(len(one.ratio)), low, middle, high, mean)
        console.print(table)
    for why, count in Counter(left_out).most_common():
        console.print(f"{count} size{'s were' if count > 1 else ' was'} left out: {why}")
    if done.disturbed > BUSY:
        console.print(
            f"others used the machine: {100 * done.disturbed:.0f} % of the batches were disturbed and are not counted; "
            "an idle machine gives better numbers"
        )
        if done.threads > 1:
            console.print("what several threads take then may be far off; --threads 1 takes CPU time")
    console.print(f"{done.device} and {done.topology}: {done.samples} measurements; use them with", soft_wrap=True)
    console.print(
        f"  tracesim kernel gemm --m 1024 --n 1024 --k 1024 --dtype float32 --device {done.device}", soft_wrap=True
    )
    console.print(f"  tracesim replay WORKLOAD --topology {done.topology}", soft_wrap=True)
