"""NCCL's own constants: latencies, bandwidth limits, search speeds and the tree correction, with their sources.

Figures of NVIDIA/nccl (Apache-2.0), src/graph/tuning.cc, src/graph/topo.h and src/graph/search.cc as of June 2026;
the tables for Volta to Hopper are the same since version 2.19.  Latencies are microseconds, bandwidths GB/s.
"""

from __future__ import annotations

from typing import Literal

Algorithm = Literal["ring", "tree", "nvls"]
Protocol = Literal["ll", "ll128", "simple"]
Hardware = Literal["nvlink", "pcie", "network"]

ALGORITHMS: tuple[Algorithm, ...] = ("tree", "ring", "nvls")
PROTOCOLS: tuple[Protocol, ...] = ("ll", "ll128", "simple")

# tuning.cc, baseLatencies
BASE_US: dict[Algorithm, dict[Protocol, float]] = {
    "tree": {"ll": 6.8, "ll128": 14.0, "simple": 8.4},
    "ring": {"ll": 6.6, "ll128": 14.0, "simple": 8.4},
    "nvls": {"simple": 0.0},
}

# tuning.cc, hwLatencies: what one hop adds
HOP_US: dict[Hardware, dict[Algorithm, dict[Protocol, float]]] = {
    "nvlink": {
        "tree": {"ll": 0.6, "ll128": 1.25, "simple": 4.0},
        "ring": {"ll": 0.6, "ll128": 1.9, "simple": 3.4},
        "nvls": {"simple": 25.0},
    },
    "pcie": {
        "tree": {"ll": 1.0, "ll128": 1.9, "simple": 4.0},
        "ring": {"ll": 1.0, "ll128": 2.5, "simple": 5.7},
    },
    "network": {
        "tree": {"ll": 5.0, "ll128": 8.5, "simple": 14.0},
        "ring": {"ll": 2.7, "ll128": 4.0, "simple": 14.0},
    },
}

# Posting a step of a ring costs Simple three times as much (tuning.cc)
NET_POSTS_SIMPLE = 3


def net_post_us(cpu_vendor: str) -> float:
    """What the CPU takes to post one send to a NIC (tuning.cc, getNetOverhead)."""
    return 2.0 if cpu_vendor == "amd" else 1.0


Generation = Literal["volta", "ampere", "hopper"]


def generation(capability: tuple[int, int]) -> Generation:
    """The row of NCCL's tables for a compute capability: Hopper's for 9.0 and later, Volta's before 8.0."""
    return "hopper" if capability >= (9, 0) else "ampere" if capability >= (8, 0) else "volta"


def node_column(hosts: int) -> int:
    """The column of NCCL's tables for a number of hosts: one, two, more."""
    return min(hosts, 3) - 1


# tuning.cc, llMaxBws: one host by GPU, several by CPU (Intel, AMD)
LL_LIMIT_ONE_HOST: dict[Generation, float] = {"volta": 39.0, "ampere": 87.7, "hopper": 141.0}
LL_LIMIT_HOSTS: dict[str, tuple[float, float]] = {"intel": (39.0, 20.4), "amd": (22.5, 19.0)}

# tuning.cc, perChMaxRingLL128Bws, perChMaxTreeLL128Bws, perChMaxTreeBws: one, two, more hosts
RING_LL128_PER_CHANNEL: dict[Generation, float] = {"volta": 20.0, "ampere": 20.0, "hopper": 36.7}
TREE_LL128_PER_CHANNEL: dict[Generation, tuple[float, float, float]] = {
    "volta": (20.0, 20.0, 20.0),
    "ampere": (20.0, 20.0, 20.0),
    "hopper": (36.7, 36.7, 29.0),
}
TREE_PER_CHANNEL: dict[Generation, tuple[float, float, float]] = {
    "volta": (26.5, 18.5, 10.0),
    "ampere": (24.0, 23.6, 17.8),
    "hopper": (38.7, 41.4, 36.0),
}

# Shares of the bus bandwidth, same function
RING_LL_SHARE = 0.5
# What NCCL expected of LL up to 2.18 (tuning.cc at commit b6475625): less than it gets, so it left LL earlier.
OLD_RELEASE = (2, 18)
OLD_RING_LL_SHARE = 1 / 4
OLD_RING_LL_SHARE_ONE_HOST_NO_SUM = 1 / 3
RING_LL128_SHARE = 0.92  # 120 of 128 bytes are data, and a little
RING_LL128_SHARE_ONE_RANK_A_HOST = 0.7
TREE_SHARE = 0.92
TREE_LL_SHARE = 1 / 3.8
TREE_LL128_SHARE_ONE_HOST = 7 / 9
TREE_LL128_SHARE_HOSTS = 120 / 128
NVLS_SHARE = 0.85  # nvlsEfficiency of Hopper and later (0.74 for Blackwell)

# "Plateau effect of ring": Simple all-reduce over several hosts, from 64 bytes a channel and rank on
RING_PLATEAU = {"volta": 1.9, "ampere": 1.4, "hopper": 1.4}
RING_PLATEAU_BYTES = 64

# treeCorrectionFactor by log2(bytes / 64)
TREE_CORRECTION: dict[Protocol, tuple[float, ...]] = {
    "ll": (1, 1, 1, 1, 0.9, 0.8, 0.7, 0.7, 0.7, 0.7, 0.6, 0.5, 0.4, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1, 1, 1, 1),
    "ll128": (1, 1, 1, 1, 1, 0.9, 0.8, 0.8, 0.8, 0.7, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.8, 0.9, 0.9, 0.9, 0.9, 1, 1, 1),
    "simple": (0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.8, 0.7, 0.6, 0.6, 0.5,
               0.5, 0.5, 0.5, 0.6, 0.7, 0.8, 0.7, 0.7, 0.8, 0.9, 0.9, 0.9),
}  # fmt: skip

# search.cc: speeds tried a channel, in one host
SPEEDS = (40.0, 30.0, 20.0, 18.0, 15.0, 12.0, 10.0, 9.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.4, 1.2, 0.24, 0.12)
SPEEDS_HOPPER = (60.0, 50.0, 40.0, 30.0, 24.0, 20.0, 15.0, 12.0, 11.0, 6.0, 3.0, 2.4, 1.2, 0.24, 0.12)
# and with NICs, over several hosts
SPEEDS_HOSTS = (
    48.0, 30.0, 28.0, 24.0, 20.0, 18.0, 15.0, 12.0, 10.0, 9.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.4, 1.2, 0.24, 0.12,
)  # fmt: skip
SPEEDS_HOSTS_HOPPER = (
    48.0, 45.0, 42.0, 40.0, 30.0, 24.0, 22.0, 20.0, 17.5, 15.0, 12.0, 6.0, 3.0, 2.4, 1.2, 0.24, 0.12,
)  # fmt: skip
SPLIT_FROM = 25.0  # a channel at least this fast is cut into two of half the speed
# unless there are more than four already; then only from 50 GB/s on (capabilities above 8.0)
ENOUGH_CHANNELS = 4
SPLIT_ENOUGH_FROM = 50.0
MOST_CHANNELS = 32

NVLS_TREE_FROM = (2, 18)

# topo.h: Intel CPUs turn peer traffic into 64-byte packets
INTEL_P2P_OVERHEAD = 6 / 5

# Kernel structure.  src/device/prims_simple.h: a rank's turn in a Simple ring is cut into two slices, each handed over
# by itself.  src/device/all_reduce.h, minChunkSizeLL128: LL128 moves whole grains, 640 threads x 60 bytes / 2.
SLICES = 2
LL128_GRAIN = 640 * 60 // 2
# NCCL_P2P_LL_THRESHOLD: a send of up to 16 KiB goes by LL
P2P_LL_BYTES = 16 << 10

# "Enable P2P Read for Ampere/NVLink only" (src/graph/paths.cc): there a sender copies into a buffer of its own, from
# which the receiver reads, and its kernel ends when the last slice is in it.
READS_OVER_NVLINK = (8, 0)
# src/graph/paths.cc, ncclTopoComputeP2pChannels: 2 channels a link of SM80_NVLINK_BW, rounded up to a power of two
NVLINK_OF_A100_GB_S = 20.0
# What one channel's SM copies so: a fit to every second size from 1 MiB on of vidur's sends between two bridged A100s
# (microsoft/vidur, a100_pairwise_nvlink_send_recv, rank 0 sends); the others are within 6.5 % on average.
SENDER_COPY_GB_S = 11.4

# LL128 is on by default for these capabilities where every hop in a host is NVLink and every NIC within PXB (PXN from
# 9.0 on: there LL128's lines keep their order over the neighbour's NVLink too)
LL128_CAPABILITIES = ((7, 0), (8, 0), (9, 0), (10, 0), (12, 0))
