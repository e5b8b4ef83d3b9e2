"""What a command tells while it works, and where its result goes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from rich.console import Console

from sim.cli.options import STANDARD_OUTPUT
from sim.files import write_whole

LEAST_WIDTH = 80  # columns: in less a table's numbers would be cut; a narrower terminal wraps its lines


class _Printer(Console):
    """Prints to standard output; that its reader (head, less) has gone is the command's to answer, as everywhere."""

    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704 - rich calls this while it handles the BrokenPipeError


def printer() -> Console:
    """Where results for people go."""
    console = _Printer(soft_wrap=False)
    console.width = max(console.width, LEAST_WIDTH)
    return console


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done, on a terminal only."""
    if sys.stderr is None:  # closed before we began
        yield lambda _: None
        return
    with Console(stderr=True).status("starting") as status:
        yield status.update


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr, on a terminal only: what is done, of how much, and what comes next."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        bar = shown.add_task("starting")
        yield lambda done, total, doing: shown.update(bar, completed=done, total=total, description=doing)


def line_by_line() -> Callable[[str], None]:
    """The same beside the output of a script, which a status line would garble."""
    return lambda doing: click.echo(f"tracesim: {doing}", err=True) if sys.stderr.isatty() else None


@contextlib.contextmanager
def own_streams() -> Iterator[None]:
    """A script may put something else in the place of its output; what follows is ours to say."""
    with contextlib.redirect_stdout(sys.stdout), contextlib.redirect_stderr(sys.stderr):
        yield


def tell_result(content: bytes, json_out: str | None, render: Callable[[], None]) -> None:
    """The result as JSON where it is asked for, and as text unless standard output has the JSON."""
    if json_out == STANDARD_OUTPUT:
        click.echo(content, nl=False)
        return
    if json_out is not None:
        write_whole(Path(json_out), content)
    render()
