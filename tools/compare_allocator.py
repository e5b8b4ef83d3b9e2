"""Make PyTorch on a CUDA GPU and the simulated allocator serve the same random requests, and compare every address.

    python tools/compare_allocator.py [--requests 10000] [--seed 0] [--keep FOLDER]

For each setting of PYTORCH_CUDA_ALLOC_CONF a process of its own runs the requests on the GPU, several streams,
record_stream and empty_cache among them, with PyTorch's memory history recorded; the history is then replayed
through the simulated allocator.  ``--keep`` leaves the recorded snapshots there.

Exit codes: 0 every address, segment and release is the same; 1 one is not; 2 there is no CUDA GPU, or no PyTorch.
Without a GPU the same comparison runs against PyTorch's compiled allocator over a stub of the CUDA runtime:
tests/replay/allocator/stub/record.py.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sim.errors import UserError
from sim.replay.allocator.snapshot import SnapshotReplay, replay_snapshot
from sim.units import GIB, MIB

SETTINGS = (
    "",
    "roundup_power2_divisions:4",
    "roundup_power2_divisions:[1:2,2:4,4:8,16:1,>:2]",
    "max_split_size_mb:25",
    "max_split_size_mb:30,max_non_split_rounding_mb:60",
    "garbage_collection_threshold:0.5",
    "expandable_segments:True",
    "expandable_segments:True,max_split_size_mb:30",
    "large_segment_size_mb:40",
)
EDGES = (1, 511, 512, 513, MIB - 512, MIB, MIB + 1, 2 * MIB, 10 * MIB - 512, 10 * MIB - 1, 10 * MIB, 20 * MIB)
ALLOWED = 4 * GIB  # of the GPU's memory: little enough that the cache is given back and requests fail
HELD_CYCLES = 50_000_000  # a stream is kept busy for some 30 ms, so that a freed block is not free at once


def why_not() -> str | None:
    """What is missing on this machine, in one line."""
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed here, so there is nothing to compare with"
    if not torch.cuda.is_available():
        return "there is no CUDA GPU here, so there is nothing to compare with"
    return None


def random_size(source: random.Random) -> int:
    kind = source.randrange(14)
    if kind < 4:
        return source.randrange(1, 5000)
    if kind < 6:
        return source.choice(EDGES)
    if kind < 10:
        return source.randrange(1, MIB)
    if kind < 13:
        return source.randrange(MIB, 12 * MIB)
    return source.randrange(10 * MIB, 200 * MIB)


class Worker:
    """Runs the requests on the GPU, in the process that has the settings."""

    def __init__(self, seed: int) -> None:
        import torch

        self._torch: Any = torch
        self._random = random.Random(seed)
        self._streams = [torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
        self._live: list[tuple[Any, list[Any]]] = []
        self._target = 100

    def run(self, count: int, path: Path) -> None:
        torch = self._torch
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.memory._record_memory_history(context=None, stacks="python", max_entries=100 * count)
        torch.cuda.set_per_process_memory_fraction(min(0.99, ALLOWED / total))
        for number in range(count):
            if number % 300 == 0:
                self._target = self._random.randrange(5, 250)
            self._step()
        torch.cuda.synchronize()
        torch.cuda.memory._dump_snapshot(str(path))

    def _step(self) -> None:
        choice = self._random.random()
        if choice < 0.002:
            self._torch.cuda.empty_cache()
        elif choice < 0.02:
            self._random.choice(self._streams).synchronize()
        elif self._live and (len(self._live) > self._target or self._random.random() < 0.45):
            self._free()
        elif self._live and self._random.random() < 0.05:
            tensor, users = self._random.choice(self._live)
            stream = self._random.choice(self._streams)
            tensor.record_stream(stream)
            users.append(stream)
        else:
            self._allocate()

    def _allocate(self) -> None:
        torch = self._torch
        with torch.cuda.stream(self._random.choice(self._streams)):
            try:
                size = random_size(self._random)
                self._live.append((torch.empty(size, dtype=torch.uint8, device="cuda"), []))
            except torch.OutOfMemoryError:
                self._live = self._live[len(self._live) // 2 :]

    def _free(self) -> None:
        tensor, users = self._live.pop(self._random.randrange(len(self._live)))
        for stream in users:
            with self._torch.cuda.stream(stream):
                self._torch.cuda._sleep(HELD_CYCLES)
        del tensor


def record(conf: str, count: int, seed: int, path: Path) -> None:
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": conf, "PYTORCH_ALLOC_CONF": conf}
    command = [sys.executable, __file__, "--worker", str(path), "--requests", str(count), "--seed", str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"PyTorch failed with {conf!r}: {lines[-1]}")


def told(conf: str, done: SnapshotReplay) -> str:
    places = f"addresses {done.allocations_matched}/{done.allocations_checked}"
    asked = f"segments {done.segments_matched}/{done.segments_checked}"
    released = f"released {done.segments_released_matched}/{done.segments_released_checked}"
    failed = f"out of memory {done.out_of_memory_matched}/{done.out_of_memory_checked}"
    first = f"; first mismatch: {done.first_mismatch}" if done.first_mismatch else ""
    return f"{conf or 'default'}: {places}, {asked}, {released}, {failed}{first}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the recorded snapshots")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    missing = why_not()
    if missing is not None:
        print(missing, file=sys.stderr)
        return 2
    if chosen.worker is not None:
        Worker(chosen.seed).run(chosen.requests, chosen.worker)
        return 0
    exact = True
    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for number, conf in enumerate(SETTINGS):
            path = folder / f"compare-{number}.pickle"
            try:
                record(conf, chosen.requests, chosen.seed, path)
                done = replay_snapshot(path)
            except UserError as problem:
                print(problem, file=sys.stderr)
                return 2
            exact = exact and done.exact
            print(told(conf, done), flush=True)
    return 0 if exact else 1


if __name__ == "__main__":
    raise SystemExit(main())
