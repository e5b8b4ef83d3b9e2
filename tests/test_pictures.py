"""Pictures as files: the same figure gives the same bytes in every format, and a file is whole or not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from sim.errors import InputError
from sim.pictures import DRAWINGS, check_picture, write_picture


def _figure() -> Figure:
    figure = Figure()
    figure.subplots().plot([1, 2], [3, 4], label="a line")
    figure.legend()
    return figure


@pytest.mark.parametrize(("kind", "begin"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_same_figure_gives_the_same_bytes(tmp_path: Path, kind: str, begin: bytes) -> None:
    """Neither the day nor a name drawn at random is in the file: matplotlib writes both unless told."""
    first, second = tmp_path / f"a.{kind}", tmp_path / f"b.{kind}"
    write_picture(_figure(), first, DRAWINGS)
    write_picture(_figure(), second, DRAWINGS)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().startswith(begin)
    assert not any(word in first.read_bytes() for word in (b"CreationDate", b"dc:date"))


def test_a_picture_that_fails_while_it_is_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(figure: Figure, file: object, **_: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise RuntimeError("no glyph")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(RuntimeError):
        write_picture(_figure(), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_a_name_says_what_the_picture_is(tmp_path: Path) -> None:
    check_picture(tmp_path / "a.PNG")
    with pytest.raises(InputError, match=r"the plot is a PNG: choose a name that ends in \.png"):
        check_picture(tmp_path / "a.svg")
    with pytest.raises(InputError, match=r"the plot is a PNG, SVG or PDF: choose .* \.png, \.svg or \.pdf"):
        check_picture(tmp_path / "a", DRAWINGS)


@pytest.mark.parametrize(
    "command",
    [
        ["topology", "absent", "--plot"],
        ["replay", "absent", "--topology", "absent", "--memory-plot"],
        ["whatif", "absent", "--topology", "absent", "--plot"],
        ["calibrate", "--compare", "absent", "absent", "--plot"],
    ],
)
def test_what_cannot_be_drawn_there_is_told_before_the_work(
    refused: Callable[..., str], tmp_path: Path, command: list[str]
) -> None:
    """The inputs are not even looked for."""
    for place in (tmp_path / "no" / "x.png", tmp_path / "x.xyz"):
        assert refused(*command, place).startswith(f"tracesim: error: {place}: ")


@pytest.mark.parametrize(
    "command",
    [
        ["collective", "all_reduce", "--bytes", "8", "--ranks", "2", "--topology", "absent"],
        ["kernel", "gemm", "--dtype", "float16", "--device", "absent"],
        ["allocator", "absent.pickle"],
        ["whatif", "absent", "--topology", "absent", "--solve", "a", "--target", "speedup=2"],
    ],
)
def test_json_that_cannot_be_there_is_told_before_the_work(
    refused: Callable[..., str], tmp_path: Path, command: list[str]
) -> None:
    place = tmp_path / "no" / "x.json"
    assert refused(*command, "--json", place).startswith(f"tracesim: error: {place}: ")
