"""``tracesim calibrate``: this machine measured into a device profile and a topology; or two of them compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sim.cli import options
from sim.cli.telling import printer, progress, progress_bar
from sim.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sim.workload.calibrate.spec import CalibrateSpec


@click.command()
@click.option("--out", type=options.FILE, metavar="FILE.yaml", help="The device profile to write.")
@click.option("--links", is_flag=True, help="Measure collectives over all devices too, under torchrun.")
@click.option("--quick", is_flag=True, help="Fewer and smaller sizes.")
@click.option(
    "--only",
    metavar="SECTION,...",
    help="Measure only these of host, launch, gemm, copy, elementwise, softmax, layer_norm, attention, links.",
)
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Of a CPU; torchrun gives each rank one.")
@click.option("--grid", type=click.Choice(["full", "quick", "tiny"]), hidden=True)
@click.option("--compare", nargs=2, metavar="A B", help="Measure nothing: two profiles or topologies side by side.")
@options.picture("--plot", "With --compare: draw them.")
@click.pass_obj
def calibrate(
    words: Sequence[str],
    /,
    out: Path | None,
    links: bool,
    quick: bool,
    only: str | None,
    threads: int | None,
    grid: str | None,
    compare: tuple[str, str] | None,
    plot: Path | None,
) -> None:
    """Measure this machine's devices and links into a device profile and a topology; or compare two."""
    if compare is not None:
        if out is not None or links or quick or only or threads:
            raise UserError("--compare measures nothing: give it two profiles, and --plot FILE.png, alone")
        _compare(compare, plot)
        return
    if out is None or plot is not None:
        raise UserError("give --out FILE.yaml to measure this machine, or --compare A B [--plot FILE.png]")
    from sim.workload.calibrate.spec import GRIDS, CalibrateSpec, check_out, sections_of

    check_out(out)
    chosen = GRIDS[grid or ("quick" if quick else "full")]
    spec = CalibrateSpec(sections_of(only, links), chosen, threads, ("tracesim", *words))
    _measure(spec, out)


def _measure(spec: CalibrateSpec, out: Path) -> None:
    from sim.place.calibration.write import tell_fits, write_files
    from sim.workload.calibrate.about import unused_gpus
    from sim.workload.calibrate.journal import Journal
    from sim.workload.calibrate.run import machine_for, measure
    from sim.workload.calibrate.spec import partial_file

    if unused_gpus():
        click.echo(f"tracesim: {unused_gpus()}", err=True)
    with Journal(partial_file(out), machine_for(spec)) as journal:
        if journal.resumed:
            click.echo(f"tracesim: going on after {journal.resumed} measurements of {journal.path}", err=True)
        try:
            with progress_bar() as tell:
                left_out = measure(spec, journal, tell)
        except KeyboardInterrupt:
            kept = len(journal.taken)
            click.echo(
                f"tracesim: interrupted; {kept} measurements are kept in {journal.path}, the same command goes on",
                err=True,
            )
            raise click.Abort from None
        with progress() as tell_line:
            tell_line("fitting the models to the measurements")
            done = write_files(journal.measurements(), out)
        journal.remove()
    tell_fits(done, [one.why for one in left_out], printer())


def _compare(names: tuple[str, str], plot: Path | None) -> None:
    from sim.place.calibration import compare

    left, right = (compare.read_side(name) for name in names)
    if plot is not None:
        from sim.place.calibration.compare_plot import write_plot

        write_plot(left, right, plot)
    compare.show(left, right, printer())
    if plot is not None:
        click.echo(f"drawn to {plot}")
