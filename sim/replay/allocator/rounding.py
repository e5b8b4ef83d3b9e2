"""How a request becomes a block size, and how large a new segment is.

Sources: PyTorch c10/core/AllocatorConfig.h (tag v2.13.0; until v2.10 the same constants stood in
c10/cuda/CUDACachingAllocator.cpp) and ``round_size``, ``roundup_power2_next_division`` and
``get_allocation_size`` of c10/cuda/CUDACachingAllocator.cpp.  All sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from sim.units import GIB, MIB

MIN_BLOCK_SIZE = 512  # kMinBlockSize: every block is a multiple of it
SMALL_SIZE = 1 * MIB  # kSmallSize: the largest request the small pool serves
SMALL_BUFFER = 2 * MIB  # kSmallBuffer: a segment of the small pool, and its page when expandable
LARGE_BUFFER = 20 * MIB  # kLargeBuffer: large_segment_size_mb may change it since 2.10
MIN_LARGE_ALLOC = 10 * MIB  # kMinLargeAlloc: from here on a request gets a segment of its own
ROUND_LARGE = 2 * MIB  # kRoundLarge: such segments are multiples of it
LARGEST_REQUEST = 1 << 60  # one EB: from here on PyTorch refuses before it looks (NativeCachingAllocator::allocate)

ROUNDUP_INTERVALS = 16  # kRoundUpPowerOfTwoIntervals: 1 MiB, 2 MiB, ... 32 GiB and above
NO_ROUNDUP: tuple[int, ...] = (0,) * ROUNDUP_INTERVALS
_FIRST_INTERVAL = MIB.bit_length() - 1  # kRoundUpPowerOfTwoStart = 1 MiB
assert (64 * GIB).bit_length() - 1 - _FIRST_INTERVAL == ROUNDUP_INTERVALS  # kRoundUpPowerOfTwoEnd = 64 GiB


def round_size(nbytes: int, divisions: Sequence[int] | None = None) -> int:
    """Block size in bytes for a request of ``nbytes``: at least 512, a multiple of 512 or of a power-of-2 division.

    ``divisions`` has one entry for each of the 16 intervals (``None`` or 0: only multiples of 512).
    """
    if nbytes < MIN_BLOCK_SIZE:
        return MIN_BLOCK_SIZE
    if divisions is not None:
        parts = divisions_at(nbytes, divisions)
        if parts > 1 and nbytes > MIN_BLOCK_SIZE * parts:
            return next_power2_division(nbytes, parts)
    return (nbytes + MIN_BLOCK_SIZE - 1) & -MIN_BLOCK_SIZE


def divisions_at(nbytes: int, divisions: Sequence[int]) -> int:
    """How many parts the power-of-2 interval around ``nbytes`` is cut into (``AllocatorConfig.cpp``)."""
    index = nbytes.bit_length() - 1 - _FIRST_INTERVAL
    return divisions[min(max(index, 0), ROUNDUP_INTERVALS - 1)]


def next_power2_division(nbytes: int, parts: int) -> int:
    """``nbytes`` rounded up to the next of ``parts`` (a power of 2) equal steps between two powers of 2.

    1200 with 4 parts lies between 1024 and 2048; the steps are 1024, 1280, 1536, 1792: 1280.
    """
    if nbytes & (nbytes - 1) == 0:
        return nbytes
    floor = 1 << (nbytes.bit_length() - 1)
    step = floor >> (parts.bit_length() - 1)
    if step == 0:
        return floor << 1
    return (nbytes + step - 1) & -step


def segment_size(size: int, large_buffer: int = LARGE_BUFFER) -> int:
    """Bytes asked of cudaMalloc for a block of ``size`` bytes that no cached block serves."""
    if size <= SMALL_SIZE:
        return SMALL_BUFFER
    if size < MIN_LARGE_ALLOC:
        return large_buffer
    return (size + ROUND_LARGE - 1) & -ROUND_LARGE
