"""Tasks of the kernels' sections: tensors of a size on the device, and the call on them.

Calls allocate their results, as calls in a model do: on a CPU the pages of large results are mapped anew every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from torch.nn.attention import SDPBackend, sdpa_kernel

from sim.units import MIB
from sim.workload.calibrate.about import like_gpus
from sim.workload.calibrate.spec import Grid

Call = Callable[[], Any]
DTYPES = {
    "float32": torch.float32, "tfloat32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
}  # fmt: skip
# More than the last caches of CPUs and GPUs hold.
COLD_BYTES, MOST_WEIGHTS = 128 * MIB, 64
FROM_AMPERE_ON = ("tfloat32", "bfloat16")


class Task(NamedTuple):
    """One sample to take.  ``work``: operations or bytes, by which the time of larger ones is foreseen; ``nbytes``: of
    all tensors; ``make``: the tensors on a device, then the call; ``gpu``: whose stream it runs on."""

    section: str
    what: str
    sizes: tuple[int, ...]
    work: float
    nbytes: float
    make: Callable[[torch.device], Call]
    gpu: int = 0

    @property
    def key(self) -> tuple[str, str, tuple[int, ...]]:
        """As a sample's."""
        return self.section, self.what, self.sizes


def product_dtypes(device: torch.device) -> tuple[str, ...]:
    """The dtypes whose products are worth measuring: a CPU has kernels for float32 and bfloat16."""
    if device.type == "cpu":
        return "float32", "bfloat16"
    old = torch.cuda.get_device_capability(device) < (8, 0)
    return tuple(name for name in DTYPES if not (old and name in FROM_AMPERE_ON))


def tasks(section: str, grid: Grid, device: torch.device) -> list[Task]:
    """The tasks of a section, small ones first."""
    found = _SECTIONS[section](grid, device)
    return sorted({task.key: task for task in found}.values(), key=lambda t: (t.what, t.work))


def _random(device: torch.device, dtype: str, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=torch.float32).to(DTYPES[dtype])


# Products ----------------------------------------


def _gemm(grid: Grid, device: torch.device) -> Iterator[Task]:
    for dtype in product_dtypes(device):
        for side in grid.squares:
            yield _product(dtype, 1, side, side, side)
        for m, n, k in grid.layers:
            yield _product(dtype, 1, m, n, k)
        for batch, m, n, k in grid.batched:
            yield _product(dtype, batch, m, n, k)


def _copies_beyond_cache(nbytes: int) -> int:
    """A model comes back to a weight when others have been used: so many weights that no cache holds them."""
    return max(1, min(MOST_WEIGHTS, COLD_BYTES // nbytes))


def _product(dtype: str, batch: int, m: int, n: int, k: int) -> Task:
    size = DTYPES[dtype].itemsize

    def make(device: torch.device) -> Call:
        torch.backends.cuda.matmul.allow_tf32 = dtype == "tfloat32"
        if batch > 1:
            left, right = _random(device, dtype, batch, m, k), _random(device, dtype, batch, k, n)
            return lambda: torch.bmm(left, right)
        rows = _random(device, dtype, m, k)
        weight = _random(device, dtype, n, k)
        weights = cycle([weight.clone().t() for _ in range(_copies_beyond_cache(size * n * k))])
        return lambda: torch.mm(rows, next(weights))

    size = DTYPES[dtype].itemsize
    return Task("gemm", dtype, (batch, m, n, k), 2.0 * batch * m * n * k, size * batch * (m * k + k * n + m * n), make)


# Bytes ----------------------------------------

_ELEMENTWISE: dict[str, tuple[int, Callable[[torch.Tensor, torch.Tensor], Any]]] = {
    "add": (3, torch.add),
    "mulu": (2, lambda a, b: torch.mul(a, 2.0)),
    "relu": (2, lambda a, b: torch.relu(a)),
    "gelu": (2, lambda a, b: nnf.gelu(a)),
    "tanh": (2, lambda a, b: torch.tanh(a)),
    "exp": (2, lambda a, b: torch.exp(a)),
    "pow": (2, lambda a, b: torch.pow(a, 3.0)),  # as in GPT-2's activation
}


def _elementwise(grid: Grid, device: torch.device) -> Iterator[Task]:
    for name, (tensors, function) in _ELEMENTWISE.items():
        for elements in grid.streams:
            yield _stream(name, tensors, function, elements)


def _stream(name: str, tensors: int, function: Callable[[torch.Tensor, torch.Tensor], Any], elements: int) -> Task:
    def make(device: torch.device) -> Call:
        left = _random(device, "float32", elements)
        right = _random(device, "float32", elements) if tensors == 3 else left
        return lambda: function(left, right)

    nbytes = 4.0 * tensors * elements
    return Task("elementwise", name, (1, elements), nbytes, nbytes, make)


def _softmax(grid: Grid, device: torch.device) -> Iterator[Task]:
    for rows, columns in grid.rows:
        yield _row_op("softmax", lambda x: torch.softmax(x, -1), rows, columns)


def _layer_norm(grid: Grid, device: torch.device) -> Iterator[Task]:
    for rows, columns in grid.rows:
        yield _row_op("layer_norm", lambda x: nnf.layer_norm(x, x.shape[-1:]), rows, columns)


def _row_op(name: str, function: Callable[[torch.Tensor], Any], rows: int, columns: int) -> Task:
    def make(device: torch.device) -> Call:
        data = _random(device, "float32", rows, columns)
        return lambda: function(data)

    nbytes = 8.0 * rows * columns
    return Task(name, "float32", (rows, columns), nbytes, nbytes, make)


# Attention ----------------------------------------

_BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}


def _attention(grid: Grid, device: torch.device) -> Iterator[Task]:
    """On a CPU there is one fused kernel, PyTorch calls it flash; on a GPU flash attention knows half dtypes only."""
    dtype = "float32" if device.type == "cpu" else "float16"
    for backend in ("flash",) if device.type == "cpu" else tuple(_BACKENDS):
        for heads, length, size in grid.attention:
            yield _attending(backend, dtype, heads, length, size, backward=False)
            yield _attending(backend, dtype, heads, length, size, backward=True)


def _attending(backend: str, dtype: str, heads: int, length: int, size: int, *, backward: bool) -> Task:
    def make(device: torch.device) -> Call:
        query, key, value = (_random(device, dtype, 1, heads, length, size).requires_grad_(backward) for _ in range(3))
        if not backward:
            return lambda: _attend(backend, query, key, value)
        out = _attend(backend, query, key, value)
        ones = torch.ones_like(out)
        return lambda: torch.autograd.grad(out, (query, key, value), ones, retain_graph=True)

    products = 5 if backward else 2
    flops = 2.0 * products * heads * length * length * size
    what = f"{backend}{'_backward' if backward else ''} {dtype}"
    nbytes = DTYPES[dtype].itemsize * 4.0 * heads * length * size * (2 if backward else 1)
    return Task("attention", what, (heads, length, length, size), flops, nbytes, make)


def _attend(backend: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(_BACKENDS[backend]):
        return nnf.scaled_dot_product_attention(query, key, value, is_causal=False)


# Copies ----------------------------------------


def _copies(grid: Grid, device: torch.device) -> Iterator[Task]:
    for nbytes in grid.copies:
        yield _copy("d2d", nbytes, _on_device)
        if device.type == "cuda":
            yield _copy("h2d", nbytes, _from_pinned)
            yield _copy("d2h", nbytes, _to_pinned)
            for other in range(1, like_gpus()):
                for one in range(other):
                    yield _copy(f"p2p {one} {other}", nbytes, _between(one, other), gpu=one)


def _copy(what: str, nbytes: int, make: Callable[[torch.device, int], Call], gpu: int = 0) -> Task:
    return Task("copy", what, (nbytes,), nbytes, 2.0 * nbytes, lambda device: make(device, nbytes), gpu)


def _bytes(nbytes: int, device: torch.device | str) -> torch.Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8, device=device)


def _on_device(device: torch.device, nbytes: int) -> Call:
    return partial(torch.clone, _bytes(nbytes, device))


def _from_pinned(device: torch.device, nbytes: int) -> Call:
    source, target = _bytes(nbytes, "cpu").pin_memory(), _bytes(nbytes, device)
    return lambda: target.copy_(source, non_blocking=True)


def _to_pinned(device: torch.device, nbytes: int) -> Call:
    source, target = _bytes(nbytes, device), _bytes(nbytes, "cpu").pin_memory()
    return lambda: target.copy_(source, non_blocking=True)


def _between(one: int, other: int) -> Callable[[torch.device, int], Call]:
    """PyTorch copies between devices on the source's stream (aten/src/ATen/native/cuda/Copy.cu)."""

    def make(device: torch.device, nbytes: int) -> Call:
        source = _bytes(nbytes, torch.device("cuda", one))
        target = _bytes(nbytes, torch.device("cuda", other))
        return lambda: target.copy_(source, non_blocking=True)

    return make


_SECTIONS: dict[str, Callable[[Grid, torch.device], Iterator[Task]]] = {
    "gemm": _gemm, "elementwise": _elementwise, "softmax": _softmax, "layer_norm": _layer_norm,
    "attention": _attention, "copy": _copies,
}  # fmt: skip
