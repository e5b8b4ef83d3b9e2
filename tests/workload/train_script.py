"""A training script as people write them: arguments, a GPU if there is one, autocast, a scaler, a schedule, a log."""

import argparse

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--sgd", action="store_true")
    parser.add_argument("--amp", choices=["float16", "bfloat16"])
    parser.add_argument("--clip", type=float)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--log", action="store_true")
    parser.add_argument("--attention", default="sdpa")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = AutoConfig.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=args.attention).to(device)
    if args.sgd:
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, foreach=True)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    dtype = getattr(torch, args.amp) if args.amp else None
    scaler = torch.amp.GradScaler(device, enabled=args.amp == "float16")
    ids = torch.randint(0, config.vocab_size, (args.batch, args.seq), device=device)

    def forward() -> torch.Tensor:
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss / args.accumulate if args.accumulate > 1 else loss

    for step in range(args.steps):
        for _ in range(args.accumulate):
            loss = forward()
            scaler.scale(loss).backward()
        if args.clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if args.log:
            print(f"{step}: {loss.item():.3f}")


if __name__ == "__main__":
    main()
