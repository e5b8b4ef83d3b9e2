"""A training script as people start it under torchrun: its own process group, mesh, sharding, clipping and log."""

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from transformers import AutoConfig, AutoModelForCausalLM


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--mode", choices=["ddp", "fsdp", "hsdp", "fsdp-tp"], default="fsdp")
    parser.add_argument("--keep", action="store_true", help="do not reshard after forward")
    parser.add_argument("--clip", type=float)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    return parser.parse_args()


def shard(model: torch.nn.Module, mesh: DeviceMesh, keep: bool) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def split(model: torch.nn.Module, mesh: DeviceMesh) -> None:
    whole = {"hidden_states": Replicate()}
    for block in model.model.layers:
        plan = {
            "self_attn": PrepareModuleInput(input_kwarg_layouts=whole, desired_input_kwarg_layouts=whole),
            "self_attn.o_proj": RowwiseParallel(),
            "mlp": PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),)),
            "mlp.down_proj": RowwiseParallel(),
        }
        for path in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            plan[path] = ColwiseParallel()
        parallelize_module(block, mesh, plan)


def parallelize(model: torch.nn.Module, args: argparse.Namespace, local_rank: int) -> torch.nn.Module:
    ranks = dist.get_world_size()
    if args.mode == "ddp":
        return DistributedDataParallel(model, device_ids=[local_rank] if args.device == "cuda" else None)
    if args.mode == "fsdp":
        shard(model, init_device_mesh(args.device, (ranks,)), args.keep)
    elif args.mode == "hsdp":
        of_a_host = int(os.environ["LOCAL_WORLD_SIZE"])
        shard(
            model,
            init_device_mesh(args.device, (ranks // of_a_host, of_a_host), mesh_dim_names=("dp", "fsdp")),
            args.keep,
        )
    else:
        mesh = init_device_mesh(args.device, (ranks // 2, 2), mesh_dim_names=("fsdp", "tp"))
        split(model, mesh["tp"])
        shard(model, mesh["fsdp"], args.keep)
    if args.device == "cpu":  # gloo has no average
        model.set_force_sum_reduction_for_comms(True)
    return model


def by_mesh(model: torch.nn.Module) -> list[dict[str, list[torch.Tensor]]]:
    """An op over a list of tensors takes those of one mesh."""
    kinds: dict[str, list[torch.Tensor]] = {}
    for parameter in model.parameters():
        kinds.setdefault(str(getattr(parameter, "device_mesh", None)), []).append(parameter)
    return [{"params": kind} for kind in kinds.values()]


def main() -> None:
    args = arguments()
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    rank, local_rank = dist.get_rank(), int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu")
    if args.device == "cuda":
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    config = AutoConfig.from_pretrained(args.model)
    model = parallelize(AutoModelForCausalLM.from_config(config).to(device), args, local_rank)
    optimizer = torch.optim.AdamW(by_mesh(model), lr=1e-4)
    data = TensorDataset(torch.randint(0, config.vocab_size, (64, 16)))
    sampler: DistributedSampler = DistributedSampler(data, shuffle=True)
    assert len(sampler) == 64 // int(os.environ["WORLD_SIZE"])
    loader = DataLoader(data, batch_size=2, sampler=sampler, pin_memory=args.device == "cuda")
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for step, (ids,) in enumerate(loader):
            ids = ids.to(device, non_blocking=True)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            if args.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            optimizer.zero_grad()
            if rank == 0 and step % 10 == 9:
                print(f"{step}: {loss.item():.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
