"""The training loop for every network of `mini`, with resume: the batches do not depend on interruptions."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from e4t_cli.nn.precision import PrecisionPolicy, half_precision


def default_device() -> torch.device:
    """CUDA if available, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_rows(count: int, size: int, generator: torch.Generator) -> Tensor:
    """`size` random row numbers below `count`, on the generator's device."""
    return torch.randint(count, (size,), generator=generator, device=generator.device)


def process_rank() -> tuple[int, int]:
    """Rank and world size under torchrun, else (0, 1); every process computes its part of each batch."""
    if "RANK" not in os.environ:
        return 0, 1
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def train(
    name: str,
    folder: Path,
    modules: dict[str, nn.Module],
    loss_of_step: Callable[[int, torch.Generator], dict[str, Tensor]],
    *,
    steps: int,
    learning_rate: float,
    warm_up: int = 100,
    weight_decay: float = 0.01,
    average: float | None = None,
    seed: int = 0,
    groups: Iterable[dict] | None = None,
    save_every_seconds: float = 90.0,
) -> dict[str, nn.Module]:
    """Train `modules` for `steps` steps of AdamW with a cosine schedule, with bf16 autocast where the device has it.

    `loss_of_step(step, generator)` returns the terms of the loss, whose sum is minimized. All its random numbers must come from
    the generator, which is on the device and seeded by `seed`, step and process. `average`: the decay of an exponential moving
    average, which is returned in place of the last weights. Progress is logged to `<folder>/<name>.jsonl`, the training state
    is saved in `<folder>/<name>.pt`.
    """
    device = default_device()
    bundle = nn.ModuleDict(modules).to(device)
    if device.type == "cuda":
        bundle.to(memory_format=torch.channels_last)
        torch.backends.cudnn.benchmark = True
    parameters = [p for p in bundle.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        groups or parameters,
        lr=learning_rate,
        weight_decay=weight_decay,
        betas=(0.9, 0.98),
        fused=True,
    )
    peak = [group["lr"] for group in optimiser.param_groups]
    shadow = [p.detach().clone() for p in parameters] if average else None
    folder.mkdir(parents=True, exist_ok=True)
    state_path, log_path = folder / f"{name}.pt", folder / f"{name}.jsonl"
    first, spent = 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True, map_location=device)
        bundle.load_state_dict(state["modules"])
        optimiser.load_state_dict(state["optimiser"])
        first, spent = state["step"], state["seconds"]
        if shadow is not None:
            shadow = [tensor.to(device) for tensor in state["shadow"]]

    rank, ranks = process_rank()

    def save(step: int) -> None:
        if rank:
            return
        partial = state_path.with_suffix(".partial")
        state = {
            "modules": bundle.state_dict(),
            "optimiser": optimiser.state_dict(),
            "step": step,
            "seconds": spent,
        }
        torch.save(state | {"shadow": shadow or []}, partial)
        partial.replace(state_path)

    bundle.train()
    started = saved = time.monotonic()
    sums: dict[str, Tensor] = {}
    generator = torch.Generator(device)
    for step in range(first, steps):
        generator.manual_seed((seed << 40) + (step << 4) + rank)
        factor = min(1.0, (step + 1) / warm_up) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group, rate in zip(optimiser.param_groups, peak, strict=True):
            group["lr"] = rate * factor
        # On the CPU the fused attention kernels have a slow backward pass: unfused attention trains the tower 1.5x faster.
        with sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext():
            with half_precision(device, PrecisionPolicy.resolve(device, loss_scaling=False).half):
                parts = loss_of_step(step, generator)
            sum(parts.values()).backward()  # type: ignore[union-attr]
        if ranks > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters])
            torch.distributed.all_reduce(flat)
            for p, part in zip(parameters, flat.div_(ranks).split([p.numel() for p in parameters]), strict=True):
                p.grad.copy_(part.view_as(p))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if shadow is not None:
            decay = min(average or 0.0, (step + 1) / (step + 10))
            torch._foreach_lerp_(shadow, [p.detach() for p in parameters], 1 - decay)
        for key, value in parts.items():
            sums[key] = sums.get(key, 0.0) + value.detach()  # read every 50 steps, because reading synchronizes the GPU
        if (step + 1) % 50 == 0:
            means = {key: round(value.item() / 50, 5) for key, value in sums.items()}
            spent += time.monotonic() - started
            started = time.monotonic()
            line = {"step": step + 1, "seconds": round(spent, 1)} | means
            if rank == 0:
                with log_path.open("a") as log:
                    log.write(json.dumps(line) + "\n")
            sums = {}
            if started - saved > save_every_seconds:
                save(step + 1)
                saved = time.monotonic()
    spent += time.monotonic() - started
    save(steps)
    if shadow is not None:
        with torch.no_grad():
            for parameter, smooth in zip(parameters, shadow, strict=True):
                parameter.copy_(smooth)
    # safetensors stores contiguous tensors only.
    bundle.to(memory_format=torch.contiguous_format).eval()
    return modules
