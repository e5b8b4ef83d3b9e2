"""Topology files: names, overrides, and every mistake of a file told at once."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sim.errors import InputError, UnknownNameError, UserError
from sim.topology import load_topology, shipped_topologies

GOOD = """
name: two
description: two cards
source: a test
devices: {count: 2, profile: rtx-a5000}
nodes:
  - {id: cpu, kind: cpu, count: 1}
links:
  pcie: {kind: pcie, bandwidth_gb_s: 24, latency_us: 1, source: a test, between: [[gpu, cpu]]}
"""


def write(folder: Path, text: str) -> str:
    (folder / "machine.yaml").write_text(text)
    return str(folder / "machine.yaml")


def refused(folder: Path, text: str) -> str:
    with pytest.raises(InputError) as error:
        load_topology(write(folder, text))
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(str(folder / "machine.yaml"))
    return message


@pytest.mark.parametrize("name", shipped_topologies())
def test_every_shipped_machine_loads_by_name_with_and_without_suffix(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # from any folder
    machine = load_topology(name)
    assert machine.name == name
    assert load_topology(f"{name}.yaml").gpus == machine.gpus
    assert machine.source
    assert all(link.source for link in machine.links)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    machine = load_topology(write(tmp_path, GOOD))
    assert [gpu.name for gpu in machine.gpus] == ["gpu0", "gpu1"]
    assert [link.name for link in machine.links] == ["pcie:cpu0-gpu0", "pcie:cpu0-gpu1"]


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'a5000x8'"):
        load_topology("a5000x88")


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_topology(str(tmp_path / "none.yaml"))
    with pytest.raises(InputError, match="is a folder"):
        load_topology(str(tmp_path))


def test_three_mistakes_are_told_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("24", "0").replace("rtx-a5000", "rtx-a500").replace("[[gpu, cpu]]", "[[gpu, cpu7]]")
    message = refused(tmp_path, text)
    assert "links.pcie.bandwidth_gb_s: must be > 0, found 0" in message
    assert "devices.profile: unknown device 'rtx-a500': did you mean 'rtx-a5000'" in message
    assert "links.pcie.between[0]: no node is named 'cpu7' (did you mean 'cpu0'?)" in message


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("latency_us", "latency_ms", "links.pcie.latency_ms: unknown key (did you mean 'latency_us'?)"),
        ("kind: pcie", "kind: pci", "links.pcie.kind: must be 'pcie', 'nvlink'"),
        ("24", "fast", "links.pcie.bandwidth_gb_s: must be a number"),
        ("24", ".nan", "links.pcie.bandwidth_gb_s: must be"),
        ("24", ".inf", "links.pcie.bandwidth_gb_s: must be a finite number"),
        ("count: 2", "count: 0", "devices.count: must be > 0"),
        ("source: a test\ndevices", "devices", "source: is missing"),
        ("[[gpu, cpu]]", "[[gpu0, cpu0]]", "gpu1 cannot be reached from gpu0"),
        ("[[gpu, cpu]]", "[[gpu0, gpu0]]", "a link must join two different nodes"),
        ("[[gpu, cpu]]", "[]", "links.pcie.between"),
        ("id: cpu, kind: cpu, count: 1", "id: gpu, kind: cpu, count: 1", "two nodes are named 'gpu0'"),
        ("name: two", "name: two\nname: three", "line 3: not valid YAML: the key 'name' stands twice"),
        ("nodes:", "nodes: [", "not valid YAML"),
        ("links:", "link:", "link: unknown key (did you mean 'links'?)"),
        (
            "[[gpu, cpu]]",
            "[[gpu, cpu, cpu]]",
            "links.pcie.between[0]: must hold 2 at most, found ['gpu', 'cpu', 'cpu']",
        ),
        ("id: cpu", "id: 1cpu", "nodes[0].id: must be a letter, then letters, digits, _, . or -, found '1cpu'"),
        (
            "nodes:",
            'nccl: {version: "3.1"}\nnodes:',
            "nccl.version: must be a version such as 2.18 or 2.18.3, found '3.1'",
        ),
    ],
)
def test_each_mistake_is_named_with_its_place(tmp_path: Path, old: str, new: str, told: str) -> None:
    assert old in GOOD
    assert told in refused(tmp_path, GOOD.replace(old, new, 1))


def test_ends_of_a_group_whose_count_is_wrong_are_no_mistake_of_their_own(tmp_path: Path) -> None:
    text = GOOD.replace("count: 2", "count: 1e9").replace("[[gpu, cpu]]", "[[gpu0, cpu0], [gpu1, cpu0]]")
    assert refused(tmp_path, text) == f"{tmp_path / 'machine.yaml'}: devices.count: must be a whole number, found '1e9'"


def test_a_pipe_is_read_as_a_file_is(tmp_path: Path) -> None:
    read, write_end = os.pipe()
    os.write(write_end, GOOD.encode())
    os.close(write_end)
    assert load_topology(f"/dev/fd/{read}").name == "two"
    os.close(read)
    with pytest.raises(UnknownNameError, match="unknown topology ''"):
        load_topology("")


@pytest.mark.parametrize("text", ["", "3", "- a", "a: b", "\0", "!!python/object:os.system {}", "&a [*a]"])
def test_what_is_no_topology_is_refused(tmp_path: Path, text: str) -> None:
    refused(tmp_path, text)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "machine.yaml").write_bytes(b"\xff\xfe\x00x")
    with pytest.raises(InputError, match="UTF-8"):
        load_topology(str(tmp_path / "machine.yaml"))


# Overrides ------------------------------------------------------------------------------------------------------


def test_overrides_change_the_value_and_remember_the_machine_before() -> None:
    machine = load_topology("a5000x8", {"links.pcie.bandwidth_gb_s": "8", "devices.memory_gib": 48})
    assert machine.route("gpu0", "gpu1").bandwidth_gb_s == 8
    assert machine.gpus[3].profile.memory_gib == 48
    assert [(c.path, c.before, c.after) for c in machine.changes] == [
        ("links.pcie.bandwidth_gb_s", 24.0, 8),
        ("devices.memory_gib", 24.0, 48),
    ]
    assert machine.baseline is not None
    assert machine.baseline.route("gpu0", "gpu1").bandwidth_gb_s == 24
    assert machine.baseline.gpus[3].profile.memory_gib == 24


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("links.pcie.bandwidth", "8", "did you mean 'links.pcie.bandwidth_gb_s'"),
        ("link.pcie.bandwidth_gb_s", "8", "did you mean 'links.pcie.bandwidth_gb_s'"),
        ("", "8", "unknown path ''"),
        ("links.pcie.bandwidth_gb_s", "0", "links.pcie.bandwidth_gb_s: must be > 0"),
        ("links.pcie.bandwidth_gb_s", "fast", "links.pcie.bandwidth_gb_s: must be a number"),
        ("devices.profile", "rtx-a5001", "unknown device 'rtx-a5001'"),
        ("nccl.NCCL_ALGO", "rings", "nccl.NCCL_ALGO: knows tree, ring"),
        ("devices.count", "3", "cannot be dealt evenly"),
    ],
)
def test_a_wrong_override_is_one_line(path: str, value: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        load_topology("a5000x8", {path: value})
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_nccl_settings_use_nccls_own_words() -> None:
    machine = load_topology("a5000x8", {"nccl.NCCL_PROTO": "^LL128", "nccl.NCCL_ALGO": "Ring,Tree"})
    assert machine.nccl.protocols == ("ll", "simple")
    assert machine.nccl.algorithms == ("tree", "ring")


# Fuzz -----------------------------------------------------------------------------------------------------------

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def _places(data: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [place for key, inner in items for place in [(*path, key), *_places(inner, (*path, key))]]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_never_gives_a_traceback(tmp_path: Path, data: st.DataObject) -> None:
    raw = yaml.safe_load(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(_places(raw)))
        target = raw
        for key in place[:-1]:
            target = target[key]
        if data.draw(st.booleans()):
            target[place[-1]] = data.draw(JUNK)
        elif isinstance(target, dict):
            del target[place[-1]]
        if not _places(raw):
            break
    path = write(tmp_path, yaml.safe_dump(raw, allow_unicode=True))
    try:
        load_topology(path)
    except UserError as error:
        assert "\n" not in str(error)


def test_the_order_in_the_file_does_not_matter(tmp_path: Path) -> None:
    first = load_topology("a5000x8")
    raw = yaml.safe_load((Path(__file__).parents[2] / "topologies" / "a5000x8.yaml").read_text())
    shuffle = random.Random(7)
    for _ in range(5):
        for key in ("nodes", "links"):
            items = list(raw[key].items()) if isinstance(raw[key], dict) else raw[key]
            shuffle.shuffle(items)
            raw[key] = dict(items) if isinstance(raw[key], dict) else items
        second = load_topology(write(tmp_path, yaml.safe_dump(raw, sort_keys=False)))
        assert second.links == first.links
        assert list(second.nodes) == list(first.nodes)
        assert second.gpus == first.gpus


@pytest.mark.parametrize(
    ("slip", "told"),
    [({"hosts": 10**16}, "hosts"), ({"hosts": 1024, "devices": {"count": 1024, "profile": "t4"}}, "16384")],
)
def test_a_slip_in_a_count_is_told_at_once(tmp_path: Path, slip: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        load_topology(write(tmp_path, yaml.safe_dump({**yaml.safe_load(GOOD), **slip})))
