"""The job that a script of several ranks finds: it runs as the first of them, over groups that exchange nothing.

What torchrun sets (``RANK`` and the like) is set, ``init_process_group`` makes PyTorch's own fake process group of all
ranks, and what the script makes of it - groups, device meshes, collectives - is PyTorch's own code.  Every rank runs
the same program, so a group is one of several alike, which partition the ranks: scripts make all of them on every rank.
"""

from __future__ import annotations

import contextlib
import os
import sys
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import device_mesh, distributed_c10d

from sim.workload.parallel import begin_fake_job
from sim.workload.record import NOT_RECORDED
from sim.workload.script.recorder import PARTIAL, Refused, ScriptRecorder, outside

Put = Callable[[Any, str, Any], None]
SET_BY_TORCHRUN = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_ADDR",
    "MASTER_PORT",
)  # fmt: skip
# What can be waited for, where it is asked for with async_op.
WAITABLE = (
    "all_reduce", "broadcast", "reduce", "all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor",
    "reduce_scatter_single", "all_to_all_single",
)  # fmt: skip
NOT_SYNTHESIZED = (
    "all_gather", "all_gather_object", "all_to_all", "gather", "gather_object", "reduce_scatter", "scatter",
    "scatter_object_list",
)  # fmt: skip
FROM_RANK_TO_RANK = ("batch_isend_irecv", "irecv", "isend", "recv", "send")
NO_COLLECTIVE = (
    "is not synthesized; there are all_reduce, broadcast, reduce, all_gather_into_tensor, reduce_scatter_tensor and"
    " all_to_all_single"
)
NO_PIPELINE = (
    "all ranks of a script run one program, those of a pipeline several; `synth MODEL --parallel pp=4` makes a pipeline"
)
ONE_GPU = "the script is synthesized for one GPU; give the number of ranks that torchrun would start, as in --ranks 8"


class Job:
    """``ranks`` is None for a script of one GPU, which may ask for no process group.  ``world`` is what the group of
    all ranks is called."""

    def __init__(self, ranks: int | None, hosts: int, world: str, recorder: ScriptRecorder) -> None:
        self.ranks = ranks
        self._of_a_host = (ranks or 1) // hosts
        self.world = world
        self.begun = False
        self.groups: dict[str, tuple[tuple[int, ...], ...]] = {} if ranks is None else {world: (tuple(range(ranks)),)}
        self._recorder = recorder
        self._alike: list[tuple[int, ...]] = []
        self._members: set[int] = set()
        self._own: str | None = None

    @contextlib.contextmanager
    def environment(self) -> Iterator[None]:
        """As torchrun sets it for the first rank."""
        if self.ranks is None:
            yield
            return
        told = {"RANK": 0, "LOCAL_RANK": 0, "GROUP_RANK": 0, "WORLD_SIZE": self.ranks, "MASTER_PORT": 29500}
        told |= {"LOCAL_WORLD_SIZE": self._of_a_host, "GROUP_WORLD_SIZE": self.ranks // self._of_a_host}
        hook = sys.excepthook  # which a process group changes, to say a rank before what it tells
        with unittest.mock.patch.dict(os.environ, {"MASTER_ADDR": "localhost", **_as_text(told)}):
            try:
                yield
            finally:
                sys.excepthook = hook
                if self.begun:
                    dist.destroy_process_group()

    def patch(self, put: Put) -> None:
        """torch.distributed as the script finds it."""
        if self.ranks is None:
            for place in (dist, distributed_c10d, device_mesh):
                put(place, "init_process_group", self._refuse("torch.distributed.init_process_group", ONE_GPU))
            return
        begin, make = self._begin_with(), self._make_with(distributed_c10d.new_group)
        for place in (dist, distributed_c10d, device_mesh):
            put(place, "init_process_group", begin)
            put(place, "new_group", make)
        put(dist, "destroy_process_group", lambda *_: None)
        put(dist, "get_backend", lambda *_: "nccl")
        for name in ("barrier", "monitored_barrier"):
            put(dist, name, lambda *_, **__: None)
        put(dist, "broadcast_object_list", self._broadcast_objects)
        for name in WAITABLE:
            if hasattr(dist, name):
                put(dist, name, self._waitable(getattr(dist, name)))
        for name in NOT_SYNTHESIZED:
            put(dist, name, self._refuse(f"torch.distributed.{name}", NO_COLLECTIVE))
        for name in FROM_RANK_TO_RANK:
            put(dist, name, self._refuse(f"torch.distributed.{name}", NO_PIPELINE))
        put(distributed_c10d.P2POp, "__new__", self._refuse("torch.distributed.P2POp", NO_PIPELINE))
        for place in (torch.cuda, torch.accelerator):
            put(place, "device_count", lambda: self._of_a_host)

    def name_of(self, group: Any) -> str:
        """What a process group is called in the graph; None is the group of all ranks."""
        return self.world if group is None else self._recorder.group_of([group.group_name])

    def _begin_with(self) -> Callable[..., None]:
        real = distributed_c10d.init_process_group

        def begin(*_: Any, **__: Any) -> None:
            assert self.ranks is not None, "only a job begins"
            if self.begun:
                raise ValueError("trying to initialize the default process group twice!")  # as PyTorch says it
            with outside(), unittest.mock.patch.object(distributed_c10d, "init_process_group", real):
                begin_fake_job(self.ranks)
            self.begun = True
            self._recorder.groups[distributed_c10d._get_default_group().group_name] = self.world

        return begin

    def _make_with(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def make(ranks: Sequence[int] | None = None, *_: Any, group_desc: str | None = None, **__: Any) -> Any:
            assert self.ranks is not None, "only a job has groups"
            with outside():
                group = real(ranks=ranks, group_desc=group_desc)
            members = tuple(range(self.ranks)) if ranks is None else tuple(sorted(ranks))
            self._made(members, getattr(group, "group_name", None), group_desc)
            return group

        return make

    def _made(self, members: tuple[int, ...], own: str | None, description: str | None) -> None:
        """Groups of one size that are made one after the other without a rank in common are alike; when every rank is
        in one, what the rank that runs does in its own is known of all."""
        if self._alike and (len(members) != len(self._alike[0]) or not self._members.isdisjoint(members)):
            self._alike, self._members, self._own = [], set(), None
        self._alike.append(members)
        self._members.update(members)
        self._own = self._own if own is None else own
        if self._own is None:
            return
        if len(self._members) < (self.ranks or 1):
            self._recorder.groups[self._own] = PARTIAL
            return
        name = self._free_name((description or "group").removeprefix("mesh_"))
        self._recorder.groups[self._own] = name
        self.groups[name] = tuple(self._alike)

    def _free_name(self, name: str) -> str:
        taken = sum(known == name or known.startswith(f"{name} ") for known in self.groups)
        return f"{name} {taken + 1}" if taken else name

    # Collectives ----------------------------------------

    def _waitable(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """A collective of torch.distributed's, whose wait is written down where it is asynchronous."""

        def communicate(*args: Any, **kwargs: Any) -> Any:
            self._recorder.issued = NOT_RECORDED
            work = real(*args, **kwargs)
            return None if work is None else _Work(self._recorder)

        return communicate

    def _broadcast_objects(self, objects: Any, src: int | None = 0, *_: Any, **__: Any) -> None:
        """What the first rank sends it has; what it is sent it cannot know."""
        if src:
            place = self._recorder.place_of_script()
            raise Refused(
                f"{place}: torch.distributed.broadcast_object_list from rank {src}: the script runs as rank 0"
            )

    def _refuse(self, what: str, why: str) -> Callable[..., Any]:
        def refused(*_: Any, **__: Any) -> Any:
            raise Refused(f"{self._recorder.place_of_script()}: {what}: {why}")

        return refused


def _as_text(numbers: dict[str, int]) -> dict[str, str]:
    return {name: str(number) for name, number in numbers.items()}


class _Work:
    """What an asynchronous collective gives back."""

    def __init__(self, recorder: ScriptRecorder) -> None:
        self._recorder = recorder
        self._index = recorder.issued

    def wait(self, *_: Any) -> bool:
        self._recorder.wait(self._index)
        return True

    def is_completed(self) -> bool:
        return True
