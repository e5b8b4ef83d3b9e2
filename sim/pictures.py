"""Pictures as files: named as what they are, whole or not at all, the same to the byte for the same figure."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sim.errors import InputError
from sim.files import check_can_appear, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that people with colour blindness tell apart (Okabe and Ito, "Color Universal Design", 2008).
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
DPI = 120

PNG = ("png",)
DRAWINGS = ("png", "svg", "pdf")  # for lines and boxes, which scale

# What matplotlib would write of itself and of the day.
_UNDATED: Mapping[str, Mapping[str, None]] = {
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
}


def check_picture(path: Path, formats: Sequence[str] = PNG) -> None:
    """Before the work: InputError where a picture cannot have that name, or cannot be written there."""
    _format_of(path, formats)
    check_can_appear(path)


def write_picture(figure: Figure, path: Path, formats: Sequence[str] = PNG) -> None:
    """Write a figure in the format that the name ends in.  InputError where it ends otherwise or cannot be written."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    kind = _format_of(path, formats)
    FigureCanvasAgg(figure)
    content = io.BytesIO()
    with rc_context({"svg.hashsalt": "tracesim"}):  # otherwise names in the file are drawn at random
        figure.savefig(content, format=kind, metadata=_UNDATED[kind])
    write_whole(path, content.getvalue())


def _format_of(path: Path, formats: Sequence[str]) -> str:
    kind = path.suffix.removeprefix(".").lower()
    if kind not in formats:
        kinds, endings = _any_of([each.upper() for each in formats]), _any_of([f".{each}" for each in formats])
        raise InputError(path, f"the plot is a {kinds}: choose a name that ends in {endings}")
    return kind


def _any_of(words: Sequence[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last
