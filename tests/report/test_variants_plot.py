"""The picture of a what-if: nothing of it is cut off."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from sim.report.summary import Breakdown
from sim.report.variants import Value, Variant, WhatIf
from sim.report.variants_plot import draw


def variant(values: dict[str, Value], step_ms: float) -> Variant:
    fields: dict[str, Any] = {field.name: None for field in msgspec.structs.fields(Variant) if field.required}
    parts = Breakdown(compute=100.0, exposed_communication=step_ms - 100.0, exposed_memcpy=0.0, idle=0.0)
    fields |= {"topology": "a5000x8", "values": values, "step_ms": step_ms, "speedup": 1.0, "breakdown_ms": parts}
    fields |= {"exposed_communication_ms": step_ms - 100.0, "out_of_memory": False, "critical_path": ()}
    return Variant(**fields)


@pytest.mark.parametrize("varied", [1, 2, 3])
def test_every_legend_and_label_lies_inside(varied: int) -> None:
    paths = ("links.pcie.bandwidth_gb_s", "links.socket.bandwidth_gb_s", "host.op_us")[:varied]
    grid = list(itertools.product((8, 64), repeat=varied))
    rows = [variant(dict(zip(paths, values, strict=True)), 150.0 + 100 * (values[0] == 8)) for values in grid]
    figure = draw(WhatIf("job", variant(dict.fromkeys(paths, 24), 160.0), tuple(rows)))
    FigureCanvasAgg(figure).draw()
    for panel in figure.axes:
        legend = panel.get_legend()
        assert legend is not None
        for part in (legend, *panel.texts):
            box = part.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1
        for text in panel.texts:
            assert text.get_window_extent().x1 <= panel.bbox.x1
