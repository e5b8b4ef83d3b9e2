"""The wheel that the project builds: used from another folder, it finds topologies, device profiles, model cards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sim
assert sim.__file__.startswith({where!r}), sim.__file__
from sim.topology.device import load_device
from sim.topology.load import shipped_topologies
assert "a5000x8" in shipped_topologies()
assert load_device("rtx-a5000").sms == 64
graph = sim.synthesize("opt-125m", batch=1, seq=32)
timeline = sim.replay(sim.place(graph, sim.load_topology("a5000x1.yaml")))
sim.write(timeline, "step.pt.trace.json.gz")
print(sim.summarize(timeline).step_ms)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """The wheel, made from the source distribution as an index gets it, unpacked into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, root], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


def test_the_wheel_works_from_another_folder(installed: Path, tmp_path: Path) -> None:
    script = SCRIPT.format(where=str(installed))
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) > 0
    assert (tmp_path / "step.pt.trace.json.gz").stat().st_size > 0
