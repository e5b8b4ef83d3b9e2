"""The command ``tracesim``: its subcommands, and how it ends."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click

from sim.cli.allocator import allocator
from sim.cli.calibrate import calibrate
from sim.cli.collective import collective
from sim.cli.kernel import kernel
from sim.cli.replay import replay
from sim.cli.synth import synth
from sim.cli.topology import topology
from sim.cli.trace import trace
from sim.cli.whatif import whatif
from sim.errors import UnknownNameError, UserError


class _ReaderGoneError(Exception):
    """The reader of our output (head, less) has gone."""


@contextlib.contextmanager
def _reader_gone() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise _ReaderGoneError from None


class _Commands(click.Group):
    """The commands; click would end with exit code 1 where the reader has gone."""

    def make_context(self, *args: Any, **more: Any) -> click.Context:
        with _reader_gone():  # --help prints there
            return super().make_context(*args, **more)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            raise UnknownNameError("command", name, self.list_commands(ctx), "`tracesim --help` tells of each")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _reader_gone():
            return super().invoke(ctx)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="tracesim", prog_name="tracesim")
def cli() -> None:
    """How long will this training step take on that machine, and does it fit?"""


for command in (replay, whatif, synth, trace, collective, allocator, topology, kernel, calibrate):
    cli.add_command(command)


def main(args: Sequence[str] | None = None) -> None:
    """The command: what a user can cause is one line on stderr and exit code 2."""
    words = list(sys.argv[1:] if args is None else args)
    try:
        cli.main(args=words, prog_name="tracesim", standalone_mode=False, obj=words)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
    except click.Abort:
        sys.exit(130)
    except (_ReaderGoneError, BrokenPipeError):
        _no_more_output()  # nothing more to say, and nothing to complain of
    except OSError as error:
        if error.filename is not None:  # a file, not our output: a mistake of ours
            raise
        _refuse(f"standard output: cannot be written ({error.strerror}); send it elsewhere")
        _no_more_output()
        sys.exit(2)
    except (click.ClickException, UserError) as error:
        _refuse(error.format_message() if isinstance(error, click.ClickException) else str(error))
        sys.exit(2)


def _refuse(problem: str) -> None:
    click.echo(f"tracesim: error: {' '.join(problem.split())}", err=True)


def _no_more_output() -> None:
    """What is still in the buffers goes nowhere: nothing is written, and nothing fails, when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
