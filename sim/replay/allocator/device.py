"""Where memory comes from: the driver's side of the allocator, as far as addresses and room go.

Which address a new segment gets is the driver's affair and cannot be predicted, so it is a policy of the
caller: :class:`DeviceMemory` counts upward, a recording gives what was recorded.
"""

from __future__ import annotations

from typing import Protocol

from sim.errors import UserError
from sim.replay.allocator.rounding import SMALL_BUFFER
from sim.units import GIB

SYNTHETIC_BASE = 0x7F0000000000  # where Linux drivers put device memory; only has to be a multiple of 2 MiB
_VIRTUAL_BASE = 0x300000000000


class Device(Protocol):
    """What the allocator asks of the driver.  Sizes and addresses are bytes."""

    @property
    def total_bytes(self) -> int:
        """The GPU's whole memory (cudaDeviceProp.totalGlobalMem)."""

    def free_bytes(self) -> int:
        """What is free now (cudaMemGetInfo)."""

    def allocate(self, nbytes: int, stream: int) -> int | None:
        """A new segment's address (cudaMalloc); ``None`` where the device is out of memory."""

    def release(self, address: int, nbytes: int) -> None:
        """Give a segment back (cudaFree)."""

    def reserve(self, nbytes: int, stream: int) -> int:
        """A range of addresses without memory (cuMemAddressReserve)."""

    def unreserve(self, address: int, nbytes: int) -> None:
        """Give the range back (cuMemAddressFree)."""

    def map(self, address: int, nbytes: int) -> bool:
        """Put memory behind addresses (cuMemCreate, cuMemMap); false where the device is out of memory."""

    def unmap(self, address: int, nbytes: int) -> None:
        """Take it away again (cuMemUnmap, cuMemRelease)."""


class DeviceMemory:
    """A GPU of ``total_bytes``, of which ``reserved_by_others`` (context, libraries, other processes) is gone.

    Segments get increasing addresses, multiples of 2 MiB, and an address is never used twice.
    """

    def __init__(self, total_bytes: int = 80 * GIB, reserved_by_others: int = 0, base: int = SYNTHETIC_BASE) -> None:
        if total_bytes <= 0 or not 0 <= reserved_by_others <= total_bytes:
            raise UserError(
                f"a device of {total_bytes} bytes with {reserved_by_others} bytes used by others cannot be: "
                "give a positive total and no more used than that"
            )
        self._total = total_bytes
        self._free = total_bytes - reserved_by_others
        self._next = base
        self._next_virtual = _VIRTUAL_BASE

    @property
    def total_bytes(self) -> int:
        return self._total

    def free_bytes(self) -> int:
        return self._free

    def allocate(self, nbytes: int, stream: int) -> int | None:
        if nbytes > self._free:
            return None
        self._free -= nbytes
        address = self._next
        self._next += (nbytes + SMALL_BUFFER - 1) & -SMALL_BUFFER
        return address

    def release(self, address: int, nbytes: int) -> None:
        self._free += nbytes

    def reserve(self, nbytes: int, stream: int) -> int:
        address = self._next_virtual
        self._next_virtual += (nbytes + SMALL_BUFFER - 1) & -SMALL_BUFFER
        return address

    def unreserve(self, address: int, nbytes: int) -> None:
        pass

    def map(self, address: int, nbytes: int) -> bool:
        if nbytes > self._free:
            return False
        self._free -= nbytes
        return True

    def unmap(self, address: int, nbytes: int) -> None:
        self._free += nbytes
