"""A topology file from measurements: the devices of this host, how they are joined, what its CPU takes, and the
curves of its collectives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from sim.errors import UserError
from sim.measurements import Machine as Measured
from sim.measurements import Measurements, Sample
from sim.ops import CollectiveKind
from sim.place.calibration.profile import provenance, rounded
from sim.topology.device import DeviceProfile
from sim.topology.smi import Layout, Wiring, layout_of, parse_topo
from sim.units import MIB

Data = dict[str, Any]

# What a copy gets of a PCIe slot with 16 lanes, by generation (NVIDIA/nccl, src/graph/topo.h: 12 of 3.0, doubled with
# every generation), where no copy was measured.
PCIE_X16_GB_S = {3: 12.0, 4: 24.0, 5: 48.0, 6: 96.0}
PCIE_LATENCY_US = 1.0  # over a root complex (Neugebauer et al., SIGCOMM 2018)
SOCKET_LATENCY_US = 0.5
NVLINK_LATENCY_US = 1.9  # docs/collectives.md: a hop of LL128
NVLINK_GB_S = 25.0  # of one link in one direction, from NVLink 2.0 to 4.0 (NVIDIA data sheets of V100, A100, H100)
LARGE = 16 * MIB


def machine_of(taken: Measurements, name: str, profile: DeviceProfile, profile_file: str) -> Data:
    """The topology file as plain data.  ``profile_file``: the device profile's name beside it."""
    source = provenance(taken.machine)
    kind = profile.kind
    found = _cpus(taken, source) if kind == "cpu" else _gpus(taken, profile, source)
    data: Data = {"name": name, "description": found.pop("description"), "source": source}
    data["assumed"] = found.pop("assumed")
    data["devices"] = {"id": found.pop("id"), "count": found.pop("count"), "profile": profile_file}
    data |= {key: value for key, value in found.items() if value}
    host = _host(taken, profile, source)
    data["host"] = {"cpu_vendor": taken.machine.cpu_vendor, **host}
    curves = [*_curves(taken, source)]
    library = "gloo" if kind == "cpu" else "nccl"
    data["collectives"] = {"library": library, **({"measured": curves} if curves else {})}
    nccl = taken.machine.versions.get("nccl", "")
    if kind == "gpu" and nccl.startswith("2."):
        data["nccl"] = {"version": nccl}
    return {key: value for key, value in data.items() if value != []}


# The host ----------------------------------------


def _host(taken: Measurements, profile: DeviceProfile, source: str) -> Data:
    """On a CPU the shortest call is the kernel's, so the operator's own part is what is left beside it."""
    op, metadata = taken.us("host", "op"), taken.us("host", "metadata")
    issue = min((s.us for s in taken.of("links", "issue")), default=None)
    floor = profile.launch.kernel_floor_us or 0.0 if profile.launch is not None and profile.kind == "cpu" else 0.0
    times = {"op_us": None if op is None else max(op - floor, 0.0), "metadata_us": metadata, "collective_us": issue}
    measured = {name: _figures(us) for name, us in times.items() if us is not None}
    if not measured:
        return {}
    what = "op_us, metadata_us: forward and backward of a transformer block of 16 channels, by its dispatched ops"
    rest = sorted(set(times) - set(measured))
    defaults = f"; {', '.join(rest)}: the defaults of sim/topology/schema.py" if rest else ""
    return {**measured, "source": f"{source}; {what}{defaults}"}


def _figures(us: float) -> float:
    return float(f"{us:.3g}")


def _curves(taken: Measurements, source: str) -> Iterable[Data]:
    """A curve of each collective and number of ranks."""
    for kind in taken.whats("links"):
        if kind not in get_args(CollectiveKind) or kind == "send":
            continue
        samples = taken.of("links", kind)
        for ranks in sorted({s.sizes[1] for s in samples}):
            points = [s for s in samples if s.sizes[1] == ranks]
            yield {
                "kind": kind,
                "ranks": ranks,
                "source": f"{source}; float32, time of a call on the slowest rank, calls back to back",
                "bytes": [s.sizes[0] for s in points],
                "us": rounded(s.us for s in points),
            }


# CPUs ----------------------------------------


def _cpus(taken: Measurements, source: str) -> Data:
    """Ranks that talk over loopback, as gloo does on one host; one alone where links were not measured."""
    machine = taken.machine
    sends = taken.of("links", "send")
    ranks = max((s.sizes[-1] for s in taken.of("links")), default=1)
    found: Data = {
        "id": "rank",
        "count": ranks,
        "description": f"{ranks} CPU rank{'s' * (ranks > 1)} on {machine.cpu_name}, {machine.cpus} CPUs",
        "assumed": [],
    }
    if ranks == 1:
        return found
    threads = f"{machine.threads} thread{'s' * (machine.threads > 1)}"
    found["assumed"] = [
        f"each rank computes as the one process that was measured, which had the machine to itself and {threads}"
    ]
    bandwidth, latency = _rate(sends), _latency(sends)
    found["nodes"] = [{"id": "loopback", "kind": "network-switch"}]
    found["links"] = {
        "tcp": {
            "kind": "network",
            "bandwidth_gb_s": bandwidth,
            "latency_us": latency,
            "source": f"{source}; gloo send and recv, half of the time there and back; a message passes two links",
            "between": [["rank", "loopback"]],
        }
    }
    return found


def _rate(samples: Iterable[Sample]) -> float:
    """GB/s that large messages reach (the fastest; the largest where all are small)."""
    ordered = sorted(samples, key=lambda s: s.sizes[0])
    large = [s for s in ordered if s.sizes[0] >= LARGE] or ordered[-1:]
    return _figures(max((s.sizes[0] / s.us / 1e3 for s in large), default=1.0))


def _latency(samples: Iterable[Sample]) -> float:
    """Of one of the two links that a small message passes."""
    return _figures(min((s.us for s in samples), default=0.0) / 2)


# GPUs ----------------------------------------


def _gpus(taken: Measurements, profile: DeviceProfile, source: str) -> Data:
    machine, device = taken.machine, taken.machine.device
    everything = bool(taken.of("links")) or bool(machine.topology)
    count = device.count if everything else 1
    assumed: list[str] = []
    if machine.others:
        assumed.append(f"GPUs of other names are left out: {', '.join(machine.others)}")
    wiring, unknown = _wiring(machine, count)
    if wiring is None:
        if count > 1:
            assumed.append(f"how the GPUs are joined is not known ({unknown}): all at one CPU, without NVLink")
        wiring = Wiring({}, (0,) * count)
    layout = layout_of(wiring)
    links, guessed = _links(taken, layout, wiring, profile, source)
    cpus = max(wiring.domains) + 1
    sockets = f", {cpus} NUMA nodes" if cpus > 1 else ""
    return {
        "id": "gpu",
        "count": count,
        "description": f"{count} x {device.full_name}{sockets}, host CPU {machine.cpu_name}",
        "assumed": [*assumed, *layout.assumed, *guessed],
        "nodes": [dict(node) for node in layout.nodes],
        "links": links,
    }


def _wiring(machine: Measured, count: int) -> tuple[Wiring | None, str]:
    """How the measured GPUs are joined, or why that is not known: never an error, the measurements stand."""
    if not machine.topology:
        return None, "no nvidia-smi topo -m"
    try:
        wiring = parse_topo(machine.topology)
    except UserError as error:
        return None, str(error)
    if machine.gpus and len(machine.gpus) >= count and max(machine.gpus) < wiring.gpus:
        return wiring.only(machine.gpus[:count]), ""
    if wiring.gpus == count:
        return wiring, ""
    return None, f"nvidia-smi topo -m shows {wiring.gpus} and CUDA {count}, which ones is not told"


def _links(
    taken: Measurements, layout: Layout, wiring: Wiring, profile: DeviceProfile, source: str
) -> tuple[Data, list[str]]:
    pairs = _pair_rates(taken)
    assumed: list[str] = []
    links: Data = {"pcie": _pcie(taken, profile, layout, source)}
    for bonded, between in layout.nvlinks.items():
        ends = {(_gpu(a), _gpu(b)) for a, b in between if "nvswitch" not in (a, b)}
        rates = [rate for pair, rate in pairs.items() if layout.switched or pair in ends]
        said = f"{source}; copies between the GPUs it joins, the fastest pair"
        if not rates:
            rates, said = [bonded * NVLINK_GB_S], f"not measured: {bonded} links of {NVLINK_GB_S:g} GB/s (data sheets)"
        links[f"nvlink{bonded}"] = _link("nvlink", max(rates), NVLINK_LATENCY_US, said, between)
    if layout.sockets:
        across = [
            rate for (a, b), rate in pairs.items()
            if wiring.domains[a] != wiring.domains[b] and not wiring.joined[a, b].startswith("NV")
        ]  # fmt: skip
        pcie = float(links["pcie"]["bandwidth_gb_s"])
        rate = max([*across, pcie])
        said = f"{source}; the fastest copy between GPUs of two NUMA nodes, or one slot's rate where that is more"
        assumed.append(
            "links between NUMA nodes carry what one GPU could send over them; what they carry in all is not measured"
        )
        links["socket"] = _link("smp", rate, SOCKET_LATENCY_US, said, layout.sockets)
    return links, assumed


def _link(kind: str, rate: float, latency: float, source: str, between: Iterable[tuple[str, str]]) -> Data:
    return {
        "kind": kind, "bandwidth_gb_s": _figures(rate), "latency_us": latency, "source": source,
        "between": [list(pair) for pair in between],
    }  # fmt: skip


def _pcie(taken: Measurements, profile: DeviceProfile, layout: Layout, source: str) -> Data:
    copies = [*taken.of("copy", "h2d"), *taken.of("copy", "d2h")]
    if copies:
        said = f"{source}; the fastest copy from or to pinned host memory; latency: {PCIE_LATENCY_US:g} us is assumed"
        return _link("pcie", _rate(copies), PCIE_LATENCY_US, said, layout.pcie)
    slot = profile.pcie
    rate = PCIE_X16_GB_S.get(slot.generation, 24.0) * slot.lanes / 16 if slot is not None else 24.0
    said = "not measured: NCCL's figure for the slot (NVIDIA/nccl src/graph/topo.h)"
    return _link("pcie", rate, PCIE_LATENCY_US, said, layout.pcie)


def _pair_rates(taken: Measurements) -> Mapping[tuple[int, int], float]:
    """GB/s of large copies between two GPUs."""
    rates = {}
    for what in taken.whats("copy"):
        words = what.split()
        if words[0] == "p2p":
            rates[int(words[1]), int(words[2])] = _rate(taken.of("copy", what))
    return rates


def _gpu(name: str) -> int:
    return int(name.removeprefix("gpu"))
