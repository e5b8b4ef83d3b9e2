"""Record what PyTorch's own allocator does with random requests, for the tests beside this folder.

    python -m tests.replay.allocator.stub.record --torch FOLDER [--cuda FOLDER]

FOLDER is ``torch`` of an unpacked CUDA wheel (its libc10.so, libc10_cuda.so and headers are enough).  No GPU is
needed: the CUDA runtime is replaced by cuda_stub.cpp, which only hands out addresses.  Everything else is
PyTorch's compiled code.  Recorded with torch 2.11.0 (git 70d99e99), 2.12.1 (7269437d) and 2.13.0 (cf30153c), all
+cu130, and CUDA 13.0 headers, November 2026.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from sim.units import GIB, MIB
from tests.replay.allocator.requests import Plan, requests

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "data"
TOTAL = 16 * GIB

PLAIN = Plan()
BIG = Plan(largest=300 * MIB)
GRAPHS = Plan(pools=True)

# name: settings, kind of requests, bytes the device has left
CASES: dict[str, tuple[str, Plan, int]] = {
    "one stream": ("", Plan(streams=(0,)), TOTAL),
    "streams": ("", PLAIN, TOTAL),
    "little memory": ("", PLAIN, 640 * MIB),
    "roundup": ("roundup_power2_divisions:4", PLAIN, TOTAL),
    "roundup list": ("roundup_power2_divisions:[1:2,2:4,4:8,16:1,>:2]", PLAIN, TOTAL),
    "max split": ("max_split_size_mb:25", BIG, 2 * GIB),
    "max split, rounding": ("max_split_size_mb:30,max_non_split_rounding_mb:60", BIG, 3 * GIB),
    "garbage collection": ("garbage_collection_threshold:0.5", Plan(largest=300 * MIB, fraction=0.25), TOTAL),
    "garbage collection, max split": (
        "garbage_collection_threshold:0.3,max_split_size_mb:40", Plan(largest=300 * MIB, fraction=0.2), TOTAL,
    ),
    "memory fraction": ("per_process_memory_fraction:0.1", BIG, TOTAL),
    "large segments of 40 MiB": ("large_segment_size_mb:40", PLAIN, TOTAL),
    "expandable": ("expandable_segments:True", PLAIN, TOTAL),
    "expandable, little memory": ("expandable_segments:True", Plan(largest=300 * MIB, empty=0.02), 1 * GIB),
    "expandable, max split": ("expandable_segments:True,max_split_size_mb:30", BIG, 2 * GIB),
    "expandable, 12 MiB": ("expandable_segments:True,large_segment_size_mb:12", PLAIN, 1 * GIB),
    "graphs": ("", GRAPHS, TOTAL),
    "graphs, little memory": ("", GRAPHS, 700 * MIB),
    "graphs that stay": ("", Plan(pools=True, release=False), TOTAL),
    "use_mem_pool": ("", Plan(pools=True, capture=False), 640 * MIB),
}  # fmt: skip


HISTORIES = (
    "streams", "little memory", "max split", "garbage collection", "expandable, little memory", "graphs that stay",
)  # fmt: skip


def build(torch: Path, cuda: Path, into: Path) -> Path:
    """Compile the stub and the driver; returns the driver."""
    (into / "versions").write_text("libcudart.so.13 { global: *; };\n")
    stub = into / "libcudart.so.13"
    subprocess.run(
        ["g++", "-std=c++20", "-shared", "-fPIC", "-O1", f"-I{cuda}/include", str(HERE / "cuda_stub.cpp"), "-o",
         str(stub), "-Wl,-soname,libcudart.so.13", f"-Wl,--version-script={into / 'versions'}"],
        check=True,
    )  # fmt: skip
    driver = into / "driver"
    subprocess.run(
        ["g++", "-std=c++20", "-O1", f"-I{torch}/include", f"-I{cuda}/include", str(HERE / "driver.cpp"), "-o",
         str(driver), f"-L{into}", "-l:libcudart.so.13", f"-L{torch}/lib", "-lc10", "-lc10_cuda",
         f"-Wl,-rpath,{into}:{torch}/lib"],
        check=True,
    )  # fmt: skip
    return driver


def drive(driver: Path, lines: list[str], conf: str, free: int) -> list[str]:
    """What the real allocator answers."""
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": conf}
    done = subprocess.run(
        [str(driver), str(TOTAL), str(free)],
        input="\n".join(lines) + "\n", capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    return done.stdout.splitlines()


def answers(driver: Path, name: str, count: int) -> dict[str, Any]:
    """One case: the requests and what came of them (messages up to PyTorch's advice)."""
    conf, plan, free = CASES[name]
    lines = requests(len(name), count, plan)
    answered = [
        int(line) if line.isdigit() else line.split(" If reserved but")[0] for line in drive(driver, lines, conf, free)
    ]
    return {
        "conf": conf,
        "total": TOTAL,
        "free": free,
        "capturing": plan.capture,
        "requests": lines,
        "answers": answered,
    }


def snapshot(driver: Path, name: str, count: int, begun_at: int, folder: Path) -> dict[str, Any]:
    """The same as a recorded history, begun with the first request or in the middle."""
    conf, plan, free = CASES[name]
    lines = requests(len(name) + 1, count, plan)
    path = folder / "snapshot.json"
    drive(driver, [*lines[:begun_at], "h 1000000", *lines[begun_at:], f"s {path}"], conf, free)
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def write(path: Path, data: object) -> None:
    packed = gzip.compress(json.dumps(data, separators=(",", ":")).encode(), mtime=0)
    path.write_bytes(packed)
    print(f"{path.name}: {len(packed)} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", type=Path, required=True)
    parser.add_argument("--cuda", type=Path, default=Path("/usr/local/cuda"))
    parser.add_argument("--count", type=int, default=1500)
    parser.add_argument("--only", nargs="*", default=list(CASES), help="cases to record answers of")
    chosen = parser.parse_args()
    version = re.findall(r"__version__ = '([0-9.]+)", (chosen.torch / "version.py").read_text())[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        driver = build(chosen.torch.resolve(), chosen.cuda, folder)
        answered = {case: answers(driver, case, chosen.count) for case in chosen.only}
        write(DATA / f"answers-{version}.json.gz", answered)
        half = chosen.count // 2
        cases = [case for case in HISTORIES if case in chosen.only]
        histories = {
            f"{case}{kind}": snapshot(driver, case, chosen.count, begun_at, folder)
            for case in cases
            for kind, begun_at in (("", 0), (", begun midway", half))
        }
        write(DATA / f"histories-{version}.json.gz", histories)


if __name__ == "__main__":
    main()
