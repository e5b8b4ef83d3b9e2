"""What the host takes: to issue an operator of a model, to call one, and what the device takes around a kernel."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sim.measurements import Sample
from sim.units import MIB
from sim.workload.calibrate.timer import Timer, spread_of, timed

WIDTH, TOKENS = 16, 4
METADATA_CALLS = 256


class _Block(torch.nn.Module):
    """A transformer's block, so small that only the host's work is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.up, self.down = torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, WIDTH)
        self.activation = torch.nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention and MLP, each with its residual."""
        query, key, value = (
            part.view(1, TOKENS, 2, WIDTH // 2).transpose(1, 2) for part in self.qkv(self.first(x)).split(WIDTH, -1)
        )
        scores = torch.softmax(query @ key.transpose(-1, -2) * 0.5, -1)
        x = x + self.out((scores @ value).transpose(1, 2).reshape(1, TOKENS, WIDTH))
        down: torch.Tensor = self.down(self.activation(self.up(self.second(x))))
        return x + down


class _Counter(TorchDispatchMode):
    """Counts dispatched ops: those that compute, and those that only make another view or an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.computing = self.metadata = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        fresh = any(t.untyped_storage()._cdata not in known for t in made)
        if (fresh or func._schema.is_mutable) and "empty" not in func._schema.name:
            self.computing += 1
        else:
            self.metadata += 1
        return result


def host_samples(timer: Timer, point_ms: float) -> list[Sample]:
    """``op``, ``metadata``: a model's operator that computes, and one that does not; ``call ...``: one called alone."""
    x = torch.randn(1, TOKENS, WIDTH, device=timer.device)
    metadata = timed(timer.host_us, lambda: _views(x), 2 * point_ms, alone=timer.alone)
    metadata = metadata.scaled(1 / METADATA_CALLS)
    with torch.device(timer.device):
        block = _Block()
    step = partial(_train, block, x)
    step()
    with _Counter() as counter:
        step()
    steps = timed(timer.host_us, step, 4 * point_ms, most_calls=8, alone=timer.alone)
    op = steps.scaled(1 / counter.computing, less=counter.metadata * metadata.us)
    return [metadata.sample("host", "metadata"), op.sample("host", "op"), *_calls_alone(timer, point_ms)]


def _train(block: torch.nn.Module, x: torch.Tensor) -> None:
    block(x).sum().backward()
    block.zero_grad()


def _views(x: torch.Tensor) -> None:
    for _ in range(METADATA_CALLS // 2):
        x.view(TOKENS, WIDTH).transpose(0, 1)


def _calls_alone(timer: Timer, point_ms: float) -> list[Sample]:
    """Calls whose kernels do next to nothing, one at a time."""
    small = torch.randn(8, 8, device=timer.device)
    one, several = small[0], small.view(1, 8, 8)
    calls: dict[str, Callable[[], Any]] = {
        "call linear": lambda: nnf.linear(small, small, one),
        "call bmm": lambda: torch.bmm(several, several),
        "call elementwise": lambda: torch.add(small, small),
        "call softmax": lambda: torch.softmax(small, -1),
        "call layer_norm": lambda: nnf.layer_norm(small, small.shape[-1:]),
    }
    return [
        timed(timer.alone_us, call, point_ms, alone=timer.alone).sample("host", what) for what, call in calls.items()
    ]


# Around a kernel, on a GPU ----------------------------------------

QUEUED, ALONE = 200, 50
PLUGS, PLUG_BYTES = 80, 64 * MIB  # 5 GiB in all: milliseconds also of the fastest memory, and little room
QUEUED_AHEAD_US = 20.0


def launch_samples(device: torch.device) -> list[Sample]:
    """Small kernels under torch.profiler: some launched one by one on an idle stream, some queued behind a long one."""
    small = torch.zeros(8, device=device)
    plug = torch.zeros(PLUG_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(plug)
    small.add_(1.0)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.cuda.device(device), torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(ALONE):
            small.add_(1.0)
            torch.cuda.synchronize()
        for _ in range(PLUGS):
            target.copy_(plug)
        for _ in range(QUEUED):
            small.add_(1.0)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_bytes())["traceEvents"]
    return [spread_of(values, 1).sample("launch", what) for what, values in launch_times(events).items() if values]


def launch_times(events: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """From a Kineto trace's events, in microseconds: ``floor``, durations of the shortest hundredth of the kernels;
    ``latency``, from launch call to start, of the shortest tenth (their median is the 5th percentile); ``gap``,
    between kernels of a stream that were launched 20 us and more before they could start."""
    listed = list(events)
    launched = {
        e["args"]["correlation"]: float(e["ts"])
        for e in listed
        if e.get("cat") in ("cuda_runtime", "cuda_driver", "Runtime") and "correlation" in e.get("args", {})
    }
    kernels = sorted((e for e in listed if e.get("cat") in ("kernel", "Kernel")), key=lambda e: float(e["ts"]))
    durations = sorted(float(k["dur"]) for k in kernels)
    waits = sorted(
        float(k["ts"]) - launched[k["args"]["correlation"]] for k in kernels if k["args"].get("correlation") in launched
    )
    return {
        "floor": durations[: max(len(durations) // 50, 1)] if durations else [],
        "latency": waits[: max(len(waits) // 10, 1)] if waits else [],
        "gap": _gaps(kernels, launched),
    }


def _gaps(kernels: list[Mapping[str, Any]], launched: Mapping[int, float]) -> list[float]:
    streams: dict[Any, list[Mapping[str, Any]]] = {}
    for kernel in kernels:
        streams.setdefault((kernel.get("pid"), kernel.get("tid")), []).append(kernel)
    gaps = []
    for members in streams.values():
        for before, after in pairwise(members):
            ended = float(before["ts"]) + float(before["dur"])
            begun = launched.get(after["args"].get("correlation"))
            if begun is not None and begun < ended - QUEUED_AHEAD_US:
                gaps.append(float(after["ts"]) - ended)
    return gaps
