"""Device meshes, FSDP2 and DTensor for a script: PyTorch's own, over the job's fake process groups.

A mesh of ``cuda`` is one of ``cpu`` underneath, and says ``cuda`` where the script and FSDP's code ask, as tensors do
(:mod:`sim.workload.script.patches`): so what moves to the mesh's device stays where it is.  What a mesh computes of
ranks it computes really.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from sim.workload.fsdp import handle_copies, replacements
from sim.workload.script.job import Job
from sim.workload.script.recorder import ScriptRecorder, outside
from sim.workload.script.streams import ScriptDevice

Put = Callable[[Any, str, Any], None]
# What of a mesh looks into its tensor of ranks.
OF_RANKS = ("__init__", "__getitem__", "_flatten", "_unflatten", "_concatenate", "get_coordinate", "get_local_rank")


class Meshes:
    """What a script with a job finds of meshes, and of what is done over them."""

    def __init__(self, job: Job, recorder: ScriptRecorder, streams: ScriptDevice) -> None:
        self._job = job
        self._recorder = recorder
        self._streams = streams

    def patch(self, put: Put) -> None:
        if self._job.ranks is None:
            return
        from torch.distributed.fsdp._fully_shard import _fsdp_init, _fully_shard
        from torch.distributed.tensor import _dispatch, _random

        for place, name, value in replacements(self._streams, lambda: self._recorder):
            put(place, name, value)
        handle_copies(self._recorder)
        for name in OF_RANKS:
            put(DeviceMesh, name, _really(vars(DeviceMesh)[name]))
        put(DeviceMesh, "mesh", property(_really(DeviceMesh.mesh.fget)))
        put(DeviceMesh, "device_type", property(_device_type))
        for place in (_fsdp_init, _fully_shard):
            put(place, "_get_post_forward_mesh_info", _really(_fsdp_init._get_post_forward_mesh_info))
        # DTensor would keep the ranks' random numbers apart by the state of the GPU's generator.
        for place in (_dispatch, _random):
            put(place, "is_rng_supported_mesh", lambda mesh: False)


def _really(function: Any) -> Any:
    """The function, on real tensors."""
    static = isinstance(function, staticmethod)
    function = function.__func__ if static else function

    @functools.wraps(function)
    def done(*args: Any, **kwargs: Any) -> Any:
        with outside():
            return function(*args, **kwargs)

    return staticmethod(done) if static else done


def _device_type(mesh: Any) -> str:
    return "cuda" if torch._C._is_torch_function_mode_enabled() else "cpu"
