"""How fast the simulated allocator is, and how its cost grows with the number of free blocks.

    python tools/bench_allocator.py [--events N] [--json]

The goal is 150,000 allocations and frees a second on one core, with a cost per event that grows no faster than
the logarithm of the number of free blocks.  Each row starts from an allocator with that many free blocks, all of
different sizes, and then frees a random block and allocates another, so that their number stays.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sim.replay.allocator.caching import CachingAllocator
from sim.replay.allocator.config import parse_alloc_conf
from sim.replay.allocator.device import DeviceMemory
from sim.units import MIB

FREE_BLOCKS = (100, 1_000, 10_000, 100_000)
GOAL = 150_000


def random_size(source: random.Random) -> int:
    """Half of them small, half large, as in training."""
    return source.randrange(512, MIB) if source.random() < 0.5 else source.randrange(MIB + 1, 16 * MIB)


def filled(free_blocks: int, conf: str, source: random.Random) -> tuple[CachingAllocator, list[int]]:
    """An allocator with about that many free blocks, and as many addresses that are in use."""
    allocator = CachingAllocator(parse_alloc_conf(conf), DeviceMemory(1 << 46))
    addresses = [allocator.malloc(random_size(source)).address for _ in range(2 * free_blocks)]
    for address in addresses[::2]:
        allocator.free(address)
    return allocator, addresses[1::2]


def seconds_for(free_blocks: int, events: int, conf: str) -> tuple[float, int]:
    """Processor time for that many events, and how many blocks were free at the end."""
    source = random.Random(free_blocks)
    allocator, live = filled(free_blocks, conf, source)
    sizes = [random_size(source) for _ in range(events // 2)]
    places = [source.randrange(len(live)) for _ in sizes]
    gc.collect()
    gc.disable()
    started = time.process_time()
    for size, place in zip(sizes, places, strict=True):
        allocator.free(live[place])
        live[place] = allocator.malloc(size).address
    taken = time.process_time() - started
    gc.enable()
    return taken, sum(len(free) for pool in allocator.pools() for free in pool.free.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    chosen = parser.parse_args()
    rows = []
    for conf in ("", "expandable_segments:True"):
        for free_blocks in FREE_BLOCKS:
            taken, free = min(seconds_for(free_blocks, chosen.events, conf) for _ in range(3))
            rate = chosen.events / taken
            rows.append({"settings": conf, "free_blocks": free, "events_per_second": rate, "us_per_event": 1e6 / rate})
    if chosen.json:
        print(json.dumps({"rows": rows}, indent=2))
    else:
        print(f"{'settings':28}{'free blocks':>12}{'events/s':>12}{'us/event':>10}{'us/event/log2':>15}")
        for row in rows:
            per_log = float(row["us_per_event"]) / math.log2(int(row["free_blocks"]))
            print(
                f"{row['settings'] or 'default':28}{row['free_blocks']:>12,}{row['events_per_second']:>12,.0f}"
                f"{row['us_per_event']:>10.2f}{per_log:>15.3f}"
            )
    return 0 if all(float(row["events_per_second"]) >= GOAL for row in rows if int(row["free_blocks"]) < 50_000) else 1


if __name__ == "__main__":
    raise SystemExit(main())
