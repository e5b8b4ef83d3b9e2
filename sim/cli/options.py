"""Options that several commands share, and how their words are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sim.errors import UserError
from sim.files import check_can_appear
from sim.pictures import PNG, check_picture
from sim.place.captured import AS_CAPTURED

if TYPE_CHECKING:
    from click.decorators import FC

    from sim.topology.machine import Machine

FILE = click.Path(path_type=Path)
FLOATS = click.Choice(["float16", "bfloat16", "float32"])
MODES = click.Choice(["forward", "train"])
STANDARD_OUTPUT = "-"


def before_the_work(check: Callable[[Path], None]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """An option's callback: that its file cannot be written is said before the work, not behind it."""

    def callback(_: click.Context, __: click.Parameter, value: str | Path | None) -> str | Path | None:
        if value is not None and value != STANDARD_OUTPUT:
            check(Path(value))
        return value

    return callback


def picture(option: str, help: str, formats: Sequence[str] = PNG) -> Callable[[FC], FC]:
    """An option for a picture to be drawn; its name and its place are checked."""
    check = before_the_work(lambda path: check_picture(path, formats))
    return click.option(option, type=FILE, metavar="FILE.png", help=help, callback=check)


inputs = click.argument("inputs", metavar="INPUT...", nargs=-1, required=True, type=FILE)
topology = click.option(
    "--topology", required=True, metavar="NAME_OR_FILE",
    help=f"A shipped machine, a YAML file, or {AS_CAPTURED!r}: the machine the trace was taken on.",
)  # fmt: skip
settings = click.option(
    "--set", "settings", multiple=True, metavar="PATH=VALUE", help="Change a value of the topology."
)
gpus = click.option("--gpus", metavar="I,J,...", help="The topology's GPUs that the ranks go onto, in order.")
alloc_conf = click.option(
    "--alloc-conf", default="", metavar="KEY:VALUE,...",
    help="Settings of the caching allocator, as in PYTORCH_CUDA_ALLOC_CONF.",
)  # fmt: skip
json_out = click.option(
    "--json", "json_out", metavar="FILE|-", help="Write the result as JSON; - is standard output.",
    callback=before_the_work(check_can_appear),
)  # fmt: skip
parallel = click.option(
    "--parallel", default="", metavar="SPEC",
    help="Make several ranks of a training step of one GPU: dp=8 adds what DistributedDataParallel does.",
)  # fmt: skip
contention = click.option(
    "--no-contention", "contention", is_flag=True, flag_value=False, default=True,
    help="Nothing is shared: transfers have their links, kernels all SMs to themselves.",
)  # fmt: skip
samples = click.option(
    "--samples", type=click.IntRange(2, 10_000), default=64, show_default=True, metavar="N",
    help="Draws of what may be wrong, for the ranges.",
)  # fmt: skip
ranges = click.option(
    "--no-ranges", "ranged", is_flag=True, flag_value=False, default=True, help="Do not say how sure the numbers are."
)

_UNITS = ("", "K", "M", "G")
_SIZE = re.compile(r"(?P<count>[0-9]{1,30})((?P<unit>[kmgKMG])(iB)?)?")
MOST_DIGITS = 30  # more than any size or GPU has, and fewer than int() refuses


def numbers(option: str, given: str | None) -> tuple[int, ...]:
    """The whole numbers of ``1,2``; none where the option was not given."""
    if given is None:
        return ()
    parts = given.split(",")
    if not all(part.strip().isascii() and part.strip().isdigit() and len(part) <= MOST_DIGITS for part in parts):
        raise UserError(f"{option} {given!r}: write whole numbers with commas, as in 1,2")
    return tuple(int(part) for part in parts)


def sizes(option: str, given: str) -> tuple[int, ...]:
    """Bytes of ``64MiB,1GiB``, or as nccl-tests has them, ``64M,1G`` (powers of 1024); plain numbers are bytes."""
    found = [_SIZE.fullmatch(part.strip()) for part in given.split(",")]
    if not all(found):
        raise UserError(f"{option} {given!r}: write whole numbers of bytes with commas, as in 1048576,64M,1GiB")
    return tuple(int(size["count"]) << 10 * _UNITS.index((size["unit"] or "").upper()) for size in found if size)


def assignments(settings: Sequence[str]) -> dict[str, str]:
    """What ``--set PATH=VALUE`` says, value by path."""
    values: dict[str, str] = {}
    for setting in settings:
        path, equals, value = setting.partition("=")
        if not (path and equals and value):
            raise UserError(f"--set {setting!r}: write PATH=VALUE, as in links.pcie.bandwidth_gb_s=32")
        if path in values:
            raise UserError(f"--set {path}: is there twice; give it one value")
        values[path] = value
    return values


def check_different(*outputs: str | Path | None) -> None:
    """UserError where two results would go into one file: the later would replace the earlier."""
    given = [Path(each) for each in outputs if each is not None]
    twice = next((path for i, path in enumerate(given) if path in given[:i] and not path.is_char_device()), None)
    if twice is not None:
        raise UserError(f"{twice}: two results cannot go into one file; give each its own")


def machine_of(topology: str, settings: Sequence[str]) -> Machine | None:
    """The machine of ``--topology`` as ``--set`` changes it; None is the one the trace was taken on."""
    if topology == AS_CAPTURED:
        if settings:
            raise UserError(f"--set {settings[0]}: {AS_CAPTURED!r} has no values to change; name a topology")
        return None
    from sim.topology.load import load_topology

    return load_topology(topology, assignments(settings))


def named_machine(topology: str, settings: Sequence[str]) -> Machine:
    """The same where there is no trace whose machine it could be."""
    machine = machine_of(topology, settings)
    if machine is None:
        raise UserError(f"--topology {AS_CAPTURED}: no trace was captured here; name a machine such as a5000x8")
    return machine
