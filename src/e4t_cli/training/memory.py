"""Predicts the memory of a tuning from the sizes of its modules, and plans how to fit into it.

The coefficients were counted on the full-size modules on torch's meta device, by summing what autograd keeps
(`test_memory_invariants.py` counts again). With S = Σ pixels · channels over the residual blocks of a pass and A = the
same over its attention blocks, a pass of one sample keeps 12 S + 27 A values, through LoRA adapters 10 S + 23 A, and
3.4 (S + A) under gradient checkpointing beside one block at a time. A weight in training takes 16 bytes (itself, its
gradient, two moments), 10 with an 8-bit optimizer, and 2 on the device with a CPU-offloaded one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from e4t_cli.devices import budget_of, free_memory_bytes
from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.adapters import attention_layers
from e4t_cli.nn.weight_offsets import projection_shapes
from e4t_cli.registry.config import TuningConfig
from e4t_cli.system_memory import GB, free_ram


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a tuning fits into memory; every plan gives the same gradient."""

    micro_batch: int  # samples per backward pass
    checkpointing: bool = False  # recompute activations instead of keeping them, a third more work
    optimizer: str = "fused"  # on the device, "8bit" there, or "cpu" in main memory
    vae_on_cpu: bool = False  # move the VAE to main memory while tuning
    peak: int = 0  # bytes that this is predicted to take; 0 for a plan without a prediction
    budget: int = 0  # bytes there are

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some entries changed."""
        return replace(self, **changes)

    def summary(self) -> str:
        """Describe the plan in one line."""
        parts = {
            f"{self.micro_batch} at a time": True,
            "gradient checkpointing": self.checkpointing,
            "8-bit optimizer": self.optimizer == "8bit",
            "optimizer in main memory": self.optimizer == "cpu",
            "VAE in main memory meanwhile": self.vae_on_cpu,
        }
        shown = ", ".join(part for part, applies in parts.items() if applies)
        return f"memory: {self.peak / GB:.1f} GB predicted of {self.budget / GB:.1f} GB; {shown}"


FULL, LORA, CHECKPOINTED = (12.0, 27.0), (10.0, 23.0), (3.4, 3.4)  # values that autograd keeps for each of S and A
ONE_BLOCK = 40.0  # values of the largest attention block while it is recomputed
OVERHEAD = {"cpu": 900 << 20, "cuda": 700 << 20}  # libraries, kernels and the allocator's needs
USABLE = 0.92  # share of a memory that one process can have: fragments and other programs take the rest
CPU_BYTES = 16  # main memory of a CPU-offloaded optimizer for a weight: itself, its gradient, two moments


@dataclass(frozen=True, kw_only=True)
class ActivationSizes:
    """S and A of one sample, for the whole U-Net and for its down blocks with the mid block."""

    whole: tuple[int, int]
    down: tuple[int, int]
    largest: int  # pixels · channels of the largest attention block
    matrix: int  # values of its attention matrix

    @classmethod
    def of(cls, unet: UNet2DConditionModel, side: int) -> Self:
        """Count a U-Net on latents of side × side."""
        residual = attention = largest = matrix = 0
        pixels = side * side

        def visit(block: Any) -> None:
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
    model: TextToImageModel, pretrained: DomainWeights, config: TuningConfig, plan: Plan, sizes: ActivationSizes,
    *, consume: bool = False, half: torch.dtype | None = None,
) -> int:  # fmt: skip
    """Return the bytes on the device at the worst moment of a tuning, by arithmetic alone."""
    unet, base = parameter_count(model.unet), model.dtype.itemsize
    encoder, on_cpu = parameter_count(pretrained.encoder), model.device.type == "cpu"
    full, value = config.method == "full", 2 if half else 4
    frozen = parameter_count(model.text_encoder) * base
    frozen += 0 if plan.vae_on_cpu else parameter_count(model.vae) * base
    frozen += encoder * 4 if on_cpu else 0  # the domain's, of which tuning trains a copy
    if full:
        rounded = plan.optimizer == "cpu" and half == torch.bfloat16
        each = {"fused": 16, "8bit": 10, "cpu": 2 if rounded else 4}[plan.optimizer]
        state = (unet + encoder) * each + (0 if consume else unet * base)
        # At the end of a tuning with a CPU-offloaded optimizer all weights return in float32.
        state = max(state, (unet + encoder) * 4)
        if half and not rounded and not plan.checkpointing:
            state += unet * 2  # half-precision copies of the weights
        if not rounded and not plan.checkpointing:
            # One matrix of all projections of a shape, see `nn.fused_projections`.
            state += 4 * sum(rows * columns for rows, columns in projection_shapes(model.unet).values())
        # A weight that is used twice has two new gradients for a moment, beside the one they are added to; the largest
        # of e4t-diffusion's encoder has 211 M values.
        state += 2 * 4 * max((weight.numel() for weight in pretrained.encoder.parameters()), default=0)
    else:
        adapted = sum(layer.weight.numel() for layer in attention_layers(model.unet).values())
        state = (unet + adapted) * base + encoder * 8
        state += 16 * config.lora_rank * 4 * int(adapted**0.5)
        if not half and base < 4:
            state += unet * 4  # without half precision a copy is tuned, in float32
    coefficients = CHECKPOINTED if plan.checkpointing else FULL if full else LORA
    passes = [sizes.whole, *([sizes.down] if full else [])]  # LoRA detaches the feature pass
    activations = sum(c * w for one in passes for c, w in zip(coefficients, one, strict=True))
    if plan.checkpointing:
        activations += ONE_BLOCK * sizes.largest
    if half and on_cpu:  # there composed attention is the faster one in bfloat16, and keeps its matrices
        activations += 3 * sizes.matrix * (1 if plan.checkpointing else 5)
    overhead = OVERHEAD.get(model.device.type, OVERHEAD["cuda"])
    return int(frozen + state + activations * value * plan.micro_batch + overhead)


def parameter_count(module: Any) -> int:
    """Return the number of parameters of a module."""
    return sum(weight.numel() for weight in module.parameters())


def plan_tuning(
    model: TextToImageModel, pretrained: DomainWeights, config: TuningConfig, *, vram: str = "auto",
    consume: bool = False, half: torch.dtype | None = None, eight_bit: bool = False, ram: int | None = None,
) -> Plan:  # fmt: skip
    """Return the fastest way to tune that is predicted to fit, the smallest one where none is.

    Args:
        vram: "auto" for what is free on the device, or gigabytes.
        consume: the base's U-Net is tuned, without a copy.
        half: the dtype of matrix multiplications, if it is not float32.
        eight_bit: whether the 8-bit optimizer is available.
        ram: bytes of main memory that an optimizer may have; None for what is free.
    """
    device = model.device
    budget = int((free_memory_bytes(device) if vram == "auto" else budget_of(vram)) * USABLE)
    sizes = ActivationSizes.of(model.unet, model.latent_shape[1])
    offloaded = CPU_BYTES * (parameter_count(model.unet) + parameter_count(pretrained.encoder))
    ram = free_ram() if ram is None else ram
    plan = Plan(micro_batch=config.batch_size)
    for candidate in _candidates(config, device, eight_bit):
        peak = predicted_peak(model, pretrained, config, candidate, sizes, consume=consume, half=half)
        # Apple's GPUs have no memory of their own: what is offloaded stays where it was.
        room = ram - (peak if device.type == "mps" else 0)
        if candidate.optimizer == "cpu" and offloaded > room * USABLE:
            continue
        plan = candidate.replace(peak=peak, budget=budget)
        if peak <= budget:
            break
    return plan


def _candidates(config: TuningConfig, device: torch.device, eight_bit: bool) -> Iterator[Plan]:
    """Yield plans, the fastest first."""
    offloads = device.type != "cpu"
    size, sizes = config.batch_size, []
    while size > 1:
        sizes.append(size)
        size = (size + 1) // 2
    kinds = ["fused"]
    if config.method == "full" and offloads:
        kinds += (["8bit"] if eight_bit else []) + ["cpu"]
    for kind in kinds:
        for away in (False, True) if offloads else (False,):
            for small in [size for size in sizes if size >= 4] or [config.batch_size]:
                yield Plan(micro_batch=small, optimizer=kind, vae_on_cpu=away)
            for small in (*[size for size in sizes if size in (2, 3, 4)], 1):
                yield Plan(micro_batch=small, checkpointing=True, optimizer=kind, vae_on_cpu=away)


def can_offload(device: torch.device, weights: Iterable[Tensor]) -> bool:
    """Return whether main memory is separate from the device's, and has room for an optimizer."""
    needed = CPU_BYTES * sum(weight.numel() for weight in weights)
    return device.type not in ("cpu", "mps") and needed <= free_ram() * USABLE
