"""Which of several free blocks of the same size is taken: the rule that changed from release to release.

Sources: the comparators of ``BlockPool::blocks`` in c10/cuda/CUDACachingAllocator.cpp, read from the compiled
libc10_cuda.so of the wheels:

- to 2.11: by address (``BlockComparatorSize``);
- 2.12: by the age of the block object, a number every new block gets (``BlockComparatorRegistrationCounter``,
  pytorch/pytorch#178362): of two parts of a split block the front one is new, and of two joined blocks the one
  that is freed stays;
- since 2.13: by the age of the segment, a number that memory gets when it comes from the device and that all its
  blocks share, then by address (``BlockComparatorSizeCounterAddress``, pytorch/pytorch#183591).
"""

from __future__ import annotations

from typing import Literal

from sim.replay.allocator.blocks import Block

Ordering = Literal["address", "block", "segment"]
"""What decides between free blocks of one size on one stream."""

ORDERINGS: tuple[Ordering, ...] = ("address", "segment", "block")


def ordering_of(torch_version: tuple[int, int]) -> Ordering:
    """The rule of a PyTorch release, for example (2, 13)."""
    if torch_version < (2, 12):
        return "address"
    return "block" if torch_version < (2, 13) else "segment"


NEWEST_ORDERING: Ordering = ordering_of((2, 13))


class Numbering:
    """Gives blocks the numbers that decide between equal sizes; all are 0 where the address decides."""

    __slots__ = ("_last", "_step", "by_block")

    def __init__(self, ordering: Ordering) -> None:
        self._last = 0
        self._step = 0 if ordering == "address" else 1
        self.by_block = ordering == "block"

    @property
    def last(self) -> int:
        """The largest number given so far."""
        return self._last

    def memory(self) -> int:
        """A number for a block of memory that is new from the device."""
        self._last += self._step
        return self._last

    def part(self, whole: Block) -> int:
        """A number for a new block cut from another."""
        return self.memory() if self.by_block else whole.number

    def leave_room(self, room: int) -> None:
        """Keep the numbers before the next one free, for blocks whose order is learnt later."""
        self._last += self._step * room
