"""The fastest way to tune that fits, by the arithmetic of `peaks`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from e4t_cli.base_model import TextToImageModel
from e4t_cli.devices import budget_of, free_bytes, free_ram
from e4t_cli.pretrained import PretrainedDomain
from e4t_cli.recipes import TuningRecipe

from .peaks import Work, numbers_of, predicted_peak
from .plan import Plan

USABLE = 0.92
"""Share of a memory that one process can have: fragments and other programs take the rest."""

HOST_BYTES = 16
"""Of an optimiser in the host's memory, a weight: itself, its gradient, two moments."""


def plan_tuning(
    model: TextToImageModel,
    pretrained: PretrainedDomain,
    recipe: TuningRecipe,
    *,
    vram: str = "auto",
    consume: bool = False,
    half: torch.dtype | None = None,
    eight_bit: bool = False,
    ram: int | None = None,
) -> Plan:
    """Return the fastest way to tune that is predicted to fit.

    Args:
        vram: "auto" for what is free on the device, or gigabytes.
        consume: the base's own U-Net is tuned, without a copy.
        half: the format of the products, if it is none of float32.
        eight_bit: whether the 8-bit optimiser can be had.
        ram: bytes of main memory that an optimiser may have there; None for what is free.

    Returns:
        A plan; the smallest one, though it is predicted not to fit, where none does.
    """
    device = model.device
    budget = int(budget_of(vram) * USABLE) if vram != "auto" else int(free_bytes(device) * USABLE)
    work = Work.of(model.unet, model.latent_shape[1])
    away = HOST_BYTES * (numbers_of(model.unet) + numbers_of(pretrained.encoder))
    plan = Plan(micro_batch=recipe.batch_size)
    for candidate in _ladder(recipe, device, eight_bit):
        peak = predicted_peak(
            model, pretrained, recipe, candidate, work, consume=consume, half=half
        )
        if candidate.optimizer == "host" and not host_has_room(device, away, peak, ram):
            continue
        plan = candidate.replace(peak=peak, budget=budget)
        if peak <= budget:
            break
    return plan


def _ladder(recipe: TuningRecipe, device: torch.device, eight_bit: bool) -> Iterator[Plan]:
    """Yield plans, the fastest first."""
    away = device.type != "cpu"
    size, sizes = recipe.batch_size, []
    while size > 1:
        sizes.append(size)
        size = (size + 1) // 2
    kinds = ["fused"]
    if recipe.method == "exact" and away:
        kinds += (["8bit"] if eight_bit else []) + ["host"]
    for kind in kinds:
        for park in (False, True) if away else (False,):
            for small in [size for size in sizes if size >= 4] or [recipe.batch_size]:
                yield Plan(micro_batch=small, optimizer=kind, park=park)
            for small in (*[size for size in sizes if size in (2, 3, 4)], 1):
                yield Plan(micro_batch=small, checkpointing=True, optimizer=kind, park=park)


def host_has_room(
    device: torch.device, needed: int, taken: int = 0, ram: int | None = None
) -> bool:
    """Tell whether an optimiser can go to the host's memory.

    Args:
        needed: bytes; `HOST_BYTES` a weight.
        taken: bytes that tuning takes on the device. Apple's have no memory of their own: what
            goes to the host stays where it was.
        ram: bytes of main memory it may have; None for what is free.
    """
    ram = free_ram() if ram is None else ram
    return needed <= (ram - (taken if device.type == "mps" else 0)) * USABLE
