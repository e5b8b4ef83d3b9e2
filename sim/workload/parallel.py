"""Parallel plans: ``dp=8``, ``tp=8`` or a product, as PyTorch runs them, over a fake process group in one process.

What the ranks of an axis do is in tensor_parallel, and in training in ddp and fsdp; data-parallel ranks of a forward
pass exchange nothing.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from sim.errors import UnknownNameError, UserError

AXES = ("pp", "dp", "fsdp", "tp")
# More than any machine has GPUs: a slip of the keyboard, which would fill the memory with their names.
MOST_RANKS = 999_999


class ParallelPlan(msgspec.Struct, frozen=True):
    """The sizes of the mesh's axes, outermost first; ranks number the last axis fastest."""

    axes: tuple[tuple[str, int], ...] = ()

    @property
    def ranks(self) -> int:
        count = 1
        for _, size in self.axes:
            count *= size
        return count

    def size(self, axis: str) -> int:
        return dict(self.axes).get(axis, 1)

    def groups(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Each axis' process groups: the ranks that differ in that axis alone."""
        groups: dict[str, tuple[tuple[int, ...], ...]] = {}
        stride = self.ranks
        for axis, size in self.axes:
            stride //= size
            starts = [r for r in range(self.ranks) if (r // stride) % size == 0]
            groups[axis] = tuple(tuple(start + i * stride for i in range(size)) for start in starts)
        return groups

    @contextlib.contextmanager
    def device_mesh(self, rank: int = 0) -> Iterator[Any]:
        """A DeviceMesh over a fake process group of all ranks, seen from one of them; None for one rank."""
        if self.ranks == 1:
            yield None
            return
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        begin_fake_job(self.ranks, rank)
        try:
            names = tuple(axis for axis, _ in self.axes)
            yield init_device_mesh("cpu", tuple(size for _, size in self.axes), mesh_dim_names=names)
        finally:
            dist.destroy_process_group()


def begin_fake_job(ranks: int, rank: int = 0) -> None:
    """A default process group that exchanges nothing, of so many ranks, seen from one of them."""
    import torch.distributed.distributed_c10d as c10d
    from torch.testing._internal.distributed.fake_pg import FakeStore

    _forget_meshes()
    c10d.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)


def _forget_meshes() -> None:
    """DTensor remembers its plans by meshes that compare equal, with the process groups of an earlier synthesis."""
    from torch.distributed.tensor import _redistribute, debug

    debug._clear_sharding_prop_cache()
    _redistribute._gen_transform_infos.cache_clear()


def axis_of_group(mesh: Any) -> dict[str, str]:
    """The mesh axis of each c10d process group's name."""
    return {} if mesh is None else {mesh.get_group(axis).group_name: axis for axis in mesh.mesh_dim_names}


def parse_plan(spec: str) -> ParallelPlan:
    """``tp=8`` or ``dp=2,tp=4``; UserError where it is not a plan."""
    axes: list[tuple[str, int]] = []
    for part in filter(None, spec.split(",")):
        axis, _, size = part.partition("=")
        if axis not in AXES:
            raise UnknownNameError("axis in --parallel", axis, AXES)
        if not re.fullmatch("0*[1-9][0-9]{0,11}", size):
            raise UserError(f"--parallel {part!r}: the size of an axis is a whole number of at least 1, as in tp=8")
        if axis in dict(axes):
            raise UserError(f"--parallel {spec!r}: axis {axis!r} is named twice")
        axes.append((axis, int(size)))
    order = [axis for axis in AXES if axis in dict(axes)]
    if [axis for axis, _ in axes] != order:
        rewritten = ",".join(f"{axis}={dict(axes)[axis]}" for axis in order)
        raise UserError(f"--parallel {spec!r}: axes go outermost first: write {rewritten}")
    plan = ParallelPlan(tuple(axes))
    if plan.ranks > MOST_RANKS:
        raise UserError(f"--parallel {spec!r}: has {plan.ranks} ranks; {MOST_RANKS} at most")
    return plan


def to_local(tensor: Any) -> Any:
    """The part of a DTensor that this rank holds; a plain tensor as it is.  DTensor's own ``to_local`` is an op, which
    who only looks would leave in the program."""
    return getattr(tensor, "_local_tensor", tensor)
