"""What a tuning takes at its worst moment: arithmetic on the sizes of its modules.

The figures were counted on the exact modules on torch's meta device, by summing what autograd
keeps (`tests/laws/test_memory_laws.py` counts again). With S = Σ pixels · channels over the
residual blocks of a pass and A = the same over its attention blocks, a pass of one sample keeps
12 S + 27 A numbers, through adapters 10 S + 23 A, and 3.4 (S + A) under gradient checkpointing
beside one block at a time. A weight in training takes 16 bytes (itself, its gradient, two
moments), 10 with an 8-bit optimiser, and 2 on the device with an optimiser in the host's memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from e4t_cli.base_model import TextToImageModel
from e4t_cli.nn.branching import attention_layers
from e4t_cli.pretrained import PretrainedDomain
from e4t_cli.recipes import TuningRecipe

from .plan import Plan

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
    pretrained: PretrainedDomain,
    recipe: TuningRecipe,
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
    exact = recipe.method == "exact"
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
        rank = recipe.adapter_rank
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
