"""Copies of a U-Net that share what they do not change, and which layers adapters change."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .low_rank import LowRankAdapters
from .weight_offsets import Factors

ADAPTED = (".to_q", ".to_k", ".to_v", ".to_out.0")
"""The adapted layers of an attention block, as the ends of their paths."""


def attention_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    """Return path -> layer of W_q, W_k, W_v and W_o in every attention block."""
    return {
        path: layer
        for path, layer in unet.named_modules()
        if isinstance(layer, nn.Linear) and path.endswith(ADAPTED)
    }


def adapted_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    """Return the attention layers but the very first W_q, W_k, W_v on the way down.

    The gradient of those three would have to cross the largest attention matrix of all, which
    nothing else needs: 2 % of a step for 3 of 128 layers. They keep their offsets.
    """
    layers = attention_layers(unet)
    first = next(iter(layers), "").rpartition(".")[0]
    if not first.endswith(".attn1"):
        return layers
    return {
        path: layer
        for path, layer in layers.items()
        if path not in (f"{first}.to_q", f"{first}.to_k", f"{first}.to_v")
    }


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Return path -> layer of every linear layer."""
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, nn.Linear)}


@torch.no_grad()
def branch(
    unet: nn.Module, offsets: Mapping[str, Factors], *, dtype: torch.dtype | None = None
) -> nn.Module:
    """Return a copy of `unet` that shares all of its weights but those of its attention layers.

    Args:
        unet: stays as it is, and must: its weights are the copy's too.
        offsets: path -> factors of ΔW, merged into the copy's own weights in float32.
        dtype: of the own weights; that of the original by default.
    """
    own = {id(layer.weight) for layer in attention_layers(unet).values()}
    tensors = [*unet.parameters(), *unet.buffers()]
    # What deepcopy is told it has copied already, it takes as the copy.
    twin = copy.deepcopy(unet, {id(value): value for value in tensors if id(value) not in own})
    for path, layer in attention_layers(twin).items():
        weight = layer.weight.float()
        if path in offsets:
            left, right = (factor.to(weight.device).float() for factor in offsets[path])
            weight = weight * (1 + left @ right)
        layer.weight = nn.Parameter(weight.to(dtype or layer.weight.dtype), requires_grad=False)
    return twin


@torch.no_grad()
def frozen_branch(
    unet: nn.Module, offsets: Mapping[str, Factors], half: torch.dtype | None
) -> nn.Module:
    """Return a `branch` to train something on, its own weights staying as they are.

    In the base's own precision where products are made in half precision anyway, which casts
    nothing twice; else in float32, since unscaled gradients in float16 vanish.

    Args:
        half: the format of the products, None for float32.
    """
    twin = branch(unet, offsets)
    if half is None:
        _convert(twin, torch.float32)
    return twin


@torch.no_grad()
def merge_adapters(
    unet: nn.Module,
    offsets: Mapping[str, Factors],
    encoder: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
) -> tuple[nn.Module, nn.Module]:
    """Return a U-Net and an encoder with stored adapters merged, in float32 before any rounding.

    Args:
        unet: the base's; the result shares what was neither adapted nor is of another dtype.
        offsets: path -> factors of ΔW.
        encoder: of the pack; it is copied.
        tensors: "unet." and "encoder." before the keys of `LowRankAdapters.tensors`.
        dtype: of the U-Net; that of `unet` by default.

    Raises:
        ValueError: an adapter does not fit.
    """
    parts: dict[str, dict[str, Tensor]] = {"unet": {}, "encoder": {}}
    for key, value in tensors.items():
        name, _, rest = key.partition(".")
        if name not in parts:
            raise ValueError(f"{name!r} has no adapters")
        parts[name][rest] = value
    device = next(unet.parameters()).device
    twin = branch(unet, offsets, dtype=torch.float32)
    LowRankAdapters.from_tensors(parts["unet"]).to(device).merge_into(twin)
    _convert(twin, dtype or next(unet.parameters()).dtype)
    encoder = copy.deepcopy(encoder).to(device)
    LowRankAdapters.from_tensors(parts["encoder"]).to(device).merge_into(encoder)
    return twin, encoder.requires_grad_(False)


def _convert(module: nn.Module, dtype: torch.dtype) -> None:
    """Make every weight one of `dtype`, replacing those that are not: others share them."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            if weight.dtype != dtype:
                setattr(part, name, nn.Parameter(weight.to(dtype), requires_grad=False))
