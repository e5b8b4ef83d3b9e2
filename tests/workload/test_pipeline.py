"""Pipelines: PyTorch's own schedules under fake tensors, against counts, memory and bubbles worked out by hand."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch.distributed.pipelining import schedules

import sim
from sim.cli.options import assignments
from sim.cli.synth import large_enough
from sim.errors import UserError
from sim.graph import OpGraph, Program
from sim.ops import Alloc, Collective, Free, HostCall, Kernel, Op
from sim.place.placement import Placement
from sim.report.summary import Summary
from sim.topology import load_topology
from sim.workload.cards import find_config
from sim.workload.heads import TARGET, head_of
from sim.workload.stages import Stage, even_counts, parts_of
from sim.workload.synth import SynthSpec, synthesize
from sim.workload.tasks import Batch, build_model, task_of
from tests.workload.tiny_models import IMAGES, TINY, model_folder

BATCH, SEQ, HIDDEN = 2, 16, 32
# What one micro-batch sends to the next stage, and gets back from it as a gradient: float32.
PASSED = 4 * BATCH * SEQ * HIDDEN
MS = 1_000_000
FAMILIES = ["bert", "gpt2", "llama", "mistral", "opt", "qwen2", "roberta", "vit"]
TIED = ("gpt2", "opt")  # whose heads are the embeddings
ROTARY = ("llama", "mistral", "qwen2")


def tiny(path: Path, family: str, layers: int) -> str:
    """A folder of a tiny model with so many layers; of families that are not there, a like one's sizes will do."""
    sizes = {"n_layer" if family == "gpt2" else "num_hidden_layers": layers}
    like = family if family in TINY else "bert" if family == "roberta" else "llama"
    return model_folder(path / family, like, model_type=family, **sizes)


def seq_of(family: str) -> int | None:
    return None if family in IMAGES else SEQ


@cache
def pipeline(layers: int, parallel: str, micro_batches: int, **options: Any) -> OpGraph:
    """A tiny model's step, a Llama's unless told; a graph is never changed, so tests share it."""
    family = options.pop("family", "llama")
    given = {"model": tiny(Path(mkdtemp()), family, layers), "batch": BATCH, "seq": seq_of(family), "mode": "train"}
    given |= {"optimizer": "sgd", "parallel": parallel}
    graph = synthesize(SynthSpec(**{**given, "micro_batches": micro_batches, **options}))
    graph.check()
    return graph


def program(graph: OpGraph, rank: int) -> Program:
    return graph.program_of(graph.ranks[rank])


def sent(graph: OpGraph, rank: int) -> Counter[tuple[str, str, int]]:
    """What a rank sends and receives: kind, from where to where, bytes."""
    ops = (op for op in program(graph, rank).ops if isinstance(op, Collective) and op.kind in ("send", "recv"))
    return Counter((op.kind, op.group.removesuffix(" batched"), op.bytes) for op in ops)


# What is sent ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_each_micro_batch_goes_forward_once_and_back_once(schedule: str) -> None:
    graph = pipeline(4, "pp=4", 4, schedule=schedule)
    # Four micro-batches, each one activation to the next stage and one gradient to the one before.
    ends = [("send", "pp 0 to 1"), ("recv", "pp 1 to 0")], [("recv", "pp 2 to 3"), ("send", "pp 3 to 2")]
    between = [("recv", "pp 0 to 1"), ("send", "pp 1 to 2"), ("recv", "pp 2 to 1"), ("send", "pp 1 to 0")]
    for rank, pairs in ((0, ends[0]), (1, between), (3, ends[1])):
        assert sent(graph, rank) == Counter({(kind, pair, PASSED): 4 for kind, pair in pairs})


def test_with_two_stages_a_rank_activations_go_round() -> None:
    graph = pipeline(4, "pp=2", 4, schedule="interleaved")
    # Stages 0 and 2 on rank 0, 1 and 3 on rank 1. Forward: 0 to 1, 1 to 2, 2 to 3; each gradient the other way. From
    # rank 0 to rank 1 go two activations and one gradient (of 1 to 2) a micro-batch, four times; back one and two.
    assert sent(graph, 0) == Counter({("send", "pp 0 to 1", PASSED): 12, ("recv", "pp 1 to 0", PASSED): 12})
    assert sent(graph, 1) == Counter({("recv", "pp 0 to 1", PASSED): 12, ("send", "pp 1 to 0", PASSED): 12})


def test_a_forward_is_filled_and_drained() -> None:
    graph = pipeline(2, "pp=2", 3, mode="forward", optimizer="adamw", dtype="float32")
    assert sent(graph, 0) == Counter({("send", "pp 0 to 1", PASSED): 3})
    assert sent(graph, 1) == Counter({("recv", "pp 0 to 1", PASSED): 3})


def test_ranks_at_one_place_of_the_pipeline_share_a_program() -> None:
    graph = pipeline(2, "pp=2,dp=2", 2)
    assert [r.program for r in graph.ranks] == [0, 0, 1, 1]
    # Data-parallel replicas: rank 0 sends to 2, rank 1 to 3; gradients the other way. The sender is named first.
    assert graph.groups["pp 0 to 1"] == ((0, 2), (1, 3))
    assert graph.groups["pp 1 to 0"] == ((2, 0), (3, 1))
    # Each stage reduces its gradients once, in the last micro-batch's backward, over its own replicas.
    for rank in (0, 2):
        reduced = [op for op in program(graph, rank).ops if isinstance(op, Collective) and op.kind == "all_reduce"]
        assert len(reduced) == 1
        assert reduced[0].group == "dp"
    assert graph.groups["dp"] == ((0, 1), (2, 3))


def test_fsdp_gathers_for_each_forward_and_scatters_once() -> None:
    graph = pipeline(4, "pp=2,fsdp=2", 2)
    kinds = Counter(op.kind for op in program(graph, 0).ops if isinstance(op, Collective))
    # Two blocks: gathered in both forwards, and in the first backward, after which PyTorch's pipeline keeps them
    # (set_reshard_after_backward(False)) until the last. The root's embedding is gathered once. Reduced at the end.
    assert (kinds["all_gather"], kinds["reduce_scatter"]) == (2 * 2 + 2 + 1, 2 + 1)


def test_with_mixed_precision_half_the_bytes_are_sent() -> None:
    graph = pipeline(2, "pp=2,fsdp=2", 2, fsdp_dtype="bfloat16", fsdp_reduce_dtype="float32")
    # Two micro-batches in two bytes an element, and their gradients.
    assert sent(graph, 0) == Counter({("send", "pp 0 to 1", PASSED // 2): 2, ("recv", "pp 1 to 0", PASSED // 2): 2})
    assert sent(graph, 2) == Counter({("recv", "pp 0 to 1", PASSED // 2): 2, ("send", "pp 1 to 0", PASSED // 2): 2})
    assert sim.summarize(sim.replay(sim.place(graph, sim.load_topology("a5000x8")))).step_ms > 0


def test_tensor_parallel_ranks_send_to_their_own_kind() -> None:
    graph = pipeline(2, "pp=2,tp=2", 2)
    assert graph.groups["pp 0 to 1"] == ((0, 2), (1, 3))
    assert sent(graph, 0)["send", "pp 0 to 1", PASSED] == 2  # whole on every rank of tp
    # One layer a stage, two all-reduces forward and two backward, in two micro-batches.
    reduced = [op for op in program(graph, 0).ops if isinstance(op, Collective) and op.group == "tp"]
    assert len(reduced) == 2 * 4


# When what runs ----------------------------------------------------------------------------------------------------


def actions(graph: OpGraph, rank: int) -> list[str]:
    """The forwards and backwards of a rank's stages, as ``3F`` and ``3B``: each layer is a stage here, and its down
    projection tells it; a micro-batch's backward has two products there, of which the first counts."""
    ran = program(graph, rank)
    backward = next(i for i, lane in enumerate(ran.lanes) if lane.name == "autograd")
    found: list[str] = []
    twice: Counter[str] = Counter()
    for op in ran.ops:
        if isinstance(op, Kernel) and is_marker(op) and op.launch is not None:
            layer = op.module.split(".layers.")[1].split(".")[0]
            in_backward = ran.ops[op.launch].lane == backward
            twice[layer] += in_backward
            if not in_backward or twice[layer] % 2:
                found.append(layer + ("B" if in_backward else "F"))
    return found


def is_marker(op: Op) -> bool:
    return isinstance(op, Kernel) and op.name == "aten::mm" and op.module.endswith("mlp.down_proj")


def planned(stages: int, rank: int, schedule: Any) -> list[str]:
    """PyTorch's own plan of a rank, from the schedule as data rather than from the loop that runs it."""
    order = schedule.pipeline_order if schedule.pipeline_order else schedule._get_pipeline_order()
    kinds = {schedules._ComputationType.FORWARD: "F", schedules._ComputationType.FULL_BACKWARD: "B"}
    return [
        f"{action.stage_index}{kinds[action.computation_type]}"
        for action in order[rank]
        if action is not None and action.computation_type in kinds
    ]


class Named:
    """As much of a stage as a schedule looks at to make its plan."""

    def __init__(self, number: int, stages: int, ranks: int) -> None:
        self.stage_index, self.num_stages, self.group_size, self.group_rank = number, stages, ranks, number % ranks
        self.is_first, self.is_last, self.submod = number == 0, number == stages - 1, torch.nn.Identity()


@pytest.mark.parametrize(
    ("name", "ranks", "micro_batches"),
    [("1f1b", 4, 4), ("gpipe", 4, 4), ("1f1b", 3, 5), ("gpipe", 3, 1), ("interleaved", 2, 4), ("interleaved", 2, 3)],
)
def test_the_order_is_that_of_pytorchs_plan(name: str, ranks: int, micro_batches: int) -> None:
    stages = ranks * (2 if name == "interleaved" else 1)
    graph = pipeline(stages, f"pp={ranks}", micro_batches, schedule=name)
    made: dict[str, Callable[[list[Any]], Any]] = {
        "1f1b": lambda own: schedules.Schedule1F1B(own[0], micro_batches),
        "gpipe": lambda own: schedules.ScheduleGPipe(own[0], micro_batches),
        "interleaved": lambda own: schedules.ScheduleInterleaved1F1B(own, micro_batches),
    }
    for rank in range(ranks):
        plan = made[name]([Named(number, stages, ranks) for number in range(rank, stages, ranks)])
        assert actions(graph, rank) == planned(stages, rank, plan)


# How long it takes -------------------------------------------------------------------------------------------------


def timed(graph: OpGraph) -> Summary:
    """The replay where only the layers' down projections take time, one millisecond a product: one forward and two
    backward. Host, launches and links take none."""
    placed = sim.place(graph, sim.load_topology("a5000x8"))
    ranks = []
    for rank in placed.ranks:
        ops = graph.programs[rank.program].ops
        none = (0,) * len(ops)
        costs = replace(
            rank.costs, duration_ns=tuple(MS * is_marker(op) for op in ops), lag_ns=none, gap_ns=none, flows={},
            held={}, workspaces={},
        )  # fmt: skip
        ranks.append(replace(rank, costs=costs))
    return sim.summarize(sim.replay(Placement(graph, placed.machine, tuple(ranks))))


@pytest.mark.parametrize(
    ("schedule", "ranks", "micro_batches"), [("1f1b", 4, 4), ("gpipe", 4, 4), ("1f1b", 3, 5), ("gpipe", 3, 1)]
)
def test_the_bubble_is_that_of_the_textbook(schedule: str, ranks: int, micro_batches: int) -> None:
    summary = timed(pipeline(ranks, f"pp={ranks}", micro_batches, schedule=schedule))
    # A layer a stage, 1 + 2 ms a micro-batch; the pipeline is filled and drained once: (M + S - 1) x 3 ms.
    whole = (micro_batches + ranks - 1) * 3
    assert summary.step_ms == whole
    # Of which each rank computes M x 3 ms: the rest is the bubble, (S - 1) / (M + S - 1) of a step that waits for all.
    assert summary.ranks[0].breakdown_ms.compute == micro_batches * 3
    first = summary.ranks[0]
    assert first.waiting_ms + first.breakdown_ms.idle == pytest.approx(
        (ranks - 1) / (micro_batches + ranks - 1) * whole
    )


def test_interleaving_makes_the_bubble_smaller() -> None:
    plain, interleaved = (timed(pipeline(4, "pp=2", 4, schedule=name)) for name in ("1f1b", "interleaved"))
    # Four layers on two ranks. As two stages: (4 + 1) x 6 ms. As four: 4 x 6 ms of work a rank, and a bubble of one
    # stage's 3 ms (Narayanan et al., arXiv 2104.04473, section 2.2: 1/v of it).
    assert plain.step_ms == 30
    assert interleaved.step_ms == 27


def test_a_slower_link_costs_time_and_never_blocks() -> None:
    graph = pipeline(2, "pp=2", 2, batch=32, seq=64)
    times = []
    for rate in (24.0, 1.0, 0.1):
        machine = sim.load_topology("a5000x2", {"links.pcie.bandwidth_gb_s": rate})
        times.append(sim.summarize(sim.replay(sim.place(graph, machine))).step_ms)
    assert times[0] < times[1] < times[2]


@pytest.mark.parametrize("parallel", ["pp=2,dp=2", "pp=2,tp=2"])
def test_replicas_of_a_stage_are_replayed_once(parallel: str) -> None:
    placed = sim.place(pipeline(2, parallel, 2), sim.load_topology("a5000x8"))
    each, once = (sim.replay(placed, folding=folding) for folding in (False, True))
    assert each.steps == once.steps
    assert each.spans == once.spans


def test_what_one_gpu_would_do_of_it() -> None:
    spec = SynthSpec(model="m", batch=2, parallel="pp=2", micro_batches=4, stage_layers="1,3")
    assert spec.on_one_gpu() == SynthSpec(model="m", batch=8)
    spec = replace(spec, mode="train", schedule="interleaved", stages_per_rank=2)
    assert spec.on_one_gpu() == SynthSpec(model="m", batch=2, micro_batches=4, mode="train")


def test_all_schedules_end_on_a_machine() -> None:
    for layers, parallel, micro_batches, schedule in (
        (4, "pp=4", 4, "1f1b"), (4, "pp=4", 4, "gpipe"), (3, "pp=3", 5, "1f1b"), (3, "pp=3", 1, "gpipe"),
        (4, "pp=2", 4, "interleaved"), (4, "pp=2", 3, "interleaved"),
    ):  # fmt: skip
        graph = pipeline(layers, parallel, micro_batches, schedule=schedule)
        assert sim.summarize(sim.replay(sim.place(graph, sim.load_topology("a5000x8")))).step_ms > 0


# What is held ------------------------------------------------------------------------------------------------------


def allocated(graph: OpGraph, rank: int, category: str) -> int:
    """Bytes of all blocks of a category."""
    return sum(op.bytes for op in program(graph, rank).ops if isinstance(op, Alloc) and op.category == category)


def most_held(graph: OpGraph, rank: int, category: str) -> int:
    """The most bytes of a category that are alive at once, in program order."""
    sizes: dict[int, int] = {}
    now = most = 0
    for op in program(graph, rank).ops:
        if isinstance(op, Alloc) and op.category == category:
            sizes[op.block] = op.bytes
            now += op.bytes
            most = max(most, now)
        elif isinstance(op, Free) and op.block in sizes:
            now -= sizes.pop(op.block)
    return most


def test_1f1b_holds_as_many_micro_batches_as_there_are_stages_to_come() -> None:
    all_of_them = [most_held(pipeline(4, "pp=4", 4, schedule="gpipe"), rank, "activation") for rank in range(3)]
    some = [most_held(pipeline(4, "pp=4", 4, schedule="1f1b"), rank, "activation") for rank in range(3)]
    # GPipe holds all four micro-batches; 1F1B on stage s holds 4 - s.
    assert [part * 4 for part in some] == [whole * (4 - rank) for rank, whole in enumerate(all_of_them)]


def test_buffers_for_all_micro_batches_are_there_from_the_beginning() -> None:
    graph = pipeline(4, "pp=4", 4, schedule="1f1b")
    for rank, directions in ((0, 1), (1, 2), (2, 2), (3, 1)):
        ops = program(graph, rank).ops
        begin = next(i for i, op in enumerate(ops) if type(op).__name__ == "Mark")
        names = Counter(op.name for op in ops[:begin] if isinstance(op, Alloc) and op.category == "communication")
        assert sum(names.values()) == 4 * directions  # activations from before, gradients from behind: one of each
        assert most_held(graph, rank, "communication") == 4 * directions * PASSED


def test_gradients_are_accumulated_and_divided_by_the_micro_batches() -> None:
    graph = pipeline(2, "pp=2", 3)
    buffers = 2 * 4 * 4  # inverse frequencies of the rotary embedding: a parameter's category, no gradient
    assert allocated(graph, 1, "gradient") == allocated(graph, 1, "parameter") - buffers
    divided = [op for op in program(graph, 1).ops if isinstance(op, Kernel) and op.name == "aten::div_"]
    assert len(divided) == 9 + 2  # a Llama layer's weights, the last norm and the head


# How a model is cut ------------------------------------------------------------------------------------------------


def test_layers_left_over_go_to_the_middle() -> None:
    assert even_counts(8, 4) == [2, 2, 2, 2]
    assert even_counts(10, 4) == [2, 3, 3, 2]
    assert even_counts(7, 3) == [2, 3, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_have_the_parameters_of_the_whole_model(family: str) -> None:
    cut = pipeline(3, "pp=2", 2, family=family, stage_layers="1,2")
    whole = pipeline(3, "", 1, family=family)

    extra = allocated(cut, 0, "parameter") + allocated(cut, 1, "parameter") - allocated(whole, 0, "parameter")
    # A tied head is a copy of the embedding's 100 x 32 words; the rotary embeddings' frequencies are on both stages.
    rotary = 2 * 4 * 4 if family in ROTARY else 0
    assert extra == (4 * 100 * HIDDEN if family in TIED else 0) + rotary


@pytest.mark.parametrize(
    ("family", "asked"),
    [*((family, "auto") for family in FAMILIES), *((family, "question-answering") for family in (*TIED, *ROTARY))],
)
def test_real_stages_one_after_the_other_compute_what_the_whole_model_does(
    family: str, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stage, "computing", lambda stage: contextlib.nullcontext())  # a CPU's attention, not a GPU's
    spec = SynthSpec(
        model=tiny(tmp_path, family, 5), batch=BATCH, seq=seq_of(family), mode="train", stage_layers="1,3,1",
        task=asked,  # type: ignore[arg-type]
    )  # fmt: skip
    config = find_config(spec.model)
    task = task_of(spec, config)
    torch.manual_seed(0)
    whole = build_model(spec, config, task)
    batch = drawn(task.batch(spec, config))
    head = head_of(task)
    told = head.with_one_target(batch)
    stream: Any = batch[head.enters]
    for part in parts_of(spec, config, task, 3):
        stage = Stage(spec, config, task, part)
        own = stage.model.state_dict()
        stage.model.load_state_dict({name: whole.state_dict()[name] for name in own})
        stream = stage(stream, **head.beside(told, has_embeddings=True))
    answer = whole(**batch)
    answers = stream if isinstance(stream, tuple) else (stream,)
    for mine, name in zip(answers, head.answers, strict=True):
        assert torch.equal(mine, answer[name])
    assert torch.equal(stage.loss(stream, told[TARGET]), answer.loss)


def drawn(batch: Batch) -> Batch:
    """A batch with something in it: an image, tokens, two segments, some padding, and where the answer is."""
    most = {"input_ids": 100, "start_positions": SEQ, "end_positions": SEQ}
    made = {name: torch.randint(0, most.get(name, 2), tensor.shape) for name, tensor in batch.items()}
    if "pixel_values" in made:
        made["pixel_values"] = torch.rand(made["pixel_values"].shape)
    if "attention_mask" in made:
        made["attention_mask"] = (torch.arange(SEQ) < torch.tensor([[SEQ], [SEQ // 2]])).long()
    if batch.get("labels") is batch.get("input_ids"):
        made["labels"] = made["input_ids"]
    return made


def test_a_tied_head_is_told() -> None:
    assert any("ties its head" in line for line in pipeline(2, "pp=2", 2, family="opt").warnings)
    assert not pipeline(2, "pp=2", 3).warnings


def test_a_head_of_another_task_ties_nothing() -> None:
    cut = pipeline(2, "pp=2", 2, family="gpt2", task="question-answering")
    whole = pipeline(2, "", 1, family="gpt2", task="question-answering")
    assert not cut.warnings
    both = allocated(cut, 0, "parameter") + allocated(cut, 1, "parameter")
    assert both == allocated(whole, 0, "parameter")


def test_layers_keep_the_names_of_the_whole_model() -> None:
    modules = {op.module for op in program(pipeline(4, "pp=4", 4, schedule="1f1b"), 2).ops if isinstance(op, HostCall)}
    assert "LlamaForCausalLM.model.layers.2.mlp.down_proj" in modules
    assert not any(".layers.0" in module for module in modules)


def test_from_the_command_line_to_the_bubble(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    out, told = tmp_path / "p.workload.json.gz", tmp_path / "p.json"
    folder = model_folder(tmp_path / "model", "llama", num_hidden_layers=4)
    options = ("--batch", 1, "--seq", 8, "--mode", "train", "--parallel", "pp=2", "--schedule", "interleaved")
    code, printed, _ = run("synth", folder, *options, "--micro-batches", 2, "--out", out)
    assert code == 0
    assert "2 ranks" in printed
    assert "--topology a5000x8" in printed
    code, printed, _ = run("replay", out, "--topology", "a5000x2", "--json", told)
    assert code == 0
    assert "for a peer" in printed
    ranks = json.loads(told.read_text())["ranks"]
    assert all(0 < rank["waiting_ms"] <= rank["breakdown_ms"]["exposed_communication"] for rank in ranks)


@pytest.mark.parametrize(
    ("ranks", "machine"), [(1, "a5000x1"), (4, "a5000x8"), (16, "a5000x8x2-100g"), (17, "dgx-h100x2-400g")]
)
def test_the_hint_names_a_machine_that_is_large_enough(ranks: int, machine: str) -> None:
    name, *settings = large_enough(ranks).split(" --set ")
    assert name == machine
    assert len(load_topology(name, assignments(settings)).gpus) >= ranks


# What cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parallel": "pp=4", "micro_batches": 2}, r"--micro-batches 2: PyTorch's 1f1b says: .*\(2\) must be .*\(4\)"),
        (
            {"parallel": "pp=2", "micro_batches": 5, "schedule": "interleaved"},
            "PyTorch's interleaved says: .* multiple of the number of rounds",
        ),
        ({"parallel": "pp=8", "micro_batches": 8}, "has 4 layers for 8 stages; 4 at most"),
        ({"parallel": "pp=2", "stage_layers": "1,2"}, "give 2 numbers of at least 1 that add up to 4, as 2,2"),
        ({"parallel": "pp=2", "stage_layers": "a,4"}, "--stage-layers a,4"),
        ({"parallel": "pp=2", "stages_per_rank": 2}, "--stages-per-rank 2: only --schedule interleaved"),
        ({"parallel": "pp=2", "stages_per_rank": 0}, "--stages-per-rank 0: must be at least 1"),
        ({"parallel": "pp=1"}, "--parallel pp=1: a pipeline has at least two stages"),
        ({"parallel": "dp=2", "schedule": "gpipe"}, "--schedule: needs a pp axis"),
        ({"parallel": "dp=2,pp=2"}, "write pp=2,dp=2"),
        ({"parallel": "pp=2", "loss_scaling": True}, "--loss-scaling: leave it out"),
        ({"parallel": "pp=2", "mode": "forward", "schedule": "gpipe"}, "--schedule: is an option of --mode train"),
        ({"parallel": "pp=2", "task": "seq2seq-lm"}, "are cut .* for causal-lm and question-answering alone"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", "llama", num_hidden_layers=4)
    with pytest.raises(UserError, match=message) as error:
        synthesize(SynthSpec(**{"model": folder, "batch": 1, "seq": 4, "mode": "train", **options}))
    assert "\n" not in str(error.value)


def test_families_that_are_not_cut_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'t5' are not cut into pipeline stages yet; those of bert, gpt2, llama"):
        synthesize(
            SynthSpec(model=model_folder(tmp_path / "model", "t5"), batch=1, seq=4, mode="train", parallel="pp=2")
        )
