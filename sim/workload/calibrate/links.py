"""Collectives over 2 to all devices of this host: real processes under torchrun, watched from here.

A rank that dies is named, and so is one that stops: nothing waits for ever.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from sim.errors import UserError
from sim.measurements import Machine, Sample
from sim.workload.calibrate.journal import Journal
from sim.workload.calibrate.spec import Grid

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "send")
ISSUE = "issue"
RANK_MODULE = "sim.workload.calibrate.rank"
# Processes of one host; more tell little more and take a CPU's cores from each other.
MOST_CPU_RANKS = 8
SILENCE_S = 120.0
START_S = 120.0
LOOK_S, GONE_S = 0.1, 5.0
# How often a rank shows that it lives, and from when on it does not.
BEAT_S, STALE_S = 0.5, 2.5
Key = tuple[str, str, tuple[int, ...]]


class Request(msgspec.Struct, frozen=True):
    """What the ranks are to do, and where they tell it."""

    backend: str
    ranks: int
    wanted: list[Key]
    point_ms: float
    longest_ms: float
    results: str
    places: str
    """A folder in which every rank writes where it is."""
    owner: int
    """The process that reads the results: without it the ranks end."""


def ranks_of(machine: Machine) -> int:
    """How many processes: one a GPU, or one a CPU, two at least."""
    device = machine.device
    return device.count if device.kind == "gpu" else max(2, min(machine.cpus, MOST_CPU_RANKS))


def rank_counts(ranks: int) -> list[int]:
    """2, 4, 8, ... and all."""
    counts = [2**i for i in range(1, ranks.bit_length()) if 2**i <= ranks]
    return counts if ranks in counts or ranks < 2 else [*counts, ranks]


def links_of(grid: Grid, machine: Machine) -> list[Key]:
    """What is to be measured: all collectives and sizes over each number of ranks, small ones first."""
    found: list[Key] = []
    for count in rank_counts(ranks_of(machine)):
        found.append(("links", ISSUE, (count,)))
        for kind in KINDS:
            if kind != "send" or count == 2:
                found += [("links", kind, (size, count)) for size in grid.collectives]
    return found


def measure_links(
    grid: Grid, journal: Journal, folder: Path, told: Callable[[str, int], None], silence_s: float = SILENCE_S
) -> None:
    """Run the ranks and keep their samples.  UserError, with the rank, where one dies or is silent for too long."""
    everything = links_of(grid, journal.machine)
    wanted = [key for key in everything if key not in journal.taken]
    told("links", len(everything) - len(wanted))
    if not wanted:
        return
    _check_torchrun()
    ranks = ranks_of(journal.machine)
    backend = "nccl" if journal.machine.device.kind == "gpu" else "gloo"
    request = Request(
        backend, ranks, wanted, grid.point_ms, grid.longest_ms, str(folder / "results.jsonl"), str(folder),
        os.getpid(),
    )  # fmt: skip
    asked = folder / "request.json"
    asked.write_bytes(msgspec.json.encode(request))
    with (folder / "said.txt").open("wb") as said:
        ranks_process = subprocess.Popen(_command(ranks, asked), stdout=said, stderr=said, start_new_session=True)
    try:
        _Watch(ranks_process, request, journal, told, silence_s).until_done()
    finally:
        _end(ranks_process, folder)


def _check_torchrun() -> None:
    import torch.distributed

    if not torch.distributed.is_available() or importlib.util.find_spec("torch.distributed.run") is None:
        raise UserError("--links: this PyTorch has no torchrun (torch.distributed.run); install one that has it")


def _command(ranks: int, asked: Path) -> list[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*run, "-m", RANK_MODULE, str(asked)]


class _Watch:
    """Reads what the ranks write, as they write it."""

    def __init__(
        self, process: subprocess.Popen[bytes], request: Request, journal: Journal,
        told: Callable[[str, int], None], silence_s: float,
    ) -> None:  # fmt: skip
        self.process, self.request, self.journal, self.told = process, request, journal, told
        self.silence_s = silence_s
        self.results = Path(request.results)
        self.read = 0

    def until_done(self) -> None:
        """Until all ranks have ended; UserError where one did not end well."""
        heard = time.monotonic()
        while True:
            ended = self.process.poll()
            if self._news():
                heard = time.monotonic()
            if ended is not None:
                break
            if time.monotonic() - heard > (self.silence_s if self.read else max(self.silence_s, START_S)):
                raise UserError(f"--links: {self._behind()}; {_KEPT}")
            time.sleep(LOOK_S)
        if ended != 0:
            raise UserError(f"--links: {self._died(ended)}; {_KEPT}")

    def _news(self) -> bool:
        if not self.results.exists():
            return False
        with self.results.open("rb") as file:
            file.seek(self.read)
            news = file.read()
        whole = news[: news.rfind(b"\n") + 1]
        self.read += len(whole)
        for line in whole.splitlines():
            sample = msgspec.json.decode(line, type=Sample)
            self.journal.add(sample)
            self.told(f"links {sample.what} {' x '.join(map(str, sample.sizes))}", 1)
        return bool(whole)

    def _behind(self) -> str:
        """The rank whose last word is the oldest."""
        places = sorted(Path(self.request.places).glob("rank*.at"), key=lambda p: p.stat().st_mtime)
        missing = sorted(set(range(self.request.ranks)) - {_number(p) for p in places})
        if missing:
            return f"rank {missing[0]} of {self.request.ranks} did not start within {START_S:.0f} s"
        signs = {place: place.stat().st_mtime for place in places}
        silent = [place for place in places if max(signs.values()) - signs[place] > STALE_S]
        if silent:
            return f"rank {_number(silent[0])} has been silent for {self.silence_s:.0f} s, last at {_where(silent[0])}"
        at = ", ".join(f"rank {_number(place)} in {_where(place)}" for place in sorted(places, key=_number))
        return f"the ranks have waited for each other for {self.silence_s:.0f} s: {at}"

    def _died(self, code: int) -> str:
        """From torchrun's own report, which names the rank that failed first."""
        said = (Path(self.request.places) / "said.txt").read_text(errors="replace")
        first = said[said.find("Root Cause") :] if "Root Cause" in said else said
        rank, exitcode = re.search(r"rank\s*:\s*(\d+)", first), re.search(r"exitcode\s*:\s*(-?\d+)", first)
        problem = [
            line.strip() for line in said.splitlines() if re.match(r"(\[rank\d+\]:\s*)?[\w.]*(Error|Exception)\b", line)
        ]
        why = f" ({problem[-1][:200]})" if problem else ""
        if rank is None or exitcode is None:
            return f"torchrun ended with exit code {code}{why}"
        how = (
            f"was killed by signal {-int(exitcode[1])}"
            if int(exitcode[1]) < 0
            else f"ended with exit code {exitcode[1]}"
        )
        return f"rank {rank[1]} {how}{why}"


_KEPT = "what was measured before is kept, and the same command goes on from there"


def _where(place: Path) -> str:
    return place.read_text().partition("\n")[2].strip()


def _number(place: Path) -> int:
    return int(place.name.removeprefix("rank").removesuffix(".at"))


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """torchrun, and the ranks, each of which it has put into a session of its own."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=2)
    process.kill()
    process.wait()
    for place in folder.glob("rank*.at"):
        number = place.read_text().partition("\n")[0]
        if number.isdigit() and _is_rank(int(number)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(number), signal.SIGKILL)
            gone = time.monotonic() + GONE_S
            while _is_rank(int(number)) and time.monotonic() < gone:
                time.sleep(LOOK_S)


def _is_rank(pid: int) -> bool:
    """Whether a process of that number is one of ours still (where the system tells)."""
    command = Path("/proc") / str(pid) / "cmdline"
    return command.exists() and RANK_MODULE.encode() in command.read_bytes()
