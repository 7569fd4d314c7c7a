"""How a tuning is to be run, as one value.

What a tuning takes at its worst moment: arithmetic on the sizes of its modules.

The figures were counted on the exact modules on torch's meta device, by summing what autograd
keeps (`test_memory_invariants.py` counts again). With S = Σ pixels · channels over the
residual blocks of a pass and A = the same over its attention blocks, a pass of one sample keeps
12 S + 27 A numbers, through adapters 10 S + 23 A, and 3.4 (S + A) under gradient checkpointing
beside one block at a time. A weight in training takes 16 bytes (itself, its gradient, two
moments), 10 with an 8-bit optimiser, and 2 on the device with an optimiser in the host's memory.

The fastest way to tune that fits, by the arithmetic of `peaks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import nn

from e4t_cli.devices import GB, budget_of, free_bytes, free_ram
from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.adapters import attention_layers
from e4t_cli.registry.config import TuningConfig


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a tuning is to be run; every plan gives the same gradient.

    Args:
        micro_batch: samples per backward pass.
        checkpointing: compute activations again instead of keeping them, a third more work.
        optimizer: "fused" on the device, "8bit" there, or "host" in the host's memory.
        park: send the VAE to the host while tuning.
        peak: bytes that this is predicted to take; 0 for a plan that nobody counted.
        budget: bytes there are.
    """

    micro_batch: int
    checkpointing: bool = False
    optimizer: str = "fused"
    park: bool = False
    peak: int = 0
    budget: int = 0

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some entries changed."""
        return replace(self, **changes)

    def sentence(self) -> str:
        """Say the plan in one line."""
        parts = [f"{self.micro_batch} at a time"]
        if self.checkpointing:
            parts.append("gradient checkpointing")
        if self.optimizer == "8bit":
            parts.append("8-bit optimiser")
        if self.optimizer == "host":
            parts.append("optimiser in the host's memory")
        if self.park:
            parts.append("VAE in the host's memory meanwhile")
        return (
            f"memory: {self.peak / GB:.1f} GB predicted of {self.budget / GB:.1f} GB; "
            f"{', '.join(parts)}"
        )


EXACT, ADAPTED, CHECKPOINTED = (12.0, 27.0), (10.0, 23.0), (3.4, 3.4)
"""Numbers that autograd keeps for each of S and A."""

ONE_BLOCK = 40.0
"""Numbers of the largest attention block while it is computed again."""

OVERHEAD = {"cpu": 900 << 20, "cuda": 700 << 20}
"""Libraries, kernels and the allocator's own needs."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """S and A of one sample, for the whole U-Net and for its way down with the mid block."""

    whole: tuple[int, int]
    down: tuple[int, int]
    largest: int  # pixels · channels of the largest attention block
    matrix: int  # numbers of its attention matrix

    @classmethod
    def of(cls, unet: nn.Module, side: int) -> Self:
        """Count a U-Net on latents of side × side."""
        residual = attention = largest = matrix = 0
        pixels = side * side

        def visit(block: nn.Module) -> None:
            nonlocal residual, attention, largest, matrix
            residual += sum(pixels * one.out_channels for one in block.resnets)
            for one in getattr(block, "attentions", None) or ():
                attention += pixels * one.in_channels
                if pixels * one.in_channels > largest:
                    largest = pixels * one.in_channels
                    matrix = one.transformer_blocks[0].attn1.heads * pixels * pixels

        for block in unet.down_blocks:
            visit(block)
            pixels //= 4 if block.downsamplers else 1
        if unet.mid_block is not None:
            visit(unet.mid_block)
        down = residual, attention
        for block in unet.up_blocks:
            visit(block)
            pixels *= 4 if block.upsamplers else 1
        return cls(whole=(residual, attention), down=down, largest=largest, matrix=matrix)


def predicted_peak(
    model: TextToImageModel,
    pretrained: DomainWeights,
    config: TuningConfig,
    plan: Plan,
    work: Work,
    *,
    consume: bool = False,
    half: torch.dtype | None = None,
) -> int:
    """Return the bytes on the device at the worst moment of a tuning (arithmetic alone)."""
    unet, kept = numbers_of(model.unet), model.dtype.itemsize
    encoder = numbers_of(pretrained.encoder)
    frozen = numbers_of(model.text_encoder) * kept
    frozen += 0 if plan.park else numbers_of(model.vae) * kept
    if model.device.type == "cpu":
        frozen += encoder * 4  # the pack's own, of which tuning trains a copy
    exact = config.method == "full"
    if exact:
        rounded = plan.optimizer == "host" and half == torch.bfloat16
        each = {"fused": 16, "8bit": 10, "host": 2 if rounded else 4}[plan.optimizer]
        state = (unet + encoder) * each + (0 if consume else unet * kept)
        # At the end of a tuning with the host's optimiser all weights come back in float32.
        state = max(state, (unet + encoder) * 4)
        if half and not rounded and not plan.checkpointing:
            state += unet * 2  # autocast's copies of the weights
        # A weight that is used twice has two new gradients for a moment, beside the one they are
        # added to; the largest of e4t-diffusion's encoder is 211 M numbers.
        weights = [weight.numel() for weight in pretrained.encoder.parameters()]
        state += 2 * 4 * max(weights, default=0)
    else:
        adapted = _attention_numbers(model.unet)
        rank = config.lora_rank
        state = (unet + adapted) * kept + encoder * 8 + 16 * rank * 4 * int(adapted**0.5)
        if not half and kept < 4:
            state += unet * 4  # without fast half precision a copy is tuned, in float32
    number = 2 if half else 4
    coefficients = CHECKPOINTED if plan.checkpointing else EXACT if exact else ADAPTED
    passes = [work.whole, *([work.down] if exact else [])]  # adapters let the feature pass go
    numbers = sum(c * w for one in passes for c, w in zip(coefficients, one, strict=True))
    if plan.checkpointing:
        numbers += ONE_BLOCK * work.largest
    activations = numbers * number
    if half and model.device.type == "cpu":
        # There the plain attention is the faster one in bfloat16, and keeps its matrices.
        activations += 3 * number * work.matrix * (1 if plan.checkpointing else 5)
    overhead = OVERHEAD.get(model.device.type, OVERHEAD["cuda"])
    return int(frozen + state + activations * plan.micro_batch + overhead)


def numbers_of(module: Any) -> int:
    """Return how many numbers the weights of a module are."""
    return sum(weight.numel() for weight in module.parameters())


def _attention_numbers(unet: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in attention_layers(unet).values())


USABLE = 0.92
"""Share of a memory that one process can have: fragments and other programs take the rest."""

HOST_BYTES = 16
"""Of an optimiser in the host's memory, a weight: itself, its gradient, two moments."""


def plan_tuning(
    model: TextToImageModel,
    pretrained: DomainWeights,
    config: TuningConfig,
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
    plan = Plan(micro_batch=config.batch_size)
    for candidate in _ladder(config, device, eight_bit):
        peak = predicted_peak(
            model, pretrained, config, candidate, work, consume=consume, half=half
        )
        if candidate.optimizer == "host" and not host_has_room(device, away, peak, ram):
            continue
        plan = candidate.replace(peak=peak, budget=budget)
        if peak <= budget:
            break
    return plan


def _ladder(config: TuningConfig, device: torch.device, eight_bit: bool) -> Iterator[Plan]:
    """Yield plans, the fastest first."""
    away = device.type != "cpu"
    size, sizes = config.batch_size, []
    while size > 1:
        sizes.append(size)
        size = (size + 1) // 2
    kinds = ["fused"]
    if config.method == "full" and away:
        kinds += (["8bit"] if eight_bit else []) + ["host"]
    for kind in kinds:
        for park in (False, True) if away else (False,):
            for small in [size for size in sizes if size >= 4] or [config.batch_size]:
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
