"""From a checked file to the machine: names expanded, links drawn, every problem of the graph listed at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import networkx as nx

from sim.errors import InputError, UnknownNameError, UserError
from sim.topology.device import DeviceProfile, read_device, validate_device
from sim.topology.machine import Gpu, Link, Machine
from sim.topology.names import Group, Names, member_names, natural
from sim.topology.problems import nearest_key
from sim.topology.schema import LinkClass, NodeKind, TopologyFile

NAMED_LOST = 4


def build_machine(file: TopologyFile, where: str) -> Machine:
    """The machine that the file describes; InputError with all that is wrong with its graph."""
    gpus, nodes, links, problems = _parts(file)
    if not problems:
        problems = _unreachable(gpus, nodes, links)
    if problems:
        raise InputError(where, "; ".join(problems))
    return Machine(
        name=file.name,
        description=file.description,
        source=file.source,
        hypothetical=file.hypothetical,
        assumed=file.assumed,
        hosts=file.hosts,
        gpus=gpus,
        nodes=nodes,
        links=links,
        host=file.host,
        nccl=file.nccl,
        collectives=file.collectives,
    )


def naming_problems(file: TopologyFile) -> list[str]:
    """What is wrong with the file's names: unknown devices, links to missing nodes, a name that stands twice."""
    return _parts(file)[3]


def _parts(file: TopologyFile) -> tuple[tuple[Gpu, ...], dict[str, NodeKind], tuple[Link, ...], list[str]]:
    problems: list[str] = []
    names = member_names(file.devices.id, file.devices.count, file.hosts)
    gpus = _gpus(file, names, problems)
    nodes = _nodes(file, set(names), problems)
    links = _links(file, names, nodes, problems)
    return gpus, nodes, links, problems


# GPUs -----------------------------------------------------------------------------------------------------------


def _gpus(file: TopologyFile, names: tuple[str, ...], problems: list[str]) -> tuple[Gpu, ...]:
    devices = file.devices
    for name in sorted(devices.other_profiles, key=natural):
        if name not in names:
            problems.append(f"devices.other_profiles.{name}: no such device{nearest_key(name, names)}")
    main = _profile(devices.profile, "devices.profile", devices.set, problems)
    other = {
        name: _profile(profile, f"devices.other_profiles.{name}", {}, problems)
        for name, profile in devices.other_profiles.items()
    }
    if main is None or None in other.values():
        return ()
    profiles = {name: other.get(name) or main for name in names}
    return tuple(Gpu(i, name, profiles[name], i // devices.count) for i, name in enumerate(names))


def _profile(name: str, path: str, changes: Mapping[str, object], problems: list[str]) -> DeviceProfile | None:
    try:
        data, where = read_device(name)
        profile = validate_device(merged(data, changes), f"device {where}")
        return profile.changed_from(validate_device(data, f"device {where}")) if changes else profile
    except UnknownNameError as error:
        problems.append(f"{path}: {error}")
    except UserError as error:
        problems.append(str(error))
    return None


def merged(data: Mapping[str, object], changes: Mapping[str, object]) -> dict[str, object]:
    """``data`` with ``changes`` laid over it, mapping by mapping."""
    result = dict(data)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


# Other nodes ----------------------------------------------------------------------------------------------------


def _nodes(file: TopologyFile, gpus: set[str], problems: list[str]) -> dict[str, NodeKind]:
    nodes: dict[str, NodeKind] = {}
    for place, group in enumerate(file.nodes):
        for name in member_names(group.id, group.count, 1 if group.shared else file.hosts):
            if name in gpus or name in nodes:
                problems.append(f"nodes[{place}].id: two nodes are named {name!r}; a name must stand once")
            nodes[name] = group.kind
    return dict(sorted(nodes.items(), key=lambda item: natural(item[0])))


# Links ----------------------------------------------------------------------------------------------------------


def _links(
    file: TopologyFile, gpus: tuple[str, ...], nodes: dict[str, NodeKind], problems: list[str]
) -> tuple[Link, ...]:
    groups = {file.devices.id: Group(file.devices.count)}
    groups.update({group.id: Group(group.count, group.shared) for group in file.nodes})
    names = Names(groups, frozenset(gpus) | frozenset(nodes), file.hosts)
    links: list[Link] = []
    for cls in sorted(file.links):
        model = file.links[cls]
        drawn: Counter[tuple[str, str]] = Counter()
        for place, pair in enumerate(model.between):
            pairs, problem = names.expand(pair)
            if problem:
                problems.append(f"links.{cls}.between[{place}]: {problem}")
            drawn.update((min(ends, key=natural), max(ends, key=natural)) for ends in pairs)
        links += [_link(cls, model, a, b, times) for (a, b), times in drawn.items() if model.enabled]
    return tuple(sorted(links, key=lambda k: (k.cls, natural(k.a), natural(k.b))))


def _link(cls: str, model: LinkClass, a: str, b: str, times: int) -> Link:
    """Links of one class between two nodes are one, so many times as wide: everything crosses them together."""
    return Link(
        cls=cls,
        kind=model.kind,
        a=a,
        b=b,
        bandwidth_gb_s=model.bandwidth_gb_s * times,
        nccl_gb_s=(model.nccl_gb_s or model.bandwidth_gb_s) * times,
        latency_us=model.latency_us,
        duplex=model.duplex,
        p2p_both_ways=model.p2p_both_ways,
        source=model.source,
    )


def _unreachable(gpus: tuple[Gpu, ...], nodes: dict[str, NodeKind], links: tuple[Link, ...]) -> list[str]:
    graph: nx.Graph[str] = nx.Graph()
    graph.add_nodes_from([gpu.name for gpu in gpus])
    graph.add_nodes_from(nodes)
    graph.add_edges_from((link.a, link.b) for link in links)
    home = nx.node_connected_component(graph, gpus[0].name)
    lost = [gpu.name for gpu in gpus if gpu.name not in home]
    if not lost:
        return []
    named = ", ".join(lost[:NAMED_LOST]) + (f" and {len(lost) - NAMED_LOST} more" if len(lost) > NAMED_LOST else "")
    return [f"{named} cannot be reached from {gpus[0].name}: add a link between them and a node that the others reach"]
