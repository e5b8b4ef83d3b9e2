"""A step whose time can be written down: layers, and an all-reduce a layer that hides behind the backward pass."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from sim.place.place import place
from sim.replay.engine import run
from sim.topology.load import load_topology
from sim.whatif.outcome import outcome
from tests.whatif.layers import layered, ring_machine


def test_communication_that_cannot_hide(tmp_path: Path) -> None:
    # A ring of 8 at 12 GiB/s and 5 us a hop: 2 x 7 steps of (100 MiB / 8) / 12 GiB/s + 5 us = 14 x (1.01725 + 0.005)
    # = 14.3115 ms an all-reduce.  Compute is 24 x 20 = 480 ms.  Each all-reduce hides behind the next layer's 10 ms of
    # backward; the 23 that have one leave 4.3115 ms each = 99.165, and the last hides behind nothing: 14.3115.
    # 480 + 99.165 + 14.3115 = 593.477 ms.
    told = outcome(layered(8), load_topology(str(ring_machine(tmp_path, 8))))
    assert told.summary.step_ms == pytest.approx(593.477, rel=1e-5)
    assert told.summary.breakdown_ms.compute == pytest.approx(480)
    assert told.summary.breakdown_ms.exposed_communication == pytest.approx(113.477, rel=1e-4)


def test_communication_that_hides(tmp_path: Path) -> None:
    # At 24 GiB/s an all-reduce takes 14 x (0.50863 + 0.005) = 7.1908 ms, less than a layer's backward: only the last
    # is seen, 480 + 7.1908.
    told = outcome(layered(8), load_topology(str(ring_machine(tmp_path, 8, gib_s=24))))
    assert told.summary.step_ms == pytest.approx(487.1908, rel=1e-5)


@pytest.mark.parametrize("folding", [True, False])
@pytest.mark.parametrize(("ranks", "limit_s"), [(8, 0.2), (256, 5.0)])
def test_the_event_loop_is_quick(tmp_path: Path, ranks: int, limit_s: float, folding: bool) -> None:
    """Processor time of this process, so that a busy machine does not decide; also with every rank replayed."""
    placement = place(layered(ranks), load_topology(str(ring_machine(tmp_path, ranks))))
    begun = time.process_time()
    run(placement, folding=folding)
    assert time.process_time() - begun < limit_s
