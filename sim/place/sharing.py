"""What NCCL's kernels take from compute kernels that run beside them: SMs and memory bandwidth, as shares.

A kernel bound by compute whose formula knows its tiles loses what the formula says of a device with so many SMs fewer:
tiles are handed to SMs one at a time, so a product of 132 tiles takes one turn on 132 SMs and two on 108 (NVIDIA
developer forum, thread 337991: such a product beside 24 channels on an H100 took almost twice as long).  Any other
loses the SMs' share.

SMs: NCCL launches one block a channel (NVIDIA, NCCL user guide, NCCL_MAX_NCHANNELS: fewer channels are fewer CUDA
blocks, "hence the impact on GPU computing resources"), of up to 640 threads with registers and shared memory that leave
an SM little for others (NVIDIA/nccl src/include/device.h, NCCL_MAX_NTHREADS): one SM each ("NCCL CTAs won't share an SM
with compute kernels", its maintainer in NVIDIA/nccl issue 689).

Memory: for every byte that crosses a rank's link its GPU writes it as it arrives, reads it from the buffer, and reads
the operand or writes the result (NVIDIA/nccl src/device/all_reduce.h: directRecvReduceDirectSend and directRecvCopy-
DirectSend): three accesses (as its maintainer says in NVIDIA/nccl issue 1428).  Where data are staged in host memory
the buffers are there, and one is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from sim.ops import Work
from sim.place.collectives import CollectivePlan, bus_factor
from sim.place.kernels import kernel_cost
from sim.place.nccl_rings import most_on_a_host
from sim.place.placement import Held
from sim.topology.device import DeviceProfile, Measured
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


def losses(works: Sequence[Work], profile: DeviceProfile, sms_ppm: int) -> tuple[int, ...]:
    """What each kernel loses of its speed while that share of the SMs is held, in parts per million."""
    left = profile.sms - round(sms_ppm * profile.sms / _PPM)
    if left < 1:
        return (_PPM,) * len(works)
    whole, fewer = _with_sms(profile, profile.sms), _with_sms(profile, left)
    return tuple(_loss(kernel_cost(work, whole).ns, kernel_cost(work, fewer).ns) for work in works)


def _loss(ns: int, beside_ns: int) -> int:
    return max(0, _PPM - ns * _PPM // beside_ns) if beside_ns else 0


def _with_sms(profile: DeviceProfile, sms: int) -> DeviceProfile:
    """The device with so many of its SMs, each as fast as before; without curves that were measured on all of them."""
    rates = {dtype: rate * sms / profile.sms for dtype, rate in profile.tflops.items()}
    return profile.model_copy(update={"sms": sms, "tflops": rates, "measured": Measured()})


@lru_cache(maxsize=512)
def _is_staged(machine: Machine, members: tuple[int, ...]) -> bool:
    """Whether neighbours of the group exchange through host memory."""
    gpus = [machine.gpus[i] for i in sorted(members)]
    ranks = most_on_a_host(gpus)
    return any(machine.transfer_route(a.name, b.name, ranks).via_host for a, b in pairwise(gpus))
