"""What a kernel computes: the op it was launched from, with shapes and dtypes, as the trace records them."""

from __future__ import annotations

import msgspec

from sim.ops import TensorMeta, Work
from sim.workload.kineto import HostEvent

# Scalar types as the profiler writes an op's inputs, by their C++ names (caffe2::TypeMeta::name), and torch's names.
# A capital ("Int", "Double") is a Python scalar there, not a tensor.
DTYPES = {
    "float": "float32", "double": "float64", "c10::Half": "float16", "c10::BFloat16": "bfloat16",
    "long int": "int64", "long": "int64", "long long": "int64", "int": "int32", "short int": "int16", "short": "int16",
    "signed char": "int8", "unsigned char": "uint8", "bool": "bool",
    "c10::complex<float>": "complex64", "c10::complex<double>": "complex128",
    "c10::Float8_e4m3fn": "float8_e4m3fn", "c10::Float8_e5m2": "float8_e5m2",
}  # fmt: skip
# The names that collectives are recorded with (c10/core/ScalarType.h).
SCALAR_TYPES = {
    "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
    "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
    "ComplexFloat": "complex64", "ComplexDouble": "complex128",
    "Float8_e4m3fn": "float8_e4m3fn", "Float8_e5m2": "float8_e5m2",
}  # fmt: skip


class Works:
    """The distinct works of a graph; ``index`` gives each op's, adding it where it is new."""

    def __init__(self) -> None:
        self.found: dict[Work, int] = {}
        self._raw: dict[tuple[bytes, ...], int] = {}

    def index(self, op: HostEvent) -> int:
        args = op.args
        key = (op.name.encode(), bytes(args.dims), bytes(args.types), bytes(args.strides), bytes(args.concrete))
        index = self._raw.get(key)
        if index is None:
            index = self._raw[key] = self.found.setdefault(_work(op), len(self.found))
        return index


def _work(op: HostEvent) -> Work:
    args = op.args
    dims, types = _list(args.dims), _list(args.types)
    strides, concrete = _list(args.strides), _list(args.concrete)
    inputs: list[TensorMeta] = []
    scalars: list[tuple[str, bool | int | float | str]] = []
    for i, shape in enumerate(dims):
        written = types[i] if i < len(types) else ""
        dtype = DTYPES.get(written, "") if isinstance(written, str) else ""
        stride = strides[i] if i < len(strides) else None
        if dtype and _ints(shape):
            inputs.append(_tensor(dtype, shape, stride))
        elif isinstance(shape, list) and shape and all(_ints(s) for s in shape):
            inputs.extend(_list_metas(shape, written, stride))
        elif i < len(concrete) and isinstance(concrete[i], str) and concrete[i]:
            scalars.append((f"arg{i}", _scalar(concrete[i])))
    return Work(op.name, tuple(inputs), (), tuple(scalars))


def _list_metas(shapes: list[list[int]], written: object, stride: object) -> list[TensorMeta]:
    """A tensor list: one dtype for all, or one each (``TensorList`` alone says none)."""
    names = written if isinstance(written, list) else [written] * len(shapes)
    strides = stride if isinstance(stride, list) and len(stride) == len(shapes) else [None] * len(shapes)
    return [
        _tensor((DTYPES.get(n) if isinstance(n, str) else None) or "float32", shape, s)
        for n, shape, s in zip(names, shapes, strides, strict=False)
    ]


def _tensor(dtype: str, shape: list[int], stride: object) -> TensorMeta:
    if not isinstance(stride, list) or not _ints(stride) or len(stride) != len(shape) or stride == _contiguous(shape):
        return TensorMeta(dtype, tuple(shape))
    return TensorMeta(dtype, tuple(shape), tuple(stride))


def _contiguous(shape: list[int]) -> list[int]:
    stride, strides = 1, []
    for size in reversed(shape):
        strides.append(stride)
        stride *= max(size, 1)
    return strides[::-1]


def _ints(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)


def _list(raw: msgspec.Raw) -> list:  # type: ignore[type-arg]
    try:
        value = msgspec.json.decode(raw)
    except msgspec.DecodeError:
        return []
    return value if isinstance(value, list) else []


def _scalar(written: str) -> bool | int | float | str:
    if written in ("True", "False"):
        return written == "True"
    for kind in (int, float):
        try:
            return kind(written)
        except ValueError:
            continue
    return written
