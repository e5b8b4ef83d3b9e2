"""One kernel called alone, or a file of them: time, 80 % interval, what bounds it, where the number is from.

``us`` is what the calibration's microbenchmark of that class of op measures: for attention and products on tensor cores
the kernel's own duration; for products in float32, elementwise ops, softmax and layer norm device events around one
call, which hold ``call_us`` of the host's work besides ``kernel_us`` (docs/kernels.md, "A call and its kernel").  A
replay takes the kernel's own duration, on a device that has been busy for long.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from sim.errors import InputError, UnknownNameError, UserError
from sim.ops import DTYPE_BYTES
from sim.place.kernels.attention import fused_us
from sim.place.kernels.gemm import call_us, product_lender, products, products_us
from sim.place.kernels.memory import Floats, beside, element_us, floor_us, memory_us, op_us
from sim.place.kernels.rows import RowOp, rows_us
from sim.timeline import DurationSource
from sim.topology.abilities import UNKNOWN, Abilities, abilities_of, family
from sim.topology.device import DeviceProfile

# Tensors that an elementwise op reads and writes.  A name that ends in u takes a number in place of its second tensor.
TWO_INPUTS = (
    "add", "sub", "mul", "div", "pow", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge", "atan2", "fmod",
    "remainder", "silu_backward", "gelu_backward", "tanh_backward", "sigmoid_backward", "threshold_backward",
)  # fmt: skip
ONE_INPUT = (
    "relu", "gelu", "silu", "tanh", "sigmoid", "exp", "log", "sqrt", "rsqrt", "neg", "abs", "sin", "cos", "erf",
    "square", "reciprocal", "clamp", "copy", "clone", "elu", "softplus", "leaky_relu", "hardtanh",
)  # fmt: skip
TENSORS: dict[str, int] = {
    **dict.fromkeys(ONE_INPUT, 2), **dict.fromkeys(TWO_INPUTS, 3), **{f"{op}u": 2 for op in TWO_INPUTS[:5]},
    "fill": 1, "zero": 1, "sum": 1, "mean": 1, "where": 4, "addcmul": 4, "addcdiv": 4, "lerp": 4,
}  # fmt: skip
PRODUCTS = ("gemm", "linear", "bmm", "mm")
ROW_OPS: dict[str, RowOp] = {
    "softmax": "softmax",
    "log_softmax": "softmax",
    "layer_norm": "layer_norm",
    "ln": "layer_norm",
}
ATTENTION = ("attention", "attention_efficient", "attention_backward", "attention_efficient_backward")
OPS = (*PRODUCTS, *ROW_OPS, *ATTENTION, *TENSORS)
MOST_PROBLEMS = 20
LARGEST = 1e21  # the product of a shape's sizes: beyond any memory, and below what a float counts


class KernelRow(msgspec.Struct, frozen=True, rename={"from_": "from"}, omit_defaults=True):
    """One kernel's time.  ``us_p10`` to ``us_p90`` holds four of five measured times of such kernels."""

    op: str
    dtype: str
    device: str
    us: float
    us_p10: float
    us_p90: float
    kernel_us: float
    call_us: float
    bound: str
    from_: DurationSource
    calibrated_on: str
    batch: int | None = None
    m: int | None = None
    n: int | None = None
    k: int | None = None
    rows: int | None = None
    columns: int | None = None
    computed_in: str | None = None  # where the profile has no rate for the dtype


class KernelRows(msgspec.Struct, frozen=True):
    """What ``kernel --json`` writes."""

    rows: list[KernelRow]


Shape = Mapping[str, int]


def needed(op: str) -> tuple[str, ...]:
    """The sizes that an op needs; UnknownNameError for an op without a model."""
    if op not in OPS:
        raise UnknownNameError("op", op, OPS)
    return ("rows", "columns") if op in ROW_OPS or op in TENSORS else ("m", "n", "k")


def read_shapes(path: Path, op: str) -> list[dict[str, int]]:
    """The shapes of a CSV file with a header; InputError with every bad line at once.  Other columns are left alone."""
    wanted = needed(op)
    reader = _reader(path)
    header = reader.fieldnames or []
    missing = [name for name in wanted if name not in header]
    if missing:
        found = ", ".join(header) or "nothing"
        raise InputError(path, f"line 1: no column {' and no '.join(missing)} ({op} needs them); found {found}")
    twice = sorted({name for name in (*wanted, "batch") if list(header).count(name) > 1})
    if twice:
        raise InputError(path, f"line 1: the column {' and the column '.join(twice)} stands twice; which is meant?")
    shapes: list[dict[str, int]] = []
    problems: list[str] = []
    optional = ["batch"] if "batch" in header and "m" in wanted else []
    try:
        for row in reader:
            if None in row:
                problems.append(f"line {reader.line_num}: more values than the header has columns")
            shape = {}
            for name in (*wanted, *optional):
                value = _size(row[name])
                if value is None:
                    found = "nothing" if row[name] is None else repr(row[name])
                    problems.append(f"line {reader.line_num}: {name} must be a whole number above 0, found {found}")
                else:
                    shape[name] = value
            shapes.append(shape)
    except csv.Error as error:
        problems.append(f"line {reader.line_num}: not CSV: {error}")
    if problems:
        more = f"; and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        raise InputError(path, "; ".join(problems[:MOST_PROBLEMS]) + more)
    if not shapes:
        raise InputError(path, "has no shapes: a header alone, or nothing")
    return shapes


def _reader(path: Path) -> csv.DictReader[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(path, "is not UTF-8 text; a shapes file is CSV with a header") from None
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
    except csv.Error as error:
        raise InputError(path, f"line 1: not CSV: {error}") from None
    return reader


def _size(written: str | None) -> int | None:
    text = (written or "").strip()
    if not text.isascii() or not text.isdigit() or len(text) > 15 or int(text) == 0:
        return None
    return int(text)


def kernel_rows(
    op: str, shapes: Sequence[Shape], dtype: str, device: DeviceProfile, strict: bool = False
) -> list[KernelRow]:
    """Time of every shape.

    Raises UnknownNameError for an op or a dtype without a model, UserError for a size below 1; where ``strict`` also
    for a dtype that the device computes in another.
    """
    wanted = needed(op)
    if dtype not in DTYPE_BYTES:
        raise UnknownNameError("dtype", dtype, DTYPE_BYTES)
    _check(op, wanted, shapes)
    computed_in = _computed_in(op, dtype, device)
    if strict and computed_in:
        raise UserError(
            f"--strict: the profile of {device.name} has no rate for {dtype} (it has {', '.join(device.tflops)}); "
            f"without --strict it is computed in {computed_in}"
        )
    abilities = abilities_of(device)
    columns = {name: np.array([s[name] for s in shapes], dtype=np.float64) for name in wanted}
    if "m" in wanted:
        columns["batch"] = np.array([s.get("batch", 1) for s in shapes], dtype=np.float64)
    timed = _timed(op, columns, dtype, abilities)
    low, high = UNKNOWN if computed_in else abilities.interval(_spread_name(op, dtype))[:2]
    source: DurationSource = "roofline" if timed.lender else "profile"
    total = timed.kernel_us + timed.call_us
    return [
        KernelRow(
            op=op,
            dtype=dtype,
            device=device.name,
            us=us,
            us_p10=us * low,
            us_p90=us * high,
            kernel_us=kernel,
            call_us=call,
            bound=bound,
            from_=source,
            calibrated_on=timed.lender or device.name,
            computed_in=computed_in,
            **_sizes(shape, wanted),
        )
        for shape, us, kernel, call, bound in zip(
            shapes, total.tolist(), timed.kernel_us.tolist(), timed.call_us.tolist(), timed.bounds, strict=True
        )
    ]


def _computed_in(op: str, dtype: str, device: DeviceProfile) -> str | None:
    """What a product in a dtype without a rate is computed in; None where it has one, or where bytes decide."""
    return None if dtype in device.tflops or op not in (*PRODUCTS, *ATTENTION) else "float32"


def _sizes(shape: Shape, wanted: Iterable[str]) -> dict[str, int]:
    sizes = {name: shape[name] for name in wanted}
    return {"batch": shape.get("batch", 1), **sizes} if "m" in sizes else sizes


def _check(op: str, wanted: tuple[str, ...], shapes: Sequence[Shape]) -> None:
    def batched(name: str) -> bool:
        return name == "batch" and "m" in wanted

    problems = []
    for shape in shapes:
        problems += [f"{name} is missing" for name in wanted if name not in shape]
        problems += [f"{name} is no size of it" for name in shape if name not in wanted and not batched(name)]
        problems += [f"{name} must be above 0, found {size}" for name, size in shape.items() if size <= 0]
        if not problems and np.prod([float(size) for size in shape.values()]) > LARGEST:
            problems.append("the sizes are larger than any memory")
    if problems:
        raise UserError(f"{op}: {'; '.join(dict.fromkeys(problems))} (it needs {', '.join(wanted)})")


class _Timed(msgspec.Struct, frozen=True):
    kernel_us: Floats
    call_us: Floats
    bounds: list[str]
    lender: str


def _timed(op: str, columns: Mapping[str, Floats], dtype: str, abilities: Abilities) -> _Timed:
    floor = floor_us(abilities.profile)
    if op in PRODUCTS:
        shapes = products(columns["batch"], columns["m"], columns["n"], columns["k"], dtype)
        times = products_us(shapes, dtype, abilities, alone=True)
        bounds = np.where(times.us <= floor, "floor", np.where(times.computing, "compute", "memory"))
        call = call_us(shapes, dtype, abilities)
        return _Timed(np.maximum(times.us, floor), call, bounds.tolist(), product_lender(dtype, abilities))
    if op in ATTENTION:
        return _attention(op, columns, dtype, abilities)
    rows, width, size = columns["rows"], columns["columns"], DTYPE_BYTES[dtype]
    host_part = abilities.call.fit
    if op in ROW_OPS:
        kind = ROW_OPS[op]
        lent = abilities.rows[kind]
        us = np.maximum(rows_us(kind, rows, width, size, abilities), floor)
        row_call = host_part.softmax if kind == "softmax" else host_part.layer_norm
        return _Timed(us, np.full_like(us, row_call), ["memory"] * len(us), "" if lent.own else lent.device)
    moving = memory_us(rows * width * size * TENSORS[op], abilities) - floor
    us = floor + op_us(op, abilities) + beside(moving, element_us(op, rows * width, abilities))
    bounds = np.where(us < 2 * floor, "floor", "memory").tolist()
    host = np.full_like(us, host_part.elementwise)
    return _Timed(us, host, bounds, "" if abilities.memory.own else abilities.memory.device)


def _attention(op: str, columns: Mapping[str, Floats], dtype: str, abilities: Abilities) -> _Timed:
    """Fused attention without a mask: ``batch`` heads of all sequences, m queries, n keys, heads of size k."""
    batch, m, n, k = (columns[name] for name in ("batch", "m", "n", "k"))
    backward = op.endswith("backward")
    floor = floor_us(abilities.profile)
    compute = floor + fused_us(batch, m, n, k, dtype, abilities, "efficient" in op, backward)
    memory = memory_us(DTYPE_BYTES[dtype] * batch * k * (2 * m + 2 * n) * (2 if backward else 1), abilities)
    bounds = np.where(compute >= memory, "compute", "memory").tolist()
    lent = abilities.attention
    return _Timed(np.maximum(compute, memory), np.zeros_like(compute), bounds, "" if lent.own else lent.device)


def _spread_name(op: str, dtype: str) -> str:
    """The class of kernels whose held-out errors are this one's."""
    if op in PRODUCTS:
        return f"gemm_{family(dtype)}"
    return "attention" if op in ATTENTION else ROW_OPS.get(op, "elementwise")
