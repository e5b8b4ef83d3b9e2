"""traces/seed: the published table's workloads hold what was run, worked out from the models' sizes."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from sim.graph import OpGraph, read
from sim.ops import Alloc, Collective, Free, Kernel, Work

BATCH, SEQ = 16, 1024
N = BATCH * SEQ
SHIFTED = BATCH * (SEQ - 1)
INPUTS = 2 * N * 8  # token ids and attention mask, int64
MIB = 1 << 20


class Model(NamedTuple):
    layers: int
    hidden: int
    ffn: int
    vocabulary: int
    kv_share: int = 1  # query heads for each key and value head


MODELS = {
    "opt-1.3b": Model(24, 2048, 8192, 50272),
    "opt-6.7b": Model(32, 4096, 16384, 50272),
    "clm-60m": Model(22, 384, 1408, 49152, 3),
    "clm-200m": Model(24, 768, 2688, 49152, 3),
    "clm-400m": Model(30, 960, 3328, 49152, 3),
    "clm-1.1b": Model(32, 1536, 5376, 49152, 3),
}
OPT = [name for name in MODELS if name.startswith("opt")]
CLM = [name for name in MODELS if name.startswith("clm")]


def load(root: Path, name: str) -> OpGraph:
    return read(root / "traces" / "seed" / f"{name}.workload.json.gz")


def peak_of_tensors(graph: OpGraph) -> int:
    """The most that tensors hold at once, as they were asked for: no rounding, no unsplit blocks, no workspace."""
    live: dict[int, int] = {}
    held = most = 0
    for op in graph.programs[0].ops:
        if isinstance(op, Alloc):
            live[op.block] = op.bytes
            held += op.bytes
            most = max(most, held)
        elif isinstance(op, Free):
            held -= live.pop(op.block)
    return most


def works(graph: OpGraph, op: str) -> list[Work]:
    """The works of every kernel of that name, in order."""
    named = (o for o in graph.programs[0].ops if isinstance(o, Kernel) and o.name == op and o.work is not None)
    return [graph.works[o.work] for o in named if o.work is not None]


def all_reduces(graph: OpGraph) -> dict[int, int]:
    """How many of how many MiB."""
    counts: dict[int, int] = {}
    for op in graph.programs[0].ops:
        if isinstance(op, Collective):
            assert op.kind == "all_reduce"
            counts[op.bytes // MIB] = counts.get(op.bytes // MIB, 0) + 1
    return counts


def opt_weights(m: Model, split: int) -> int:
    """Two bytes a parameter.  Positions: 2048 and OPT's offset of 2; every linear layer and norm has a bias; q, k, v,
    fc1 and fc2 hold 1/split of their inputs' columns and whole biases; the head shares the embedding."""
    h, f = m.hidden, m.ffn
    projections = 3 * (h * h // split + h) + (h * h + h)
    layer = projections + (f * h // split + f) + (h * f // split + h) + 2 * 2 * h
    return 2 * (m.vocabulary * h + 2050 * h + m.layers * layer + 2 * h)


def clm_weights(m: Model, split: int) -> int:
    """Two bytes a parameter, embedding and head apart, no biases; and 32 float32 frequencies of rotary positions."""
    h, f = m.hidden, m.ffn
    layer = 2 * h * h + 2 * h * h // m.kv_share + 3 * h * f // split + 2 * h
    return 2 * (2 * m.vocabulary * h + m.layers * layer + h) + 32 * 4


@pytest.mark.parametrize(("name", "gib"), [("opt-1.3b", 5.518), ("opt-6.7b", 15.469)])
def test_peak_of_opt_on_one_gpu(root: Path, name: str, gib: float) -> None:
    # Weights; float16 logits; and, while the loss copies them, their shifted copy of 16 x 1023 positions.
    m = MODELS[name]
    expected = opt_weights(m, 1) + INPUTS + 2 * m.vocabulary * (N + SHIFTED)
    peak = peak_of_tensors(load(root, f"{name}-x1"))
    assert peak == expected
    assert peak / 2**30 == pytest.approx(gib, abs=0.001)


@pytest.mark.parametrize(
    ("name", "gib"), [("clm-60m", 6.150), ("clm-200m", 6.485), ("clm-400m", 6.846), ("clm-1.1b", 8.130)]
)
def test_peak_of_clm_on_one_gpu(root: Path, name: str, gib: float) -> None:
    # Weights; the logits in float32; and their shifted copy.
    m = MODELS[name]
    expected = clm_weights(m, 1) + INPUTS + 4 * m.vocabulary * (N + SHIFTED)
    peak = peak_of_tensors(load(root, f"{name}-x1"))
    assert 0 <= peak - expected < MIB  # what is left of the rotary tables and positions
    assert peak / 2**30 == pytest.approx(gib, abs=0.001)


@pytest.mark.parametrize(("name", "gib"), [("opt-1.3b", 4.982), ("opt-6.7b", 16.027)])
def test_peak_of_opt_on_two(root: Path, name: str, gib: float) -> None:
    # In the last layer, at fc1's all-reduce: half of the split weights; k and v of all layers; fc1's partial sum and
    # the clone that is reduced, 4h wide; the residual.
    m = MODELS[name]
    alive = 2 * m.layers * N * m.hidden * 2 + 2 * N * m.ffn * 2 + N * m.hidden * 2
    peak = peak_of_tensors(load(root, f"{name}-x8"))
    assert peak == opt_weights(m, 2) + INPUTS + alive
    assert peak / 2**30 == pytest.approx(gib, abs=0.001)


@pytest.mark.parametrize(
    ("name", "gib"), [("clm-60m", 7.617), ("clm-200m", 7.847), ("clm-400m", 8.078), ("clm-1.1b", 8.892)]
)
def test_peak_of_clm_on_two(root: Path, name: str, gib: float) -> None:
    # As on one GPU, with half of the MLP and the float16 logits, which are returned.
    m = MODELS[name]
    expected = clm_weights(m, 2) + INPUTS + m.vocabulary * (2 * N + 4 * (N + SHIFTED))
    peak = peak_of_tensors(load(root, f"{name}-x8"))
    assert 0 <= peak - expected < MIB
    assert peak / 2**30 == pytest.approx(gib, abs=0.001)


@pytest.mark.parametrize(("name", "counts"), [("opt-1.3b", {64: 144, 256: 24}), ("opt-6.7b", {128: 192, 512: 32})])
def test_all_reduces_of_opt(root: Path, name: str, counts: dict[int, int]) -> None:
    # A layer: q, k, v, fc2 of N x h x 2 bytes, fc1 of four times that; k and v once more at the end.
    graph = load(root, f"{name}-x8")
    assert all_reduces(graph) == counts
    m = MODELS[name]
    assert counts[N * m.hidden * 2 // MIB] == 6 * m.layers
    # The last 2 L of them, of the cached k and v, come after all else.
    compute = [i for i, op in enumerate(graph.programs[0].ops) if isinstance(op, Kernel) and op.name != "aten::clone"]
    late = [op for op in graph.programs[0].ops[compute[-1] :] if isinstance(op, Collective)]
    assert len(late) == 2 * m.layers


@pytest.mark.parametrize("name", CLM)
def test_all_reduces_of_clm(root: Path, name: str) -> None:
    m = MODELS[name]
    assert all_reduces(load(root, f"{name}-x8")) == {N * m.hidden * 2 // MIB: m.layers}


@pytest.mark.parametrize("name", MODELS)
def test_who_runs_where(root: Path, name: str) -> None:
    one, two = load(root, f"{name}-x1"), load(root, f"{name}-x8")
    assert (len(one.ranks), one.gpus, one.groups) == (1, (), {})
    assert (len(two.ranks), two.gpus, two.groups) == (2, (1, 2), {"tp": ((0, 1),)})
    for graph in (one, two):
        assert graph.provenance["transformers"] == "4.48.2"
        assert graph.provenance["liveness"] == "export"


@pytest.mark.parametrize("rows", ["x1", "x8"])
@pytest.mark.parametrize("name", MODELS)
def test_attention_has_a_mask_and_is_not_causal(root: Path, name: str, rows: str) -> None:
    found = works(load(root, f"{name}-{rows}"), "aten::_scaled_dot_product_efficient_attention")
    assert len(found) == MODELS[name].layers
    for work in found:
        heads = MODELS[name].hidden // 64 if name != "opt-6.7b" else 32
        mask = work.inputs[3]
        assert (mask.dtype, mask.shape) == ("float16", (BATCH, heads, SEQ, SEQ))
        assert mask.nbytes == BATCH * SEQ * SEQ * 2  # one mask for all heads
        assert not work.scalar("is_causal")


@pytest.mark.parametrize("name", OPT)
def test_opt_projections_on_two(root: Path, name: str) -> None:
    # Each rank multiplies half of the columns of its input: q, k, v, fc1 [N, h/2], fc2 [N, 2h]; out_proj whole.
    m = MODELS[name]
    h, f, layers = m.hidden, m.ffn, m.layers
    shapes = [(work.inputs[1].shape, work.outputs[0].shape) for work in works(load(root, f"{name}-x8"), "aten::addmm")]
    layer = [*[((N, h // 2), (N, h))] * 3, ((N, h), (N, h)), ((N, h // 2), (N, f)), ((N, f // 2), (N, h))]
    assert shapes == layer * layers


@pytest.mark.parametrize("name", [f"{model}-{rows}" for model in MODELS for rows in ("x1", "x8")])
def test_files_are_what_writing_them_gives(root: Path, name: str) -> None:
    raw = (root / "traces" / "seed" / f"{name}.workload.json.gz").read_bytes()
    assert gzip.decompress(raw) == msgspec.json.encode(load(root, name))
    assert raw[4:8] == b"\0\0\0\0"  # no time of day in the file
