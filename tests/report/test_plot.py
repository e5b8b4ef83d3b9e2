"""The picture of memory: that it is a PNG, the same each time, and what is drawn in it."""

from __future__ import annotations

from pathlib import Path

import matplotlib.figure
import msgspec
import pytest
from told_timelines import GIB, Sketch, out_of_memory, two_ranks

from sim.errors import InputError, UserError
from sim.report.plot import write_memory_plot
from sim.timeline import MemorySample


def test_the_same_timeline_gives_the_same_bytes_without_date_or_version(tmp_path: Path) -> None:
    write_memory_plot(two_ranks(), tmp_path / "a.png")
    write_memory_plot(two_ranks(), tmp_path / "b.png")
    content = (tmp_path / "a.png").read_bytes()
    assert content == (tmp_path / "b.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert b"tEXt" not in content  # where matplotlib would say its version


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """The figures that are saved, to look at what is in them."""
    figures: list[matplotlib.figure.Figure] = []
    save = matplotlib.figure.Figure.savefig

    def keep(figure, *args, **kwargs):  # type: ignore[no-untyped-def]
        figures.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return figures


def test_lines_peak_and_capacity(tmp_path: Path, drawn: list[matplotlib.figure.Figure]) -> None:
    write_memory_plot(two_ranks(), tmp_path / "a.png")
    first, second = drawn[0].axes
    lines = {line.get_label(): line for line in first.get_lines()}
    # 2, 5 and 1 GiB from 0.5, 4 and 9 ms on; the last holds to the end of the last kernel at 26 ms.
    assert list(lines["allocated"].get_xdata()) == [0.5, 4.0, 9.0, 26.0]
    assert list(lines["allocated"].get_ydata()) == [2.0, 5.0, 1.0, 1.0]
    assert list(lines["reserved"].get_ydata()) == [4.0, 6.0, 6.0, 6.0]
    assert set(lines["device memory"].get_ydata()) == {24.0}
    assert [text.get_text() for text in first.texts] == ["peak 5.00 GiB"]
    assert [text.get_text() for text in second.texts] == ["peak 3.00 GiB"]


def test_where_memory_ran_out_is_marked(tmp_path: Path, drawn: list[matplotlib.figure.Figure]) -> None:
    write_memory_plot(out_of_memory(), tmp_path / "a.png")
    texts = [text.get_text() for text in drawn[0].axes[0].texts]
    assert texts == ["peak 22.00 GiB", "out of memory: aten::mm asks 3.00 GiB"]


def test_of_many_ranks_the_highest_are_drawn(tmp_path: Path, drawn: list[matplotlib.figure.Figure]) -> None:
    memory = tuple(MemorySample(rank, 10, (rank + 1) * GIB, 12 * GIB) for rank in range(10))
    write_memory_plot(Sketch(10).timeline(memory=memory), tmp_path / "a.png")
    # Ranks 0 and 1 have the lowest peaks.
    assert [axes.get_title(loc="left")[:6] for axes in drawn[0].axes] == [f"rank {r}" for r in range(2, 10)]


def test_nothing_to_plot_or_no_picture_name_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no memory events"):
        write_memory_plot(msgspec.structs.replace(two_ranks(), memory=()), tmp_path / "a.png")
    with pytest.raises(InputError, match=r"ends in \.png"):
        write_memory_plot(two_ranks(), tmp_path / "a.jpg")
    assert list(tmp_path.iterdir()) == []
