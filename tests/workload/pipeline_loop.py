"""Run by test_pipeline_gloo in two processes: a tiny model in real stages over gloo, what it sends written to a file.

Arguments: rank, folder of the model, schedule, micro-batches, the file of the store, the file for the answer.  The
stages find out by themselves what passes between them, as a user's do.
"""

from __future__ import annotations

import contextlib
import json
import sys
import unittest.mock
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from sim.workload.cards import find_config
from sim.workload.heads import TARGET, head_of
from sim.workload.spec import SynthSpec
from sim.workload.stages import Stage, parts_of
from sim.workload.tasks import task_of
from tests.workload.tiny_models import IMAGES

BATCH, SEQ = 2, 16
Sent = list[list[tuple[str, int, int]]]


def logged(sent: Sent) -> dict[str, Any]:
    """torch.distributed's calls, which also say what they do: a list for each call."""
    isend, irecv, batch = dist.isend, dist.irecv, dist.batch_isend_irecv

    def send(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append([("send", tensor.nbytes, kwargs["group_dst"])])
        return isend(tensor, *args, **kwargs)

    def recv(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append([("recv", tensor.nbytes, kwargs["group_src"])])
        return irecv(tensor, *args, **kwargs)

    def batched(ops: list[Any]) -> Any:
        kinds = ["send" if op.op is send else "recv" for op in ops]
        sent.append([(kind, op.tensor.nbytes, op.peer) for kind, op in zip(kinds, ops, strict=True)])
        for kind, op in zip(kinds, ops, strict=True):
            op.op = isend if kind == "send" else irecv
        with unittest.mock.patch.multiple(distributed_c10d, isend=isend, irecv=irecv):
            return batch(ops)

    return {"isend": send, "irecv": recv, "batch_isend_irecv": batched}


def main(rank: int, folder: str, name: str, micro_batches: int, store: str, answer: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    count = 4 if name == "interleaved" else 2
    config = find_config(folder)
    seq = None if config.model_type in IMAGES else SEQ
    spec = SynthSpec(model=folder, batch=BATCH * micro_batches, seq=seq, mode="train", parallel="pp=2")
    task = task_of(spec, config)
    head = head_of(task)
    batch = head.with_one_target(task.batch(spec, config))
    own = [Stage(spec, config, task, part) for part in parts_of(spec, config, task, count)[rank::2]]
    stages = [PipelineStage(stage, stage.part.number, count, torch.device("cpu")) for stage in own]
    loss = next((stage.loss for stage in own if stage.part.is_last), lambda output, target: output.sum())
    single = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}
    if name == "interleaved":
        schedule: Any = ScheduleInterleaved1F1B(stages, micro_batches, loss)
    else:
        schedule = single[name](stages[0], micro_batches, loss)
    has_first = any(stage.is_first for stage in stages)
    inputs = (batch[head.enters],) if has_first else ()
    target = {"target": batch[TARGET]} if any(stage.is_last for stage in stages) else {}
    beside = head.beside(batch, has_first)
    sent: Sent = []
    calls = logged(sent)
    on_cpu = unittest.mock.patch.object(Stage, "computing", lambda stage: contextlib.nullcontext())
    both = (unittest.mock.patch.multiple(place, **calls) for place in (dist, distributed_c10d))
    with contextlib.ExitStack() as patched:
        for patch in (on_cpu, *both):
            patched.enter_context(patch)
        for _ in range(2):
            sent.clear()  # the first step also finds out what passes between stages
            schedule.step(*inputs, **target, **beside, return_outputs=False)
    Path(answer).write_text(json.dumps(sent))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), *sys.argv[5:])
