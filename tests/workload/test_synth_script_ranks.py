"""synth --ranks N -- SCRIPT.py: a script that makes its job itself, against the same job of the model by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import sim
from sim.cli.entry import main
from sim.errors import UserError
from sim.graph import OpGraph, write
from sim.ops import Alloc, Collective, Copy, HostCall, Kernel, Mark
from sim.workload.replicas import one_gpu
from sim.workload.script.run import synthesize_script
from sim.workload.script.spec import ScriptSpec
from sim.workload.synth import SynthSpec, synthesize
from tests.workload.real_sharded_script import HOSTS, RANKS, clipping
from tests.workload.tiny_models import model_folder

SHARDED = Path(__file__).parent / "sharded_script.py"
MIXED = {"fsdp_dtype": "bfloat16", "fsdp_reduce_dtype": "float32"}


def of_script(path: Path, *args: str, ranks: int = 8, **options: Any) -> OpGraph:
    return synthesize_script(ScriptSpec(path, args, ranks=ranks, **options))


def collectives(graph: OpGraph) -> list[Collective]:
    return [op for op in graph.programs[0].ops if isinstance(op, Collective)]


# The same as by name -------------------------------------------------------------------------------------------------


def step_of(graph: OpGraph, world: str = "") -> list[tuple[Any, ...]]:
    """The step's operations in order, each with its lane and those it waits for, as places among the step's own; the
    group of all ranks as ``world``, and without what only a loop of the user's own has: the batch that is copied."""
    program = graph.programs[0]
    lanes = [lane.name.replace(f":{world}", ":world") if world else lane.name for lane in program.lanes]
    begin = next(i for i, op in enumerate(program.ops) if isinstance(op, Mark))
    place: dict[int, int] = {}
    told: list[tuple[Any, ...]] = []
    for i, op in enumerate(program.ops[begin:], begin):
        if not isinstance(op, Kernel | Collective):
            continue
        after = tuple(sorted(place[j] for j in op.after if j in place))
        place[i] = len(told)
        if isinstance(op, Kernel):
            work = graph.works[op.work or 0]
            told.append((op.name, lanes[op.lane], work.inputs, work.outputs, after))
        else:
            group = "world" if op.group == world else op.group
            told.append((op.kind, lanes[op.lane], op.bytes, op.dtype, group, op.seq, after))
    return told


def resident(graph: OpGraph) -> Counter[str]:
    """Bytes by category that are there when the step begins, but for those that a steady loop has from its last: its
    gradients, its batch and its loss."""
    begin = next(i for i, op in enumerate(graph.programs[0].ops) if isinstance(op, Mark))
    total: Counter[str] = Counter()
    for op in graph.programs[0].ops[:begin]:
        if isinstance(op, Alloc) and op.category in ("parameter", "optimizer", "communication"):
            total[op.category] += op.bytes
    return total


@pytest.mark.parametrize(
    ("words", "hosts", "options"),
    [
        (("--mode", "ddp"), 1, {"parallel": "dp=8"}),
        (("--mode", "fsdp"), 1, {"parallel": "fsdp=8", **MIXED}),
        (("--mode", "fsdp", "--clip", "1.0"), 1, {"parallel": "fsdp=8", "max_grad_norm": 1.0, **MIXED}),
        (("--mode", "fsdp", "--keep"), 1, {"parallel": "fsdp=8", "reshard_after_forward": False, **MIXED}),
        (("--mode", "hsdp", "--clip", "1.0"), 2, {"parallel": "dp=2,fsdp=4", "max_grad_norm": 1.0, **MIXED}),
        (("--mode", "fsdp-tp"), 1, {"parallel": "fsdp=4,tp=2", **MIXED}),
    ],
    ids=str,
)
def test_a_script_that_parallelizes_itself_is_the_model_by_name(
    tmp_path: Path, words: tuple[str, ...], hosts: int, options: dict[str, Any]
) -> None:
    folder = model_folder(tmp_path / "model", "llama")
    script = of_script(SHARDED, folder, *words, hosts=hosts)
    model = synthesize(SynthSpec(model=folder, batch=2, seq=16, mode="train", **options))
    axes = [axis.partition("=")[0] for axis in options["parallel"].split(",")]
    whole = axes[0] if len(axes) == 1 else ""  # the axis that is the group of all ranks
    ran, named = step_of(script), step_of(model, whole)
    assert [told[:-1] for told in ran] == [told[:-1] for told in named]
    assert ran == named  # and each waits for the same
    assert resident(script) == resident(model) and script.warnings == ()
    groups = {"world" if name == whole else name: ranks for name, ranks in model.groups.items()}
    assert script.groups == {"world": (tuple(range(8)),), **groups} and len(script.ranks) == 8


def test_the_streams_of_fsdp_are_a_scripts_too(tmp_path: Path) -> None:
    graph = of_script(SHARDED, model_folder(tmp_path / "model", "llama"))
    lanes = graph.programs[0].lanes
    on = Counter((op.kind, lanes[op.lane].name) for op in collectives(graph))
    # Two blocks, gathered in forward and backward, and the root's own, which stays; each reduced once.
    assert on == {("all_gather", "fsdp:all-gather"): 5, ("reduce_scatter", "fsdp:reduce-scatter"): 3}


# The same as a real run ----------------------------------------------------------------------------------------------

MODES = ("ddp", "fsdp", "hsdp", "fsdp-tp")


@pytest.fixture(scope="module")
def real_runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The collectives of the script's third step in four gloo processes, with numbers in them, by mode."""
    folder = tmp_path_factory.mktemp("real")
    model = model_folder(folder / "model", "llama")
    command = [sys.executable, "-m", "tests.workload.real_sharded_script"]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder), model, *MODES], stdout=subprocess.PIPE)
        for rank in range(RANKS)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * RANKS
    return model, json.loads(outputs[0])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_scripts_collectives_are_those_of_the_real_run(real_runs: Any, mode: str) -> None:
    model, real = real_runs
    graph = of_script(SHARDED, model, "--mode", mode, *clipping(mode), ranks=RANKS, hosts=HOSTS)
    assert [[op.kind, op.bytes, op.dtype] for op in collectives(graph)] == real[mode]


# What a script of several ranks does ---------------------------------------------------------------------------------

TORCHRUN = """
import os, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
dist.init_process_group("nccl")
rank = int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(rank)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)).to(rank)
{before}
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(3):
    optimizer.zero_grad()
    x = torch.ones(4, 8, device="cuda")
    loss = model(x).sum()
    loss.backward()
    {body}
    optimizer.step()
dist.destroy_process_group()
"""
BEFORE_LINE, BODY_LINE = 11, 18


def script(tmp_path: Path, before: str = "model = DDP(model, device_ids=[rank])", body: str = "pass") -> Path:
    path = tmp_path / "train.py"
    path.write_text(TORCHRUN.format(before=before, body=body))
    return path


def test_gradients_are_reduced_once_for_all_backwards_of_a_step(tmp_path: Path) -> None:
    body = "dist.all_reduce(loss)"
    path = script(tmp_path, body=body)
    path.write_text(
        path.read_text().replace(
            "    loss = model(x).sum()",
            "    with model.no_sync(): model(x).sum().backward()\n    loss = model(x).sum()",
        )
    )
    # One bucket of two layers of 8 x 8 weights and 8 biases, then the loss.
    assert [(op.kind, op.bytes) for op in collectives(of_script(path, ranks=4))] == [
        ("all_reduce", 2 * (64 + 8) * 4),
        ("all_reduce", 4),
    ]
    assert of_script(path, ranks=4).groups == {"world": ((0, 1, 2, 3),)}
    # Under dp=4 a script that makes its process group itself is not wrapped once more.
    assert synthesize_script(ScriptSpec(path, parallel="dp=4")).groups == {"dp": ((0, 1, 2, 3),)}


def test_a_collective_runs_where_torch_issues_it(tmp_path: Path) -> None:
    body = "work = dist.all_reduce(loss, async_op=True); y = x * 2; work.wait(); z = x * 3; dist.all_reduce(loss)"
    graph = of_script(script(tmp_path, before="pass", body=body))
    ops, lanes = graph.programs[0].ops, graph.programs[0].lanes
    first, second = collectives(graph)
    assert (lanes[first.lane].name, lanes[second.lane].name) == ("nccl:world", "compute")
    products = [op for op in ops if isinstance(op, Kernel) and op.name == "aten::mul"]
    assert not products[0].after and products[1].after == (ops.index(first),)  # what comes behind the wait waits


def test_every_kind_of_collective_has_its_bytes(tmp_path: Path) -> None:
    body = """
    whole, part = torch.empty(64, device="cuda"), torch.empty(8, device="cuda")
    dist.all_gather_into_tensor(whole, part)
    dist.reduce_scatter_tensor(part, whole)
    dist.all_to_all_single(torch.empty_like(whole), whole)
    dist.broadcast(part, src=0)
    dist.reduce(part, dst=0)
    dist.barrier()
"""
    told = [(op.kind, op.bytes) for op in collectives(of_script(script(tmp_path, before="pass", body=body)))]
    assert told == [
        ("all_gather", 256),
        ("reduce_scatter", 256),
        ("all_to_all", 256),
        ("broadcast", 32),
        ("reduce", 32),
    ]


def test_groups_of_the_scripts_own_are_those_of_all_ranks(tmp_path: Path) -> None:
    before = """
mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("outer", "inner"))
assert mesh.device_type == "cuda" and mesh["inner"].size() == 4 and mesh.get_local_rank("outer") == 0
groups = [dist.new_group(list(range(first, first + 2))) for first in range(0, 8, 2)]
model = DDP(model, device_ids=[rank], process_group=mesh.get_group("outer"))
assert dist.get_world_size(groups[0]) == 2 and dist.get_backend() == "nccl"
"""
    graph = of_script(script(tmp_path, before, "dist.all_reduce(loss, group=groups[0])"))
    assert [op.group for op in collectives(graph)] == ["outer", "group"]
    assert graph.groups["outer"] == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert graph.groups["group"] == ((0, 1), (2, 3), (4, 5), (6, 7))


def test_a_group_that_others_have_no_like_of_can_be_made_and_not_used(tmp_path: Path) -> None:
    path = script(tmp_path, "groups = [dist.new_group([0, 1]), dist.new_group([2, 3, 4, 5, 6, 7])]; model = DDP(model)")
    assert [op.group for op in collectives(of_script(path))] == ["world"]
    path.write_text(path.read_text().replace("    pass", "    dist.all_reduce(loss, group=groups[0])"))
    with pytest.raises(UserError, match=r"communicates in a group that not every rank has one like"):
        of_script(path)


def test_a_model_made_without_memory_is_sharded_and_given_memory(tmp_path: Path) -> None:
    before = """
with torch.device("meta"):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
fully_shard(model[0]); fully_shard(model)
model.to_empty(device="cuda")
for p in model.parameters(): torch.nn.init.trunc_normal_(p) if p.dim() > 1 else torch.nn.init.zeros_(p)
assert all(p.device.type == "cuda" for p in model.parameters())
model.set_requires_gradient_sync(True)
"""
    graph = of_script(script(tmp_path, before))
    assert [(op.kind, op.bytes) for op in collectives(graph)] == [
        *[("all_gather", (64 + 8) * 4)] * 3,
        *[("reduce_scatter", (64 + 8) * 4)] * 2,
    ]
    assert resident(graph)["parameter"] == 2 * (64 + 8) * 4 // 8


def test_parameters_on_the_host_come_to_the_gpu_for_a_block_and_go_back(tmp_path: Path) -> None:
    before = """
from torch.distributed.fsdp import CPUOffloadPolicy
for layer in model: fully_shard(layer, offload_policy=CPUOffloadPolicy())
fully_shard(model, offload_policy=CPUOffloadPolicy())
"""
    graph = of_script(script(tmp_path, before))
    copies = Counter(op.kind for op in graph.programs[0].ops if isinstance(op, Copy))
    # Weight and bias of each layer: in for forward and backward, their gradients out.
    assert copies == {"h2d": 8, "d2h": 4} and resident(graph)["parameter"] == 0


def test_buffers_are_broadcast_unless_the_wrapper_is_told_not_to(tmp_path: Path) -> None:
    before = "model = DDP(model.append(torch.nn.BatchNorm1d(8).to(rank)), broadcast_buffers={})"
    kinds = [[op.kind for op in collectives(of_script(script(tmp_path, before.format(on))))] for on in (True, False)]
    # The norm's running mean and variance are of one type, its count of another.
    assert kinds == [["broadcast", "broadcast", "all_reduce"], ["all_reduce"]]


def test_a_mesh_makes_the_job_where_the_script_does_not(tmp_path: Path) -> None:
    path = script(tmp_path, "fully_shard(model, mesh=init_device_mesh('cuda', (8,)))")
    path.write_text(path.read_text().replace('dist.init_process_group("nccl")', ""))
    assert [op.kind for op in collectives(of_script(path))] == ["all_gather", "reduce_scatter"]


def test_ranks_that_would_train_apart_are_told(tmp_path: Path) -> None:
    path = script(tmp_path, "pass")
    assert of_script(path).warnings == ("the step has no collective: each rank trains alone",)
    path.write_text(path.read_text().replace('dist.init_process_group("nccl")', ""))
    with pytest.raises(
        UserError, match=r"makes no process group, so each rank would train alone; give --parallel dp=8"
    ):
        of_script(path)


def test_a_job_knows_its_hosts(tmp_path: Path) -> None:
    before = (
        "assert os.environ['LOCAL_WORLD_SIZE'] == '4' and torch.cuda.device_count() == 4 and dist.get_world_size() == 8"
    )
    assert len(of_script(script(tmp_path, before), hosts=2).ranks) == 8


@pytest.mark.parametrize(
    ("before", "told"),
    [
        ("model = DDP(model); model.register_comm_hook(None, print)", "communication hooks are not synthesized"),
        ("dist.all_gather_object([None] * 8, 1)", "torch.distributed.all_gather_object: is not synthesized; there are"),
        ("dist.send(torch.zeros(1), 1)", "torch.distributed.send: all ranks of a script run one program"),
        ("dist.P2POp(dist.isend, torch.zeros(1), 1)", "`synth MODEL --parallel pp=4` makes a pipeline"),
        ("dist.broadcast_object_list([1], src=3)", "the script runs as rank 0"),
        (
            "dist.all_reduce(torch.zeros(1, device='cuda'), group=dist.new_group([0, 1]))",
            "let every rank make the groups",
        ),
        ("model = DDP(model, mixed_precision=1)", "DistributedDataParallel's mixed_precision is not synthesized"),
        ("torch.nn.SyncBatchNorm(8).to(rank)(torch.ones(4, 8, device=rank))", "leave convert_sync_batchnorm out"),
        ("init_device_mesh('cuda', (3, 3))", "Mesh should not be bigger than default world size 8"),
        ("torch.distributed.fsdp.FullyShardedDataParallel(model)", "fully_shard (FSDP2)"),
    ],
)
def test_what_cannot_run_is_told_with_its_line_and_the_cure(tmp_path: Path, before: str, told: str) -> None:
    path = script(tmp_path, before)
    if "group=" in before:  # communication in the step, for what is before it is not recorded
        path = script(tmp_path, "group = dist.new_group([0, 1])", "dist.all_reduce(loss, group=group)")
    with pytest.raises(UserError) as caught:
        of_script(path)
    line = BODY_LINE if "group=" in before else BEFORE_LINE
    assert str(caught.value).startswith(f"{path}, line {line}: ") and told in str(caught.value)


def test_what_a_job_changes_is_put_back(tmp_path: Path) -> None:
    before = sys.excepthook, dist.init_process_group, dist.all_reduce, torch.UntypedStorage.resize_
    mesh = torch.distributed.device_mesh.DeviceMesh
    of_mesh = mesh.__init__, mesh.device_type, mesh.__getitem__
    of_script(script(tmp_path, "fully_shard(model)"))
    assert (sys.excepthook, dist.init_process_group, dist.all_reduce, torch.UntypedStorage.resize_) == before
    assert (mesh.__init__, mesh.device_type, mesh.__getitem__) == of_mesh and not dist.is_initialized()


def test_the_same_job_gives_the_same_graph(tmp_path: Path) -> None:
    path = script(tmp_path, "fully_shard(model)")
    assert of_script(path) == of_script(path)


def test_the_command_writes_a_job_that_can_be_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.workload.json.gz"
    path = script(tmp_path, "fully_shard(model[0]); fully_shard(model)")
    main(["synth", "--ranks", "8", "--out", str(out), "--", str(path)])
    assert "train.py on 8 ranks, 8 ranks" in capsys.readouterr().out
    graph, _ = sim.read(out)
    assert any(isinstance(op, HostCall) for op in graph.programs[0].ops)
    step = sim.summarize(sim.replay(sim.place(graph, sim.load_topology("a5000x8"))))
    assert sum(row.count for row in step.collectives) == 5


def test_what_one_rank_of_a_scripts_job_would_do_alone_is_known_where_all_do_everything(tmp_path: Path) -> None:
    out = tmp_path / "step.workload.json.gz"
    write(of_script(script(tmp_path, "fully_shard(model[0]); fully_shard(model)")), out)
    alone, batches = one_gpu([out], "")
    assert batches == 8 and [rank.rank for rank in alone.ranks] == [0] and alone.groups == {"world": ((0,),)}
    mesh = "mesh = init_device_mesh('cuda', (4, 2), mesh_dim_names=('dp', 'fsdp')); fully_shard(model, mesh=mesh)"
    write(of_script(script(tmp_path, mesh)), out)
    with pytest.raises(UserError, match=r"communicates in dp, fsdp, of which each is a part of the ranks"):
        one_gpu([out], "")
