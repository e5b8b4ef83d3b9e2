"""Picking and scattering: embedding and its backward, gather, index, sort."""

from __future__ import annotations

from sim.ops import TensorMeta, Work
from sim.place.kernels import layout
from sim.place.kernels.cost import KernelCost, UnreadableWorkError, outputs_of, register, tensor
from sim.place.kernels.memory import bytes_cost
from sim.topology.abilities import Abilities

SORT_PASSES = 4  # radix sort of 32-bit keys, 8 bits a pass (CUB's DeviceRadixSort)


def _indices(work: Work) -> TensorMeta:
    found = next((t for t in work.inputs if t.dtype.startswith("int")), None)
    if found is None:
        raise UnreadableWorkError(work.op)
    return found


@register("aten::embedding", "aten::index_select", "aten::gather", "aten::index", "aten::take")
def _pick(work: Work, abilities: Abilities) -> KernelCost:
    """Only what is picked is read: as much as is written, and the indices.  Each element finds its row by a division
    (indexSelectLargeIndex in Indexing.cu, which embedding calls too)."""
    if work.outputs:
        indices = sum(t.nbytes for t in work.inputs if t.dtype.startswith("int"))
        picked, moved = sum(t.elements for t in work.outputs), 2 * sum(t.nbytes for t in work.outputs) + indices
    else:
        table, indices_ = tensor(work, 0), _indices(work)
        columns = table.shape[-1] if len(table.shape) > 1 else 1
        picked = indices_.elements * columns
        moved = 2 * picked * (table.nbytes // max(table.elements, 1)) + indices_.nbytes
    return bytes_cost(moved, abilities, layout.sm_clocks_us(layout.PICKING_CLOCKS * picked, abilities.profile))


@register("aten::embedding_dense_backward")
def _embedding_backward(work: Work, abilities: Abilities) -> KernelCost:
    """The indices are sorted, the table's gradient is filled with zeros, and each row's gradients are added up."""
    gradient, indices = tensor(work, 0), tensor(work, 1)
    columns = gradient.shape[-1] if gradient.shape else 1
    words = work.scalar("num_weights")
    width = gradient.nbytes // max(gradient.elements, 1)
    if work.outputs:
        table = work.outputs[0].nbytes
    else:
        words = work.scalar("arg2") if words is None else words
        table = words * columns * width if isinstance(words, int) else gradient.nbytes
    sorting = SORT_PASSES * 4 * indices.nbytes
    return bytes_cost(table + 2 * gradient.nbytes + sorting, abilities)


@register(
    "aten::scatter", "aten::scatter_", "aten::scatter_add", "aten::scatter_add_", "aten::index_add", "aten::index_add_",
    "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::index_copy", "aten::index_copy_",
    "aten::index_fill", "aten::index_fill_", "aten::masked_scatter", "aten::masked_scatter_",
)  # fmt: skip
def _scatter(work: Work, abilities: Abilities) -> KernelCost:
    """The target is copied where the op is not in place; the source is read, its places read and written."""
    target, source = tensor(work, 0), work.inputs[-1]
    copied = 0 if work.op.endswith("_") else 2 * target.nbytes
    indices = sum(t.nbytes for t in work.inputs[1:] if t.dtype.startswith("int"))
    return bytes_cost(copied + 3 * min(source.nbytes, target.nbytes) + indices, abilities)


@register("aten::topk", "aten::sort", "aten::argsort", "aten::unique_dim", "aten::_unique2", "aten::kthvalue")
def _sort(work: Work, abilities: Abilities) -> KernelCost:
    """A radix sort reads and writes keys and places in each pass."""
    keys = tensor(work, 0)
    written = sum(t.nbytes for t in outputs_of(work))
    return bytes_cost(SORT_PASSES * 2 * (keys.nbytes + 8 * keys.elements) + written, abilities)
