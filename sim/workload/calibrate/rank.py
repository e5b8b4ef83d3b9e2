"""One rank of the collectives' measurement, started by torchrun: ``python -m sim.workload.calibrate.rank REQUEST``.

Calls go out one after another, as nccl-tests counts them: a batch's time on the slowest rank, over its calls.  All
ranks decide from the same numbers, so all do the same.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from sim.measurements import sample_lines
from sim.workload.calibrate.links import BEAT_S, ISSUE, Key, Request
from sim.workload.calibrate.timer import BATCH_US, LAUNCH_US, CudaTimer, Repeats, Spread, Watch, spread_of

PATIENCE = datetime.timedelta(minutes=10)  # of a rank that waits for a group; who watches is less patient
MOST_CALLS = 50
REPEATS, MOST_REPEATS = 9, 12
WARMUP = 2
# A shorter call is latency: a larger one is not longer in proportion.
SHOWS_BYTES_US = 5000.0
Call = Callable[[], Any]


def main(asked: str) -> None:
    """Measure everything that is wanted, rank 0 writes."""
    request = msgspec.json.decode(Path(asked).read_bytes(), type=Request)
    rank = int(os.environ["RANK"])
    device = torch.device("cpu")
    if request.backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    place = _Place(request, rank)
    place("joining the others")
    place.beat()
    dist.init_process_group(request.backend, timeout=PATIENCE)
    try:
        _Rank(request, rank, device, place).run()
    finally:
        dist.destroy_process_group()


class _Place:
    """Says where a rank is, and twice a second that it lives, for who watches."""

    def __init__(self, request: Request, rank: int) -> None:
        self._file = Path(request.places) / f"rank{rank}.at"
        self._owner = request.owner

    def beat(self) -> None:
        """From now on, beside whatever the rank waits in."""
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT_S)
            if not _is_there(self._owner):  # killed: nobody would end this rank, or read what it measures
                os._exit(1)
            with contextlib.suppress(OSError):
                os.utime(self._file)

    def __call__(self, where: str) -> None:
        """Whole or not at all: who watches may read at any moment."""
        fresh = self._file.with_suffix(".fresh")
        fresh.write_text(f"{os.getpid()}\n{where}\n")
        fresh.replace(self._file)


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class _Rank:
    def __init__(self, request: Request, rank: int, device: torch.device, place: _Place) -> None:
        self.request, self.rank, self.device, self.at = request, rank, device, place
        self.timer = CudaTimer(device.index) if device.type == "cuda" else None
        self.launch_us = LAUNCH_US

    def run(self) -> None:
        """Group by group: its members measure, the others wait for them."""
        counts = sorted({key[2][-1] for key in self.request.wanted})
        everyone = dist.new_group(backend="gloo", timeout=PATIENCE)  # a GPU that waits has nothing to do
        for count in counts:
            group = dist.new_group(list(range(count)), timeout=PATIENCE)
            if self.rank < count:
                self._in_group([key for key in self.request.wanted if key[2][-1] == count], group, count)
            self.at(f"waiting for the group of {count} ranks")
            dist.barrier(group=everyone)

    def _in_group(self, wanted: list[Key], group: Any, count: int) -> None:
        pace: dict[str, tuple[int, float]] = {}
        for key in wanted:
            _, kind, sizes = key
            self.at(f"{kind} {' x '.join(map(str, sizes))}")
            if kind == ISSUE:
                self._tell(key, spread_of(self._issue(group), 1))
                continue
            size, us = pace.get(kind, (sizes[0], 0.0))
            if us > SHOWS_BYTES_US and us * sizes[0] / size > 1e3 * self.request.longest_ms:
                continue
            spread = self._timed(self._call(kind, sizes[0], group, count), group)
            pace[kind] = sizes[0], spread.us
            self._tell(key, spread.scaled(0.5) if kind == "send" else spread)  # there and back

    def _tell(self, key: Key, spread: Spread) -> None:
        if self.rank == 0:
            with Path(self.request.results).open("ab") as file:
                file.write(sample_lines([spread.sample(*key)]))

    # Calls ----------------------------------------

    def _call(self, kind: str, nbytes: int, group: Any, count: int) -> Call:
        """One call that moves ``nbytes`` of float32 as nccl-tests counts them: the whole tensor."""
        piece = max(nbytes // 4 // count, 1)
        whole = torch.zeros(piece * count, device=self.device)
        part = torch.zeros(piece, device=self.device)
        if kind == "send":
            return self._ping_pong(torch.zeros(max(nbytes // 4, 1), device=self.device))
        calls: dict[str, Call] = {
            "all_reduce": lambda: dist.all_reduce(whole, group=group),
            "all_gather": lambda: dist.all_gather_into_tensor(whole, part, group=group),
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole, group=group),
            "broadcast": lambda: dist.broadcast(whole, 0, group=group),
        }
        return calls[kind]

    def _ping_pong(self, data: torch.Tensor) -> Call:
        """There and back, so that one sends when the other has received."""

        def both() -> None:
            if self.rank == 0:
                dist.send(data, 1)
                dist.recv(data, 1)
            else:
                dist.recv(data, 0)
                dist.send(data, 0)

        return both

    def _issue(self, group: Any) -> list[float]:
        """What the host takes to issue one collective that nobody waits for."""
        data = torch.zeros(64, device=self.device)
        taken = []
        for _ in range(REPEATS):
            self._together(group)
            begun = time.perf_counter_ns()
            works = [dist.all_reduce(data, group=group, async_op=True) for _ in range(16)]
            taken.append((time.perf_counter_ns() - begun) / 1e3 / len(works))
            for work in works:
                work.wait()
        return self._slowest(taken, group)

    # Time ----------------------------------------

    def _timed(self, call: Call, group: Any) -> Spread:
        for _ in range(WARMUP):
            self._batch_us(call, 1, group)
        if self.timer is not None:
            self.launch_us = self.timer.host_us(call, 1)
        second = self._slowest([self._batch_us(call, 1, group)], group)[0]
        calls = max(1, min(MOST_CALLS, int(4 * BATCH_US / max(second, 1.0))))
        repeats, spent = Repeats(MOST_REPEATS), 0.0
        while not repeats.enough(spent, 1e3 * self.request.point_ms):
            watch = Watch()
            us = self._batch_us(call, calls, group)
            us, waited = self._slowest([us, watch.share()], group)
            repeats.take(us, waited)
            spent += us * calls
        return spread_of(repeats.kept(), calls, len(repeats.disturbed))

    def _batch_us(self, call: Call, calls: int, group: Any) -> float:
        """On GPUs between device events behind a plug, as kernels: the host's pace is not NCCL's.  All ranks take as
        many batches, whatever each host's pace was."""
        self._together(group)
        if self.timer is not None:
            return self.timer.met_us(call, calls, self.launch_us, lambda: self._meet(group))
        begun = time.perf_counter_ns()
        for _ in range(calls):
            call()
        self._wait()
        return (time.perf_counter_ns() - begun) / 1e3 / calls

    def _together(self, group: Any) -> None:
        self._meet(group)
        self._wait()

    def _meet(self, group: Any) -> None:
        dist.all_reduce(torch.zeros(1, device=self.device), group=group)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _slowest(self, taken: list[float], group: Any) -> list[float]:
        times = torch.tensor(taken, dtype=torch.float64, device=self.device)
        dist.all_reduce(times, op=dist.ReduceOp.MAX, group=group)
        return [float(us) for us in times.tolist()]


if __name__ == "__main__":
    main(sys.argv[1])
