"""synth -- SCRIPT.py: a script's step against the same model's by name, against the real run, and what is refused."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.tensor
from torch.profiler import ProfilerActivity, profile

import sim
from sim.errors import UserError
from sim.graph import OpGraph, write
from sim.ops import Alloc, Collective, Copy, Free, HostCall, Kernel, Mark, Op
from sim.workload.capture.cutting import cut_by_optimizer
from sim.workload.replicas import read_replicated
from sim.workload.script.run import synthesize_script
from sim.workload.script.spec import ScriptSpec
from sim.workload.synth import SynthSpec, synthesize
from tests.workload.real_step import kernels_of, peak_bytes
from tests.workload.tiny_models import model_folder

TRAIN = Path(__file__).parent / "train_script.py"
GPT2_LOOP = Path(__file__).parent / "gpt2_loop.py"


def of_script(path: Path, *args: str, **options: Any) -> OpGraph:
    return synthesize_script(ScriptSpec(path, args, **options))


def ops_of(graph: OpGraph) -> tuple[Op, ...]:
    return graph.programs[0].ops


def kernels(graph: OpGraph) -> list[tuple[str, Any, Any]]:
    """Name and tensors of every kernel, in order; numbers such as a learning rate are not compared."""
    works = [(op.name, graph.works[op.work or 0]) for op in ops_of(graph) if isinstance(op, Kernel)]
    return [(name, work.inputs, work.outputs) for name, work in works]


def bytes_by_category(graph: OpGraph) -> Counter[str]:
    """What is there when the step begins."""
    total: Counter[str] = Counter()
    for op in ops_of(graph):
        if isinstance(op, Mark):
            break
        if isinstance(op, Alloc):
            total[op.category] += op.bytes
    return total


def peak(graph: OpGraph, of_step_alone: bool = False) -> int:
    """The most that is allocated at once; of what the step itself allocates, as a profile of it sees."""
    live = most = 0
    sizes: dict[int, int] = {}
    counts = not of_step_alone
    for op in ops_of(graph):
        counts = counts or isinstance(op, Mark)
        if isinstance(op, Alloc):
            sizes[op.block] = op.bytes if counts else 0
            live += sizes[op.block]
            most = max(most, live)
        elif isinstance(op, Free):
            live -= sizes[op.block]
    return most


# The same as by name -------------------------------------------------------------------------------------------------

UPDATE_SCALE = "aten::_amp_update_scale_"


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ((), {}),
        (("--amp", "bfloat16", "--clip", "1.0"), {"autocast": "bfloat16", "max_grad_norm": 1.0}),
        (("--amp", "float16"), {"autocast": "float16", "loss_scaling": True}),
        (("--sgd", "--accumulate", "2"), {"optimizer": "sgd", "momentum": 0.9, "micro_batches": 2}),
    ],
    ids=str,
)
def test_a_scripts_step_is_that_of_the_model_by_name(
    tmp_path: Path, words: tuple[str, ...], options: dict[str, Any]
) -> None:
    folder = model_folder(tmp_path / "model", "gpt2")
    script = of_script(TRAIN, folder, *words)
    model = synthesize(SynthSpec(model=folder, batch=2, seq=16, mode="train", **options))
    ran, named = kernels(script), kernels(model)
    if "loss_scaling" in options:
        # The script's step is cut where the optimizer's ends: the scaler's update is then the first of the next.
        assert ran[0][0] == named[-1][0] == UPDATE_SCALE
        ran = [*ran[1:], ran[0]]
    assert ran == named
    # Two micro-batches by name are two batches of 2 x 16 tokens of 8 bytes; the script has one.  The scaler's result
    # (whether anything overflowed, 4 bytes) is still there when the script's next step begins.
    batches = 2 * 16 * 8 * (options.get("micro_batches", 1) - 1)
    overflow = 4 if "loss_scaling" in options else 0
    assert peak(script) == peak(model) - batches + overflow
    there, expected = bytes_by_category(script), bytes_by_category(model)
    assert there["parameter"] == expected["parameter"] and there["input"] == expected["input"] - batches


def test_a_script_without_a_gpu_counts_as_on_one_and_says_so() -> None:
    graph = of_script(GPT2_LOOP, "--iterations", "3", "--batch", "2")
    assert graph.warnings == ("the script names no GPU: all of its tensors count as one's",)
    names = [name for name, _, _ in kernels(graph)]
    assert names.count("aten::_foreach_addcdiv_") == 1  # the implementation that AdamW takes for CUDA parameters
    assert not any(isinstance(op, Copy) for op in ops_of(graph))


def test_too_few_steps_are_told() -> None:
    with pytest.raises(UserError, match="ended by itself after 1 optimizer step, which came before the one to record"):
        of_script(GPT2_LOOP, "--iterations", "1")


# Several GPUs --------------------------------------------------------------------------------------------------------


def device_ops(graph: OpGraph) -> list[tuple[Any, ...]]:
    """Kernels with their tensors and collectives with their bytes, in order, each with its stream."""
    lanes = graph.programs[0].lanes
    told: list[tuple[Any, ...]] = []
    for op in ops_of(graph):
        if isinstance(op, Kernel):
            told.append((op.name, lanes[op.lane].name, graph.works[op.work or 0].inputs))
        elif isinstance(op, Collective):
            told.append((op.kind, lanes[op.lane].name, op.bytes, op.group, op.seq))
    return told


def test_under_data_parallelism_a_script_is_the_model_by_name(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", "gpt2")
    script = of_script(TRAIN, folder, parallel="dp=4")
    model = synthesize(SynthSpec(model=folder, batch=2, seq=16, mode="train", parallel="dp=4"))
    assert device_ops(script) == device_ops(model)
    assert script.groups == model.groups and len(script.ranks) == 4 and script.name.endswith("dp=4")
    there, expected = bytes_by_category(script), bytes_by_category(model)
    assert there["communication"] == expected["communication"] == expected["parameter"]


def test_unused_parameters_are_told(tmp_path: Path) -> None:
    path = script(tmp_path)
    path.write_text(path.read_text().replace("model(x)", "model[0](x)").replace("loss.back", "model(x); loss.back"))
    with pytest.raises(UserError, match=r"--parallel dp=2: the script calls 2 models|parameters without a gradient"):
        of_script(path, parallel="dp=2")


def test_replay_replicates_a_scripts_workload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = script(tmp_path, "print('a step')"), tmp_path / "step.workload.json.gz"
    write(of_script(path), out)
    capsys.readouterr()
    assert read_replicated([out], "dp=2") == of_script(path, parallel="dp=2")
    assert capsys.readouterr().out.count("a step") == 2  # of the second call alone: a replay's output is its own
    path.write_text(path.read_text() + "# changed\n")
    with pytest.raises(UserError, match=r"train\.py: has changed since train\.py was made from it"):
        read_replicated([out], "dp=2")


# The same as a real run ----------------------------------------------------------------------------------------------


def profiled_script(path: Path, *args: str) -> Any:
    """The profile of a real script's second step on this CPU, cut where its optimizer's step ends."""
    steps = 0
    profiler = profile(activities=[ProfilerActivity.CPU], acc_events=True, profile_memory=True)

    class Enough(BaseException):
        pass

    def step_ended() -> None:
        nonlocal steps
        steps += 1
        if steps == 1:
            profiler.start()
        elif steps == 2:
            profiler.stop()
            raise Enough

    argv, sys.argv = sys.argv, [str(path), *args]
    try:
        with cut_by_optimizer(step_ended), contextlib.suppress(Enough):
            runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = argv
    return profiler


def test_a_scripts_step_has_the_ops_and_the_peak_of_the_real_run(tmp_path: Path) -> None:
    words = (model_folder(tmp_path / "model", "gpt2"), "--sgd", "--clip", "1.0", "--attention", "eager")
    graph = of_script(TRAIN, *words)
    made = [name for name, _, _ in kernels(graph)]
    profiled = profiled_script(TRAIN, *words)
    assert kernels_of(profiled, set(made)) == without_scalar_fills(made)
    assert peak(graph, of_step_alone=True) == pytest.approx(peak_bytes(profiled), rel=0.01)


def without_scalar_fills(names: list[str]) -> list[str]:
    """Without the second of two fills before a ``where``: its scalar, which the CPU fills inside its allocation."""
    fill, where = "aten::fill_", "aten::where"
    return [n for i, n in enumerate(names) if not (n == fill and names[i - 1 : i + 2] == [fill, fill, where])]


# What a script does --------------------------------------------------------------------------------------------------

LOOP = """
import sys, torch
from torch import nn
device = "cuda" if torch.cuda.is_available() else "cpu"
model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
{before}
for step in range(3):
    optimizer.zero_grad()
    x = torch.randn(4, 8, device=device)
    loss = model(x).pow(2).mean()
    loss.backward()
    optimizer.step()
    {body}
"""
BODY_LINE = 14


def script(tmp_path: Path, body: str = "pass", before: str = "") -> Path:
    path = tmp_path / "train.py"
    path.write_text(LOOP.format(body=body, before=before))
    return path


def test_memory_is_of_the_modules_of_the_scripts_model(tmp_path: Path) -> None:
    total: Counter[tuple[str, str]] = Counter()
    adamw = "optimizer = torch.optim.AdamW(model.parameters())"
    for op in ops_of(of_script(script(tmp_path, before=adamw))):
        if isinstance(op, Alloc):
            total[op.category, op.module] += op.bytes
    of_parameters = {module: held for (category, module), held in total.items() if category == "parameter"}
    assert of_parameters and all(of_parameters)
    for module, held in of_parameters.items():
        assert total["gradient", module] >= held  # as the step begins, and made anew where it was set to None
        assert total["optimizer", module] == 2 * held


def test_memory_is_told_apart(tmp_path: Path) -> None:
    # Two layers of 8 x 8 weights and 8 biases in float32; the gradients are there until zero_grad, x (4 x 8) and the
    # loss until they are made anew.
    at_begin = bytes_by_category(of_script(script(tmp_path)))
    assert at_begin["parameter"] == at_begin["gradient"] == 2 * (64 + 8) * 4
    assert at_begin["input"] == 4 * 8 * 4 and at_begin["temporary"] == 4


def test_batches_of_a_loader_are_copied_to_the_gpu(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text("""
import torch
from torch.utils.data import DataLoader, TensorDataset
model = torch.nn.Linear(8, 10).cuda()
optimizer = torch.optim.AdamW(model.parameters())
data = TensorDataset(torch.randn(20, 8), torch.randint(0, 10, (20,)))
for x, y in DataLoader(data, batch_size=4, shuffle=True, num_workers=2, pin_memory=True):
    x, y = x.to("cuda", non_blocking=True), y.to("cuda")
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
""")
    ops = ops_of(of_script(path))
    copies = [(op.kind, op.bytes, op.name) for op in ops if isinstance(op, Copy)]
    pinned = "Memcpy HtoD (Pinned -> Device)"
    assert copies == [("h2d", 4 * 8 * 4, pinned), ("h2d", 4 * 8, pinned)]
    # Only the second copy is waited for, and the device when the step ends.
    assert [op.name for op in ops if isinstance(op, HostCall) and op.waits] == [
        "cudaStreamSynchronize",
        "cudaDeviceSynchronize",
    ]


LOADED = """
import torch
from torch.utils.data import DataLoader, TensorDataset, random_split
model = torch.nn.Linear(8, 10){to}
optimizer = torch.optim.AdamW(model.parameters())
data, _ = random_split(TensorDataset(torch.randn(20, 8){to}, torch.randint(0, 10, (20,)){to}), [12, 8])
for x, y in DataLoader(data, batch_size=4, shuffle=True):
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def test_a_data_set_on_the_gpu_is_gathered_there(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(LOADED.format(to=".cuda()"))
    graph = of_script(path)
    assert [name for name, _, _ in kernels(graph)][:2] == ["aten::stack", "aten::stack"]
    assert not any(isinstance(op, Copy) for op in ops_of(graph)) and graph.warnings == ()


def test_without_a_gpu_loaded_batches_are_inputs(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(LOADED.format(to=""))
    inputs = [op.bytes for op in ops_of(of_script(path)) if isinstance(op, Alloc) and op.category == "input"]
    assert inputs[-2:] == [4 * 8 * 4, 4 * 8]  # the step's own batch: 4 rows of 8 floats, 4 labels of 8 bytes


def test_numbers_are_copied_to_the_gpu_and_results_back(tmp_path: Path) -> None:
    body = "weights = torch.tensor([1.0, 2.0], device=device); kept = loss.detach().cpu()"
    ops = ops_of(of_script(script(tmp_path, body)))
    copies = [(op.kind, op.bytes) for op in ops if isinstance(op, Copy)]
    assert copies == [("h2d", 8), ("d2h", 4)]
    assert [op.category for op in ops if isinstance(op, Alloc) and op.name == "aten::lift_fresh"] == ["input"]


def test_values_that_the_script_made_itself_are_known(tmp_path: Path) -> None:
    before = """
rates = [r.item() for r in torch.linspace(0, 0.1, 3)]
order = torch.randperm(4).tolist()
assert sorted(order) == [0, 1, 2, 3] and rates[0] == 0.0 and float(torch.tensor(2.5)) == 2.5
numbers = torch.zeros(3); numbers[1] = 2; assert numbers.sum() == 2
"""
    assert of_script(script(tmp_path, before=before)).warnings == ()


def test_reads_are_answered_where_an_answer_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = "print(loss.item(), f'{loss:.1f}', bool(loss > 0), loss.cpu().numpy().shape)"
    path = script(tmp_path, body)
    graph = of_script(path, assume_value=0.5)
    assert capsys.readouterr().out == "0.5 0.5 True ()\n"  # after the first step; the second is cut before it
    assert graph.warnings == (f"values read at {path}, line {BODY_LINE} were answered with 0.5 (4 times)",)
    copies = [op for op in ops_of(graph) if isinstance(op, Copy)]
    assert [(op.kind, op.bytes) for op in copies] == [("d2h", 4)] * 2 + [("d2h", 1), ("d2h", 4)]


def test_a_scheduler_that_looks_at_the_loss_reads_a_value(tmp_path: Path) -> None:
    before, body = "plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)", "plateau.step(loss)"
    path = script(tmp_path, body, before=before)
    with pytest.raises(UserError, match=rf"line {BODY_LINE}: `{re.escape(body)}` reads the value of a tensor"):
        of_script(path)
    assert of_script(path, assume_value=1.0).warnings == (
        f"values read at {path}, line {BODY_LINE} were answered with 1",
    )


def test_an_optimizer_that_goes_by_the_loss_reads_values(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text("""
import torch
model = torch.nn.Linear(4, 4, device="cuda")
optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
x = torch.randn(4, 4, device="cuda")
def closure():
    optimizer.zero_grad(); loss = model(x).sum(); loss.backward()
    return loss
for _ in range(3):
    optimizer.step(closure)
""")
    with pytest.raises(UserError, match=r"line 10: `optimizer\.step\(closure\)` reads the value of a tensor"):
        of_script(path)


@pytest.mark.parametrize(("warmup", "copies"), [(1, 2), (2, 0)])  # a weight and a bias, in the first averaging alone
def test_averaged_weights_are_copied_once_and_averaged_after(tmp_path: Path, warmup: int, copies: int) -> None:
    path = tmp_path / "train.py"
    path.write_text("""
import torch
model = torch.nn.Linear(4, 4, device="cuda")
optimizer = torch.optim.SGD(model.parameters(), 0.1)
average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
for _ in range(4):
    model(torch.randn(4, 4, device="cuda")).sum().backward()
    optimizer.step()
    averaged.update_parameters(model)
""")
    names = Counter(op.name for op in ops_of(of_script(path, warmup=warmup)) if isinstance(op, Kernel))
    assert names["aten::copy_"] == copies
    assert names["aten::_foreach_lerp_"] == warmup - 1


def test_a_tensor_can_be_told_of_another_stream(tmp_path: Path) -> None:
    ops = ops_of(of_script(script(tmp_path, "x.record_stream(torch.cuda.current_stream())")))
    assert [op.lane for op in ops if isinstance(op, HostCall) and op.name == "aten::record_stream"] == [0]


def test_a_time_between_events_can_be_divided_by(tmp_path: Path) -> None:
    events = "begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))"
    path = script(tmp_path, "speed = 1 / begin.elapsed_time(end)", before=events)
    assert of_script(path).warnings == (
        f"a time between CUDA events at {path}, line {BODY_LINE} was answered with 1 ms",
    )


def test_the_script_finds_what_python_gives_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "beside.py").write_text("WORD = 'beside'\n")
    before = "import beside; print(sys.argv, __name__, __file__, beside.WORD, next(model.parameters()).device)"
    path = script(tmp_path, before=before)
    before_run = list(sys.path), list(sys.argv), torch.cuda.is_available(), torch.randn(2)
    of_script(path, "--lr", "3")
    assert capsys.readouterr().out == f"['{path}', '--lr', '3'] __main__ {path} beside cuda:0\n"
    assert (sys.path, sys.argv, torch.cuda.is_available()) == before_run[:3] and "beside" not in sys.modules
    assert type(torch.randn(2)) is torch.Tensor


def test_the_same_script_gives_the_same_graph(tmp_path: Path) -> None:
    assert of_script(script(tmp_path)) == of_script(script(tmp_path))


def test_attention_inside_of_torchs_own_modules_is_a_gpus(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text("""
import torch
layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).cuda().bfloat16()
optimizer = torch.optim.AdamW(layer.parameters())
for _ in range(2):
    layer(torch.randn(2, 4, 16, device="cuda", dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
""")
    names = Counter(name for name, _, _ in kernels(of_script(path)))
    assert names["aten::_scaled_dot_product_flash_attention"] == 1
    assert names["aten::native_dropout"] == 3  # the attention's own is inside its kernel
    assert names["aten::_fused_adamw_"] == 0 and names["aten::_foreach_addcdiv_"] == 1


def test_recomputed_and_copied_modules_are_where_they_were(tmp_path: Path) -> None:
    before = """
import copy
from torch.utils.checkpoint import checkpoint
average = copy.deepcopy(model).requires_grad_(False)
assert all(p.is_cuda and not p.requires_grad for p in average.parameters())
"""
    body = "for a, p in zip(average.parameters(), model.parameters()): a.lerp_(p.detach(), 0.5)"
    path = script(tmp_path, body, before)
    path.write_text(path.read_text().replace("model(x)", "checkpoint(model, x, use_reentrant=False)"))
    names = Counter(name for name, _, _ in kernels(of_script(path)))
    # Both layers in forward; the first again in backward, which stops before what only the end of the block needs.
    assert names["aten::addmm"] == 3 and names["aten::native_dropout"] == 2 and names["aten::lerp_"] == 4


def test_numbers_without_end_can_be_written(tmp_path: Path) -> None:
    out = tmp_path / "step.workload.json.gz"
    graph = of_script(script(tmp_path, 'x.masked_fill(x > 0, float("-inf")); x.clamp(max=float("inf"))'))
    write(graph, out)
    assert sim.read(out).graph == graph


def test_a_side_stream_and_its_waits_are_written_down(tmp_path: Path) -> None:
    body = """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x * 2
    torch.cuda.current_stream().wait_stream(side)
    z = x * 3
"""
    path = script(tmp_path, before="")
    path.write_text(path.read_text().replace("    loss = model", f"{body}    loss = model"))
    graph = of_script(path)
    ops, lanes = ops_of(graph), graph.programs[0].lanes
    products = [op for op in ops if isinstance(op, Kernel) and op.name == "aten::mul"][:2]
    assert [lanes[op.lane].name for op in products] == ["stream 2", "compute"]  # the first step's was the first
    assert ops[products[0].after[0]].lane == 1 and ops.index(products[0]) in products[1].after


def test_pretrained_models_are_built_without_weights(tmp_path: Path) -> None:
    # GPT-2 with one of its twelve layers: 124439808 - 11 x 7087872 = 46473216.
    folder, path = model_folder(tmp_path / "model", "llama"), tmp_path / "train.py"
    path.write_text(f"""
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel
assert AutoConfig.from_pretrained("gpt2", n_layer=3).to_dict()["n_layer"] == 3
assert AutoConfig.from_pretrained("gpt2").n_embd == 768
assert AutoModelForCausalLM.from_pretrained("gpt2", n_layer=1).num_parameters() == 46473216
small = GPT2LMHeadModel.from_pretrained("gpt2", torch_dtype="float16")
assert small.num_parameters() == 124439808 and small.lm_head.weight is small.transformer.wte.weight
model = AutoModelForCausalLM.from_pretrained({folder!r}, torch_dtype=torch.bfloat16, device_map="auto").train()
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(2):
    ids = torch.randint(0, 100, (1, 8), device=model.device)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
""")
    graph = of_script(path)
    assert [told.partition(" at ")[0] for told in graph.warnings] == ["gpt2", "gpt2", folder]
    assert all("built from its configuration" in told for told in graph.warnings)
    assert "aten::_scaled_dot_product_flash_attention" in [name for name, _, _ in kernels(graph)]


# What is refused -----------------------------------------------------------------------------------------------------

READS = "reads the value of a tensor, which a run without data does not have"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("print(loss.item())", f"`print(loss.item())` {READS}"),
        ("print(loss)", READS),
        ("x.cpu().numpy()", READS),
        ("if loss < 1: break", READS),
        ("x[x > 0]", "`x[x > 0]` makes a tensor whose shape depends on values"),
        ("model = torch.compile(model)", "torch.compile: compiled models are not synthesized"),
        ("torch.distributed.init_process_group('nccl')", "give the number of ranks that torchrun would start"),
        ("torch.distributed.init_device_mesh('cuda', (8,))", "as in --ranks 8"),
        ("torch.nn.parallel.DistributedDataParallel(model)", "as in --ranks 8"),
        ("torch.distributed.fsdp.fully_shard(model)", "as in --ranks 8"),
        ("torch.distributed.fsdp.FullyShardedDataParallel(model)", "torch.distributed.fsdp.fully_shard (FSDP2)"),
        ("torch.multiprocessing.spawn(print)", "each process is one rank of a job"),
        ("x.to('cuda:1')", "asks for cuda:1: a script of one GPU is synthesized"),
        ("open('/nowhere/data.bin')", "FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/data.bin'"),
        ("raise ValueError('no\\nsuch thing')", "ValueError: no such thing"),
        ("x @ x", "RuntimeError: a and b must have same reduction dim"),
    ],
)
def test_what_cannot_be_without_data_is_told_with_its_line(tmp_path: Path, body: str, told: str) -> None:
    path = script(tmp_path, body)
    with pytest.raises(UserError) as caught:
        of_script(path)
    assert str(caught.value).startswith(f"{path}, line {BODY_LINE}: ") and told in str(caught.value)
    assert not torch.cuda.is_available()


def test_a_script_for_torchrun_is_told_to_have_ranks(tmp_path: Path) -> None:
    path = script(tmp_path, "import os; os.environ['LOCAL_RANK']")
    with pytest.raises(UserError, match=r"asks for LOCAL_RANK, which torchrun sets; give its ranks, as in --ranks 8"):
        of_script(path)


def test_how_a_script_ends_by_itself_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exit code 3 after 1 optimizer step"):
        of_script(script(tmp_path, "sys.exit(3)"))
    with pytest.raises(UserError, match=r"exit code 1 \(no data\) before its first step"):
        of_script(script(tmp_path, before="sys.exit('no data')"))


def test_a_syntax_error_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text("import torch\nmodel = = 3\n")
    with pytest.raises(UserError, match=r"train\.py, line 2: SyntaxError"):
        of_script(path)


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "sim", *words], capture_output=True, text=True, check=False)


def test_the_command_writes_a_workload_that_can_be_replayed(tmp_path: Path) -> None:
    out = tmp_path / "step.workload.json.gz"
    done = command("synth", "--out", str(out), "--assume-value", "1", "--", str(script(tmp_path, "loss.item()")))
    assert done.returncode == 0 and "train.py, 1 rank" in done.stdout and not done.stderr
    graph, _ = sim.read(out)
    assert graph.name == "train.py" and "line 14 were answered with 1" in graph.warnings[0]
    step = sim.summarize(sim.replay(sim.place(graph, sim.load_topology("a5000x1"))))
    assert step.step_ms > 0 and step.peak_allocated_bytes > 0


def test_the_command_refuses_in_one_line_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "step.workload.json.gz"
    done = command("synth", "--out", str(out), "--", str(script(tmp_path, "loss.item()")))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "line 14" in done.stderr
    assert not out.exists()


def test_ctrl_c_is_not_lost_in_the_script(tmp_path: Path) -> None:
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        pytest.skip("somebody else takes the signal here")
    before = """
import signal
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    pass
"""
    with pytest.raises(KeyboardInterrupt):
        of_script(script(tmp_path, before=before))
    of_script(script(tmp_path))  # and forgotten afterwards


def test_what_a_script_changes_is_put_back(tmp_path: Path) -> None:
    before = "import os; os.environ['OF_THE_SCRIPT'] = 'yes'; os.chdir('/'); sys.path.append('/nowhere')"
    folder, path = Path.cwd(), list(sys.path)
    of_script(script(tmp_path, before=before))
    assert (Path.cwd(), sys.path) == (folder, path) and "OF_THE_SCRIPT" not in os.environ


def test_options_that_cannot_be_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        ScriptSpec(tmp_path / "none.py", warmup=0, parallel="fsdp=2", ranks=0).check()
    told = str(caught.value)
    assert all(word in told for word in ("none.py: no such script", "--warmup 0", "--parallel fsdp=2", "--ranks 0"))
    with pytest.raises(UserError, match=r"--hosts 3: does not divide the script's 8 ranks.*--ranks 8: leave it out"):
        ScriptSpec(TRAIN, parallel="dp=8", ranks=8, hosts=3).check()


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Whatever is changed in PyTorch while a script runs is put back."""
    before = replaced()
    yield
    assert replaced() == before


def replaced() -> tuple[Any, ...]:
    return torch.save, foreach_types(), torch.nn.Module.compile, torch.cuda.Stream, torch.autocast.__init__


def foreach_types() -> list[type]:
    return list(sys.modules["torch.optim.optimizer"]._foreach_supported_types)
