"""Pipelines of BERT and ViT: what passes between stages to the byte, and the whole model's kernels in its order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

import sim
from sim.graph import OpGraph
from sim.ops import Collective, Copy, Kernel
from sim.workload.cards import find_config
from sim.workload.heads import head_of
from sim.workload.stages import Stage, parts_of, passed_dtype, passed_shape
from sim.workload.synth import SynthSpec, synthesize
from sim.workload.tasks import task_of
from tests.workload.test_pipeline import BATCH, FAMILIES, HIDDEN, SEQ, pipeline, program, sent, seq_of, tiny
from tests.workload.tiny_models import model_folder

# What one micro-batch sends, in float32: a BERT's hidden states of 16 tokens; a ViT's of an image of 32 x 32 in patches
# of 8 x 8, which are 16, and of the class token.
PASSED = {"bert": 4 * BATCH * SEQ * HIDDEN, "vit": 4 * BATCH * (4 * 4 + 1) * HIDDEN}
ENCODERS = list(PASSED)


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_each_micro_batch_goes_forward_once_and_back_once(family: str, schedule: str) -> None:
    graph = pipeline(3, "pp=3", 4, family=family, schedule=schedule)
    size = PASSED[family]
    between = [("recv", "pp 0 to 1"), ("send", "pp 1 to 2"), ("recv", "pp 2 to 1"), ("send", "pp 1 to 0")]
    assert sent(graph, 1) == Counter({(kind, pair, size): 4 for kind, pair in between})
    # Masks, segments and targets are there on the ranks that read them: nothing else is sent.
    assert sent(graph, 0) == Counter({("send", "pp 0 to 1", size): 4, ("recv", "pp 1 to 0", size): 4})
    assert sent(graph, 2) == Counter({("recv", "pp 1 to 2", size): 4, ("send", "pp 2 to 1", size): 4})


@pytest.mark.parametrize("family", ENCODERS)
def test_with_two_stages_a_rank_activations_go_round(family: str) -> None:
    graph = pipeline(4, "pp=2", 4, family=family, schedule="interleaved")
    # Three boundaries: from rank 0 to rank 1 two activations and one gradient a micro-batch, back one and two.
    size = PASSED[family]
    assert sent(graph, 0) == Counter({("send", "pp 0 to 1", size): 12, ("recv", "pp 1 to 0", size): 12})


@pytest.mark.parametrize("family", ENCODERS)
def test_a_forward_is_filled_and_drained(family: str) -> None:
    graph = pipeline(2, "pp=2", 3, family=family, mode="forward", optimizer="adamw", dtype="float16")
    assert sent(graph, 0) == Counter({("send", "pp 0 to 1", PASSED[family] // 2): 3})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("autocast", [None, "float16"])
def test_what_passes_is_what_was_told(family: str, autocast: str | None, tmp_path: Path) -> None:
    spec = SynthSpec(
        model=tiny(tmp_path, family, 2), batch=BATCH, seq=seq_of(family), mode="train", autocast=autocast,  # type: ignore[arg-type]
    )  # fmt: skip
    config = find_config(spec.model)
    task = task_of(spec, config)
    head = head_of(task)
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch = head.with_one_target(task.batch(spec, config))
        first, last = (Stage(spec, config, task, part) for part in parts_of(spec, config, task, 2))
        hidden = first(batch[head.enters], **head.beside(batch, has_embeddings=True))
        answers = last(hidden, **head.beside(batch, has_embeddings=False))
    assert (hidden.shape, hidden.dtype) == (passed_shape(spec, config), passed_dtype(spec))
    shapes = [answer.shape for answer in (answers if isinstance(answers, tuple) else (answers,))]
    assert shapes == [head.shape(spec, config)] * len(head.answers)


# The kernels of the whole model ------------------------------------------------------------------------------------

Ran = tuple[str, str, tuple[object, ...]]


def kernels(graph: OpGraph, rank: int, *, backward: bool) -> list[Ran]:
    """The kernels of forward or backward: op, module and what it reads and writes, as shapes; where the model's own
    code is outside its modules, as a loss may be, no module.  The loss's own gradient, which is filled on either
    thread, is left out."""
    ran = program(graph, rank)
    autograd = next(i for i, lane in enumerate(ran.lanes) if lane.name == "autograd")
    found = []
    for op in ran.ops:
        if not isinstance(op, Kernel) or op.launch is None or (ran.ops[op.launch].lane == autograd) != backward:
            continue
        work = graph.works[op.work or 0]
        sizes = tuple((meta.dtype, meta.shape) for meta in (*work.inputs, *work.outputs))
        if (op.name, sizes) != ("aten::fill_", (("float32", ()),)):
            found.append((op.name, op.module if "." in op.module else "", sizes))
    return found


@pytest.mark.parametrize(
    ("family", "own_mask", "added"),
    [
        # Each of BERT's stages looks whether its padding mask masks anything.
        ("bert", ["aten::_to_copy", "aten::all"], ""),
        # A gradient that was received stays in its buffer: the first that meets it is not added in place.
        ("vit", [], "ViTForImageClassification.vit.layers.1.layernorm_after"),
    ],
)
def test_stages_together_run_the_kernels_of_the_whole_model(family: str, own_mask: list[str], added: str) -> None:
    whole = pipeline(4, "", 1, family=family, optimizer="none")
    cut = pipeline(4, "pp=2", 1, family=family, optimizer="none", schedule="gpipe")

    before, behind = (kernels(cut, rank, backward=False) for rank in (0, 1))
    masked = [(name, module) for name, module, _ in behind[: len(own_mask)]]
    assert masked == [(name, "BertForQuestionAnswering.bert") for name in own_mask]
    assert len(before) > 20
    assert before + behind[len(own_mask) :] == kernels(whole, 0, backward=False)

    behind, before = (kernels(cut, rank, backward=True) for rank in (1, 0))
    if added:
        first = next(i for i, (name, module, _) in enumerate(before) if (name, module) == ("aten::add", added))
        before[first] = ("aten::add_", added, before[first][2])
    assert behind + before == kernels(whole, 0, backward=True)


def test_each_stage_of_bert_waits_for_its_mask() -> None:
    graph = pipeline(3, "pp=3", 4, family="bert", schedule="1f1b")
    # One number a micro-batch comes to the host, on every rank.
    for rank in range(3):
        assert sum(isinstance(op, Copy) and op.kind == "d2h" for op in program(graph, rank).ops) == 4


# With other axes, and from the command line's names ----------------------------------------------------------------


@pytest.mark.parametrize("family", ENCODERS)
def test_replicas_reduce_each_stage_in_the_last_micro_batch(family: str) -> None:
    graph = pipeline(2, "pp=2,dp=2", 2, family=family)
    assert graph.groups["pp 0 to 1"] == ((0, 2), (1, 3))
    for rank in (0, 2):
        reduced = [op for op in program(graph, rank).ops if isinstance(op, Collective) and op.kind == "all_reduce"]
        assert [op.group for op in reduced] == ["dp"]
    assert sim.summarize(sim.replay(sim.place(graph, sim.load_topology("a5000x8")))).step_ms > 0


@pytest.mark.parametrize("family", ENCODERS)
def test_tensor_parallel_ranks_send_to_their_own_kind(family: str) -> None:
    graph = pipeline(2, "pp=2,tp=2", 2, family=family)
    assert sent(graph, 0)["send", "pp 0 to 1", PASSED[family]] == 2  # whole on every rank of tp
    # One layer a stage, two all-reduces forward and two backward, in two micro-batches.
    for rank in (0, 2):
        reduced = [op for op in program(graph, rank).ops if isinstance(op, Collective) and op.group == "tp"]
        assert len(reduced) == 2 * 4
    assert sim.summarize(sim.replay(sim.place(graph, sim.load_topology("a5000x8")))).step_ms > 0


@pytest.mark.parametrize("family", ENCODERS)
def test_fsdp_gathers_for_each_forward_and_scatters_once(family: str) -> None:
    graph = pipeline(4, "pp=2,fsdp=2", 2, family=family, fsdp_dtype="bfloat16")
    kinds = Counter(op.kind for op in program(graph, 0).ops if isinstance(op, Collective))
    # As a Llama's: two blocks and the root, see test_pipeline.
    assert (kinds["all_gather"], kinds["reduce_scatter"]) == (2 * 2 + 2 + 1, 2 + 1)
    assert sent(graph, 0)["send", "pp 0 to 1", PASSED[family] // 2] == 2


def test_bert_base_in_four_stages_has_its_parameters() -> None:
    graph = synthesize(
        SynthSpec(
            model="bert-base", batch=1, seq=64, mode="train", optimizer="none", parallel="pp=4", micro_batches=4,
        )
    )  # fmt: skip
    held = [
        sum(op.bytes for op in program(graph, rank).ops if type(op).__name__ == "Alloc" and op.category == "parameter")
        for rank in range(4)
    ]
    # Three layers a stage: 4 x (768 x 768 + 768) + 2 x 768 x 3072 + 3072 + 768 + 2 x 2 x 768 = 7 087 872 each. Before
    # them (30 522 + 512 + 2) x 768 embeddings, a norm of 2 x 768, and two buffers of 512 int64; behind a head of 2.
    layers = 3 * 7_087_872 * 4
    embeddings = ((30_522 + 512 + 2) * 768 + 2 * 768) * 4 + 2 * 512 * 8
    assert held == [embeddings + layers, layers, layers, layers + (2 * 768 + 2) * 4]


def test_a_task_that_a_type_is_not_cut_for_is_told(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", "bert")
    with pytest.raises(sim.UserError, match=r"^--task causal-lm: .*'bert' are cut .* for question-answering alone$"):
        synthesize(SynthSpec(model=folder, batch=1, seq=4, parallel="pp=2", task="causal-lm", micro_batches=2))
