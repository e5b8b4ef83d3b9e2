"""``nvidia-smi topo -m`` read: how GPUs are joined, as nodes and pairs of a topology file.

Its words: NV# a bonded set of # NVLinks; PIX one PCIe switch, PXB several, PHB the host bridge of a CPU, NODE several
bridges of one NUMA node, SYS the link between NUMA nodes.  NICs are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import combinations

import msgspec

from sim.errors import UserError

# No GPU has more NVLinks (H100, B200: 18): more to all others together is an NVSwitch.
MOST_NVLINKS = 18
UNDER_ONE_SWITCH = ("PIX", "PXB")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")

Pair = tuple[int, int]


class Wiring(msgspec.Struct, frozen=True):
    """``joined``: what nvidia-smi says of each pair; ``domains``: the NUMA node of each GPU, numbered from 0."""

    joined: dict[Pair, str]
    domains: tuple[int, ...]

    @property
    def gpus(self) -> int:
        """How many."""
        return len(self.domains)

    def only(self, gpus: Sequence[int]) -> Wiring:
        """Of some of the GPUs, in the order given; a NUMA node that none of them is at is gone."""
        joined = {
            (i, j): self.joined[min(gpus[i], gpus[j]), max(gpus[i], gpus[j])]
            for i, j in combinations(range(len(gpus)), 2)
        }
        at = [self.domains[gpu] for gpu in gpus]
        order = {domain: place for place, domain in enumerate(sorted(set(at)))}
        return Wiring(joined, tuple(order[domain] for domain in at))


class Layout(msgspec.Struct, frozen=True):
    """Nodes and pairs of a topology file; ``nvlinks``: of each class of NVLinks, how many are bonded."""

    nodes: tuple[dict[str, object], ...]
    pcie: tuple[tuple[str, str], ...]
    sockets: tuple[tuple[str, str], ...]
    nvlinks: dict[int, tuple[tuple[str, str], ...]]
    switched: bool
    assumed: tuple[str, ...]


def parse_topo(text: str) -> Wiring:
    """UserError where it is no matrix of GPUs."""
    lines = [_COLOUR.sub("", line).strip() for line in text.splitlines()]
    heads = [line.split() for line in lines if line.startswith("GPU0") and " X" not in f" {line.partition('GPU0')[2]}"]
    if not heads:
        raise UserError("nvidia-smi topo -m: shows no matrix of GPUs")
    head = heads[0]
    columns = head[: head.index("CPU")] if "CPU" in head else head
    gpus = [name for name in columns if re.fullmatch(r"GPU\d+", name)]
    rows = {line.split()[0]: line.split() for line in lines if re.match(r"GPU\d+\s", line) and line.split() != head}
    missing = [name for name in gpus if len(rows.get(name, ())) <= len(columns)]
    if missing:
        raise UserError(f"nvidia-smi topo -m: the line of {missing[0]} has fewer columns than its head")
    joined = {(i, j): rows[gpus[i]][1 + columns.index(gpus[j])] for i, j in combinations(range(len(gpus)), 2)}
    return Wiring(joined, _domains([rows[name][1 + len(columns) :] for name in gpus]))


def _domains(affinities: list[list[str]]) -> tuple[int, ...]:
    """By NUMA node where it is told, else by the CPUs."""
    names = [words[1] if len(words) > 1 and words[1] != "N/A" else "".join(words[:1]) for words in affinities]
    order = {name: place for place, name in enumerate(dict.fromkeys(sorted(names)))}
    return tuple(order[name] for name in names)


def layout_of(wiring: Wiring) -> Layout:
    """The topology's nodes and links that the matrix says, and what it leaves open."""
    cpus = max(wiring.domains) + 1
    switches = list(_switches(wiring))
    under = {gpu: place for place, members in enumerate(switches) for gpu in members}
    nodes: list[dict[str, object]] = [{"id": "cpu", "kind": "cpu", "count": cpus}]
    assumed = []
    if switches:
        nodes.append({"id": "switch", "kind": "pcie-switch", "count": len(switches)})
        if "PXB" in wiring.joined.values():
            assumed.append("GPUs that nvidia-smi puts behind several PCIe switches (PXB) are drawn behind one")
    pcie = [(f"switch{place}", f"cpu{wiring.domains[members[0]]}") for place, members in enumerate(switches)]
    pcie += [
        (f"gpu{gpu}", f"switch{under[gpu]}" if gpu in under else f"cpu{domain}")
        for gpu, domain in enumerate(wiring.domains)
    ]
    nvlinks, switched = _nvlinks(wiring)
    if switched:
        nodes.append({"id": "nvswitch", "kind": "nvswitch"})
        assumed.append("more NVLinks join each pair than a GPU has for each: they lead to NVSwitches, drawn as one")
    sockets = tuple((f"cpu{a}", f"cpu{b}") for a, b in combinations(range(cpus), 2))
    return Layout(tuple(nodes), tuple(pcie), sockets, nvlinks, switched, tuple(assumed))


def _switches(wiring: Wiring) -> Iterator[tuple[int, ...]]:
    """Sets of GPUs that reach each other without a host bridge."""
    left = set(range(wiring.gpus))
    for first in range(wiring.gpus):
        if first not in left:
            continue
        together, reached = {first}, [first]
        while reached:
            at = reached.pop()
            near = {
                b if a == at else a
                for (a, b), word in wiring.joined.items()
                if at in (a, b) and word in UNDER_ONE_SWITCH
            }
            reached += sorted(near - together)
            together |= near
        left -= together
        if len(together) > 1:
            yield tuple(sorted(together))


def _nvlinks(wiring: Wiring) -> tuple[dict[int, tuple[tuple[str, str], ...]], bool]:
    bonded = {pair: int(word[2:]) for pair, word in wiring.joined.items() if re.fullmatch(r"NV\d+", word)}
    counts = set(bonded.values())
    if len(bonded) == len(wiring.joined) and len(counts) == 1 and wiring.gpus > 2:
        count = counts.pop()
        if count * (wiring.gpus - 1) > MOST_NVLINKS:
            return {count: tuple((f"gpu{gpu}", "nvswitch") for gpu in range(wiring.gpus))}, True
    return {
        count: tuple((f"gpu{a}", f"gpu{b}") for (a, b), links in sorted(bonded.items()) if links == count)
        for count in sorted(set(bonded.values()))
    }, False
