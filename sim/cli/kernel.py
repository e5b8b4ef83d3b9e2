"""``tracesim kernel``: the time of one kernel alone."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from sim.cli import options
from sim.cli.telling import printer, tell_result
from sim.errors import UserError


@click.command()
@click.argument("op")
@click.option("--shapes", type=options.FILE, metavar="FILE.csv", help="Columns batch, m, n, k or rows, columns.")
@click.option("--batch", type=int, help="Products in one batch (attention: sequences times heads); 1 if not said.")
@click.option("--m", type=int, help="Rows of the product (attention: queries).")
@click.option("--n", type=int, help="Columns of the product (attention: keys).")
@click.option("--k", type=int, help="What is summed over (attention: head size).")
@click.option("--rows", type=int, help="Rows of a softmax, layer norm or elementwise op.")
@click.option("--columns", type=int, help="Columns of it: what a softmax or layer norm normalizes.")
@click.option("--dtype", required=True, metavar="D", help="float32, tfloat32, float16, bfloat16, ...")
@click.option("--device", required=True, metavar="NAME_OR_FILE", help="A shipped device profile or a YAML file.")
@click.option("--strict", is_flag=True, help="Refuse a dtype that the device's profile has no rate for.")
@options.json_out
def kernel(
    op: str, shapes: Path | None, dtype: str, device: str, strict: bool, json_out: str | None, **sizes: int | None
) -> None:
    """Time of one kernel alone: OP is gemm, softmax, layer_norm, attention or an elementwise name (add, relu, ...)."""
    from sim.place.kernels.show import show
    from sim.place.kernels.single import KernelRows, kernel_rows, read_shapes
    from sim.topology.device import load_device

    given = {name: size for name, size in sizes.items() if size is not None}
    if shapes is not None and given:
        raise UserError(f"--shapes and --{next(iter(given))}: give a file of shapes or one shape, not both")
    profile = load_device(device)
    found = kernel_rows(op, read_shapes(shapes, op) if shapes is not None else [given], dtype, profile, strict)
    content = msgspec.json.format(msgspec.json.encode(KernelRows(found)), indent=2) + b"\n"
    tell_result(content, json_out, lambda: show(found, printer()))
