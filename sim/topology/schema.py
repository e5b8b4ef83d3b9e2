"""What a topology file may say: its keys, their units, and the laws each value must keep.

Bandwidths are GB/s (10^9 bytes a second) *in one direction*, latencies microseconds.  The graph's own laws (names
that exist, GPUs that can be reached) are checked when the machine is built.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from sim.ops import CollectiveKind
from sim.topology.device import FileModel, Positive, Text, Time, check_length, check_rising

NodeKind = Literal["cpu", "memory", "pcie-switch", "nvswitch", "nic", "network-switch"]
LinkKind = Literal["pcie", "nvlink", "smp", "memory", "network"]
# A slip of the keyboard (count: 1e16) must be an error of its line, not hours of building.
GroupCount = Annotated[int, Field(gt=0, le=1024)]
MAX_GPUS = 16_384


def _written_as(pattern: str, form: str) -> AfterValidator:
    """Text of one form, told in words where it is of another."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"must be {form}, found {text!r}")
        return text

    return AfterValidator(check)


Name = Annotated[str, _written_as(r"[A-Za-z][A-Za-z0-9_.-]*", "a letter, then letters, digits, _, . or -")]


class Devices(FileModel):
    """The GPUs of one host: ``id``0, ``id``1, ... of one profile.

    ``other_profiles`` names the exceptions; ``set`` replaces values of the profile (``devices.memory_gib`` in an
    override means ``devices.set.memory_gib``).
    """

    id: Name = "gpu"
    count: GroupCount = 1
    profile: Text
    other_profiles: dict[str, str] = Field(default={})
    set: dict[str, object] = Field(default={})


class NodeGroup(FileModel):
    """Everything that is not a GPU.  With ``count`` the members are ``id``0, ``id``1, ...; without, just ``id``.

    ``shared``: one for all hosts (a network switch), not one a host.
    """

    id: Name
    kind: NodeKind
    count: GroupCount | None = None
    shared: bool = False


class LinkClass(FileModel):
    """Links that are alike.  ``bandwidth_gb_s`` is what transfers really get in one direction.

    ``between``: pairs of ends.  An end is a node (``gpu0``), a range (``gpu0-3``) or a whole group (``gpu``); the
    longer side of a pair is dealt to the shorter in equal consecutive blocks, so ``[gpu, cpu]`` puts four of eight
    GPUs on each of two CPUs.
    ``nccl_gb_s``: what NCCL's own tables take the link for when it searches its rings (default: bandwidth_gb_s).
    ``p2p_both_ways``: the share of its bandwidth that a PCIe link keeps a direction while traffic from GPU to GPU goes
    both ways over it and through a CPU (default: all).
    ``enabled``: false takes the links out, for a what-if.
    """

    kind: LinkKind
    bandwidth_gb_s: Positive
    latency_us: Time = 0.0
    duplex: Literal["full", "half"] = "full"
    nccl_gb_s: Positive | None = None
    p2p_both_ways: Annotated[float, Field(gt=0, le=1)] = 1.0
    enabled: bool = True
    source: Text
    between: Annotated[tuple[tuple[str, str], ...], Field(min_length=1)]


class HostCosts(FileModel):
    """What the CPU side costs a synthesized workload, in microseconds a call, and who made the CPU.

    ``collective_us``: issuing one torch.distributed collective; back-to-back calls cannot be measured faster.
    ``product_us`` (matrix products and convolutions), ``norm_us`` (normalizations and softmaxes), ``copy_us`` (copies,
    casts, concatenations), ``list_us`` (an optimizer's ops over lists) and ``backward_us`` (what of other kinds the
    autograd thread issues) are ``op_us`` unless stated: public traces do not agree on them (docs/host.md).
    """

    cpu_vendor: Literal["intel", "amd", "arm", "unknown"] = "unknown"
    op_us: Time = 15.0
    metadata_us: Time = 4.0
    collective_us: Time = 54.0
    product_us: Time | None = None
    norm_us: Time | None = None
    copy_us: Time | None = None
    list_us: Time | None = None
    backward_us: Time | None = None
    source: Text = (
        "op_us, metadata_us: medians over a public 8-GPU V100 training trace (param et_replay tests, DLRM rank 0) of "
        "the time from one top-level aten op to the next, with one kernel launch (15 us; an H100 forward pass of "
        "TraceLens' tests: 20.6 us with Python stacks recorded) and with none (4.0 us; there 4.3 us). "
        "collective_us: median length of the nccl:all_reduce range in the same trace, torch.profiler on"
    )


_ALGORITHMS = ("tree", "ring", "nvls")
_PROTOCOLS = ("ll", "ll128", "simple")


def _choice(value: str, known: tuple[str, ...]) -> str:
    names = value.removeprefix("^").lower().split(",")
    wrong = [n for n in names if n not in known]
    if wrong:
        raise ValueError(f"knows {', '.join(known)}, a comma list or ^list of them; found {', '.join(wrong)!r}")
    return value


def allowed(value: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """The names that an NCCL choice such as ``Ring`` or ``^LL128`` leaves, in the order known."""
    if value is None:
        return known
    names = value.removeprefix("^").lower().split(",")
    return tuple(n for n in known if (n in names) != value.startswith("^"))


class NcclSettings(FileModel):
    """NCCL's version and environment on this machine, the latter by the names NCCL uses."""

    version: Annotated[str, _written_as(r"2\.\d+(\.\d+)*", "a version such as 2.18 or 2.18.3")] = "2.28"

    NCCL_ALGO: Annotated[str, AfterValidator(lambda v: _choice(v, _ALGORITHMS))] | None = None
    NCCL_PROTO: Annotated[str, AfterValidator(lambda v: _choice(v, _PROTOCOLS))] | None = None
    NCCL_P2P_DISABLE: bool = False
    NCCL_P2P_LEVEL: Literal["LOC", "NVL", "PIX", "PXB", "PHB", "SYS"] | None = None
    NCCL_NET_GDR_LEVEL: Literal["LOC", "PIX", "PXB", "PHB", "SYS"] | None = None
    NCCL_MIN_NCHANNELS: Annotated[int, Field(ge=1, le=64)] | None = None
    NCCL_MAX_NCHANNELS: Annotated[int, Field(ge=1, le=64)] | None = None

    @property
    def release(self) -> tuple[int, int]:
        """Version as numbers: (2, 28)."""
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)

    @property
    def algorithms(self) -> tuple[str, ...]:
        return allowed(self.NCCL_ALGO, _ALGORITHMS)

    @property
    def protocols(self) -> tuple[str, ...]:
        return allowed(self.NCCL_PROTO, _PROTOCOLS)

    @model_validator(mode="after")
    def _something_left(self) -> NcclSettings:
        if not self.algorithms or not self.protocols:
            raise ValueError("NCCL_ALGO and NCCL_PROTO must leave at least one algorithm and one protocol")
        return self


class MeasuredCurve(FileModel):
    """Times of one collective measured on this very host: ``us[i]`` for ``bytes[i]`` of the whole tensor."""

    kind: CollectiveKind
    ranks: Annotated[int, Field(ge=2)]
    source: Text
    bytes: tuple[Positive, ...]
    us: tuple[Positive, ...]

    @model_validator(mode="after")
    def _same_length(self) -> MeasuredCurve:
        check_rising("bytes", self.bytes)
        check_length("us", self.us, len(self.bytes))
        return self


class Collectives(FileModel):
    """How collectives are costed.

    ``library``: ``nccl`` (NCCL's own model on the links found), ``gloo`` (CPU ranks), or ``alpha-beta`` (the textbook
    ring: each step costs the path's latency plus the piece over the slowest link).
    """

    library: Literal["nccl", "gloo", "alpha-beta"] = "nccl"
    measured: tuple[MeasuredCurve, ...] = ()


class TopologyFile(FileModel):
    """One machine, or ``hosts`` machines alike: ``devices``, ``nodes`` and ``links`` then describe one of them."""

    name: Text
    description: Text
    source: Text
    hypothetical: bool = False
    assumed: tuple[Text, ...] = ()
    hosts: GroupCount = 1
    devices: Devices
    nodes: tuple[NodeGroup, ...] = ()
    links: dict[Name, LinkClass] = Field(default={})
    host: HostCosts = HostCosts()
    nccl: NcclSettings = NcclSettings()
    collectives: Collectives = Collectives()

    @model_validator(mode="after")
    def _not_too_many(self) -> TopologyFile:
        if self.hosts * self.devices.count > MAX_GPUS:
            raise ValueError(f"hosts x devices.count must be at most {MAX_GPUS} GPUs")
        return self
