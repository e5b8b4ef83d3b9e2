"""What NCCL's kernels take from compute kernels that run beside them: SMs and memory bandwidth, as shares.

SMs: NCCL launches one block a channel (NVIDIA, NCCL user guide, NCCL_MAX_NCHANNELS: fewer channels are fewer CUDA
blocks, "hence the impact on GPU computing resources"), of up to 640 threads with registers and shared memory that leave
an SM little for others (NVIDIA/nccl src/include/device.h, NCCL_MAX_NTHREADS): one SM each.

Memory: for every byte that crosses a rank's link its GPU writes it as it arrives, reads it from the buffer, and reads
the operand or writes the result (NVIDIA/nccl src/device/all_reduce.h: directRecvReduceDirectSend and directRecvCopy-
DirectSend): three accesses.  Where data are staged in host memory the buffers are there, and one is left.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

from sim.place.collectives import CollectivePlan, bus_factor
from sim.place.nccl_search import most_on_a_host
from sim.place.placement import Held
from sim.topology.machine import Gpu, Machine

_PPM = 1_000_000
_ACCESSES_DIRECT = 3
_ACCESSES_STAGED = 1


def held_by(planned: CollectivePlan, machine: Machine, gpu: Gpu, members: tuple[int, ...]) -> Held | None:
    """What a collective takes of its GPU; None where it is not NCCL's or takes nothing."""
    if machine.collectives.library != "nccl" or gpu.profile.kind != "gpu" or not planned.channels:
        return None
    profile = gpu.profile
    crossing = planned.nbytes * bus_factor(planned.kind, planned.ranks)
    accesses = _ACCESSES_STAGED if _is_staged(machine, members) else _ACCESSES_DIRECT
    rate = accesses * crossing / planned.transfer_ns if planned.transfer_ns else 0.0  # bytes a nanosecond: GB/s
    return Held(
        sms_ppm=min(planned.channels, profile.sms) * _PPM // profile.sms,
        memory_ppm=min(round(rate / profile.memory_bandwidth_gb_s * _PPM), _PPM),
    )


@lru_cache(maxsize=512)
def _is_staged(machine: Machine, members: tuple[int, ...]) -> bool:
    """Whether neighbours of the group exchange through host memory."""
    gpus = [machine.gpus[i] for i in sorted(members)]
    ranks = most_on_a_host(gpus)
    return any(machine.transfer_route(a.name, b.name, ranks).via_host for a, b in pairwise(gpus))
