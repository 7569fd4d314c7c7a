"""The U-Net's forward pass for full fine-tuning, in three fifths of the operations that its modules start.

The three parts are those of `nn.unet`, equal up to rounding, on the same modules and weights:

    residual block     h + shift_i(t), with shift_i of all blocks from one matrix multiplication, for both passes
    transformer block  q, k, v from one matrix multiplication; k, v of the text from one for all blocks
    weights            see `nn.fused_projections`

U-Nets with other blocks than Stable Diffusion's run module by module, see `nn.unet_blocks`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from e4t_cli.nn.fused_projections import attention, joint_weights, shared_weights
from e4t_cli.nn.precision import training_attention
from e4t_cli.nn.unet_blocks import transformers_of

FUSED_ATTENTION = ("cuda", "mps")  # devices with a kernel for it that is fast in both passes
_STEP: ContextVar[tuple[FusedUNet, list[FusedStep]] | None] = ContextVar("fused step", default=None)


def fused_step(unet: nn.Module) -> FusedStep | None:
    """Return the step of the enclosing `FusedUNet.step()` if it is this U-Net's, with its weights evaluated."""
    found = _STEP.get()
    if found is None or found[0].unet is not unet:
        return None
    fused, steps = found
    if not steps:  # here, not on entry: the dtype of matrix multiplications is known now
        steps.append(FusedStep(fused))
    return steps[0]


class FusedUNet:
    """The modules of a U-Net in the order in which they run.

    Args:
        unet: a `UNet2DConditionModel` that `has_plain_blocks`, its offsets attached if it has any.
    """

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        down, up = list(unet.down_blocks), list(unet.up_blocks)
        plain = next((number for number, block in enumerate(down) if transformers_of(block)), len(down))
        self.plain, self.read, self.up = down[:plain], [*down[plain:], unet.mid_block], up
        blocks = [*down, unet.mid_block, *up]
        self.residuals: list[Any] = [one for block in blocks for one in block.resnets]
        self.head = sum(len(block.resnets) for block in self.plain), sum(len(block.resnets) for block in self.read)
        self.transformers = [
            one for block in blocks for each in transformers_of(block) for one in each.transformer_blocks
        ]
        self.before_up = sum(len(each.transformer_blocks) for block in self.read for each in transformers_of(block))
        joint = {id(weight) for one in self.residuals for weight in one.time_emb_proj.parameters()}
        for one in self.transformers:
            for layer in (
                one.attn1.to_q,
                one.attn1.to_k,
                one.attn1.to_v,
                one.attn2.to_q,
                one.attn2.to_k,
                one.attn2.to_v,
            ):
                joint |= {id(weight) for weight in layer.parameters()}
        # (weight, whether a matrix multiplication reads it) of each block; passes that read them.
        self.groups = [([*_weights(block, joint)], 2 if block in self.read else 1) for block in blocks]

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run `nn.unet`'s functions on this U-Net in few operations inside a `with` block, in this thread.

        Weights are evaluated once, so they must not change inside. Not under gradient checkpointing, where backward
        has to recompute what forward computed.
        """
        token = _STEP.set((self, []))
        # The text encoder's attention, too; on a CPU `half_precision` decides.
        fused = self.unet.device.type in (*FUSED_ATTENTION, "cpu")
        try:
            with nullcontext() if fused else training_attention():
                yield
        finally:
            _STEP.reset(token)


class FusedStep:
    """The weights of one forward pass with its feature pass, and that forward pass."""

    def __init__(self, fused: FusedUNet) -> None:
        self.fused, self.passes = fused, 0
        device = fused.unet.device
        autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
        half = torch.get_autocast_dtype(device.type) if autocast else None
        # Where no fused kernel is, and where it is slow (see `half_precision`).
        self.composed = device.type not in FUSED_ATTENTION and (device.type != "cpu" or half is not None)
        self.tables: list[dict[int, Tensor]] = [{}, {}]  # id of a weight -> what the first and the second pass use
        for weights, uses in fused.groups:
            dtypes = [half if half and multiplied else weight.dtype for weight, multiplied in weights]
            made = shared_weights([weight for weight, _ in weights], dtypes, uses)
            for use in (0, 1):
                self.tables[use] |= zip((id(weight) for weight, _ in weights), made[min(use, uses - 1)], strict=True)
        self.weights = self.tables[0]
        layers = [one.time_emb_proj for one in fused.residuals]
        time = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
        self.time_weight, self.time_bias = shared_weights(time, [half or one.dtype for one in time], 1)[0]
        self._project(half)

    def _project(self, half: torch.dtype | None) -> None:
        """Evaluate the projections of all transformer blocks."""
        pieces: list[Tensor] = []
        keys: list[tuple[int, str]] = []  # (id of a block, what the piece projects)
        for width, found in groupby(sorted(self.fused.transformers, key=_width), key=_width):
            same = list(found)
            attentions = [(one.attn1, one.attn2) for one in same]
            wide = joint_weights(
                [layer for own, text in attentions for layer in (own.to_q, own.to_k, own.to_v, text.to_q)]
            )
            deep = joint_weights([layer for _, text in attentions for layer in (text.to_k, text.to_v)])
            pieces += torch.split(wide.flatten(0, 1), [3 * width, width] * len(same))
            keys += [(id(one), kind) for one in same for kind in ("self", "query")]
            pieces += torch.split(deep.flatten(0, 1), 2 * width)
            keys += [(id(one), "text") for one in same]
        made = shared_weights(pieces, [half or piece.dtype for piece in pieces], 2)
        self.projections = [dict(zip(keys, use, strict=True)) for use in made]
        blocks = self.fused.transformers
        self.of_text = blocks[: self.fused.before_up], blocks[self.fused.before_up :]
        before, after = ([self.projections[0][id(block), "text"] for block in part] for part in self.of_text)
        self.text_weights = torch.cat(before), torch.cat(after)

    def embed(self, z_t: Tensor, t: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """See `unet.embed_latents`: the feature map, the skips, and shift_i of all residual blocks side by side."""
        unet = self.fused.unet
        time = unet.time_embedding(unet.get_time_embed(sample=z_t, timestep=t), None)
        if unet.time_embed_act is not None:
            time = unet.time_embed_act(time)
        time = functional.linear(functional.silu(time), self.time_weight, self.time_bias)
        hidden = unet.conv_in(z_t)
        skips: list[Tensor] = [hidden]
        shifts = iter(self._shifts(time, 0, self.fused.head[0]))
        for block in self.fused.plain:
            hidden = self._down(block, hidden, shifts, {}, skips)
        return hidden, tuple(skips), time

    def down_and_mid(
        self, hidden: Tensor, skips: tuple[Tensor, ...], time: Tensor, text: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `unet.down_and_mid`: the feature map and the skips."""
        self.weights, self.projection = self.tables[min(self.passes, 1)], self.projections[min(self.passes, 1)]
        self.passes += 1
        projected = self._projected(text, 0)
        start, count = self.fused.head
        shifts, kept = iter(self._shifts(time, start, count)), list(skips)
        *blocks, middle = self.fused.read
        for block in blocks:
            hidden = self._down(block, hidden, shifts, projected, kept)
        hidden = self._residual(middle.resnets[0], hidden, next(shifts))
        for transformer, residual in zip(middle.attentions, middle.resnets[1:], strict=True):
            hidden = self._residual(residual, self._transformer(transformer, hidden, projected), next(shifts))
        return hidden, tuple(kept)

    def up(self, hidden: Tensor, skips: tuple[Tensor, ...], time: Tensor, text: Tensor, *, sized: bool) -> Tensor:
        """See `unet.up_and_out`, without the last layers."""
        start = sum(self.fused.head)
        shifts = iter(self._shifts(time, start, len(self.fused.residuals) - start))
        projected, left = self._projected(text, 1), list(skips)
        for block in self.fused.up:
            transformers = iter(transformers_of(block))
            for residual in block.resnets:
                hidden = self._residual(residual, torch.cat((hidden, left.pop()), dim=1), next(shifts))
                if (transformer := next(transformers, None)) is not None:
                    hidden = self._transformer(transformer, hidden, projected)
            for sampler in block.upsamplers or ():
                size = left[-1].shape[2:] if sized and left else None
                hidden = functional.interpolate(hidden, size=size, scale_factor=None if size else 2.0, mode="nearest")
                hidden = self._conv(sampler.conv, hidden)
        return hidden

    def _down(
        self, block: Any, hidden: Tensor, shifts: Iterator[Tensor], projected: dict[int, Tensor], skips: list[Tensor]
    ) -> Tensor:
        transformers = iter(transformers_of(block))
        for residual in block.resnets:
            hidden = self._residual(residual, hidden, next(shifts))
            if (transformer := next(transformers, None)) is not None:
                hidden = self._transformer(transformer, hidden, projected)
            skips.append(hidden)
        for sampler in block.downsamplers or ():
            hidden = self._conv(sampler.conv, hidden)
            skips.append(hidden)
        return hidden

    def _residual(self, block: Any, x: Tensor, shift: Tensor) -> Tensor:
        hidden = self._conv(block.conv1, functional.silu(self._group_norm(block.norm1, x))) + shift[:, :, None, None]
        hidden = self._conv(block.conv2, functional.silu(self._group_norm(block.norm2, hidden)))
        return (x if block.conv_shortcut is None else self._conv(block.conv_shortcut, x)) + hidden

    def _transformer(self, module: Any, x: Tensor, projected: dict[int, Tensor]) -> Tensor:
        batch, channels, height, width = x.shape
        hidden = self._group_norm(module.norm, x)
        # As a convolution one operation in the backward pass, as a matrix multiplication three, but faster on a CPU.
        convolves = isinstance(module.proj_in, nn.Conv2d) and x.device.type != "cpu"
        if convolves:
            hidden = self._conv(module.proj_in, hidden)
        hidden = hidden.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        if not convolves:
            hidden = self._linear(module.proj_in, hidden)
        for block in module.transformer_blocks:
            normed = self._layer_norm(block.norm1, hidden)
            qkv = functional.linear(normed, self.projection[id(block), "self"])
            found = attention(qkv, heads=block.attn1.heads, composed=self.composed)
            hidden = self._linear(block.attn1.to_out[0], found) + hidden
            query = functional.linear(self._layer_norm(block.norm2, hidden), self.projection[id(block), "query"])
            found = attention(query, projected[id(block)], heads=block.attn2.heads, composed=self.composed)
            hidden = self._linear(block.attn2.to_out[0], found) + hidden
            wide, last = block.ff.net[0].proj, block.ff.net[2]
            value, gate = self._linear(wide, self._layer_norm(block.norm3, hidden)).chunk(2, dim=-1)
            hidden = self._linear(last, value * functional.gelu(gate)) + hidden
        if convolves:
            return x + self._conv(module.proj_out, hidden.view(batch, height, width, channels).permute(0, 3, 1, 2))
        return x + self._linear(module.proj_out, hidden).view(batch, height, width, channels).permute(0, 3, 1, 2)

    def _projected(self, text: Tensor, part: int) -> dict[int, Tensor]:
        """Return id of a block -> k, v of the text, (batch, tokens, 2 width); a batch of 1 for one text of all."""
        if text.stride(0) == 0:
            text = text[:1]
        blocks = self.of_text[part]
        found = functional.linear(text, self.text_weights[part])
        parts = torch.split(found, [2 * _width(block) for block in blocks], dim=-1)
        return {id(block): one for block, one in zip(blocks, parts, strict=True)}

    def _shifts(self, time: Tensor, first: int, count: int) -> Sequence[Tensor]:
        widths = [one.out_channels for one in self.fused.residuals]
        sizes = [sum(widths[:first]), *widths[first : first + count], sum(widths[first + count :])]
        return torch.split(time, sizes, dim=1)[1:-1]

    def _conv(self, layer: Any, x: Tensor) -> Tensor:
        return functional.conv2d(x, *self._both(layer), layer.stride, layer.padding)

    def _linear(self, layer: Any, x: Tensor) -> Tensor:
        weight, bias = self._both(layer)
        return functional.linear(x, weight.flatten(1), bias)  # a 1 × 1 convolution is one, too

    def _group_norm(self, layer: Any, x: Tensor) -> Tensor:
        return functional.group_norm(x, layer.num_groups, *self._both(layer), layer.eps)

    def _layer_norm(self, layer: Any, x: Tensor) -> Tensor:
        return functional.layer_norm(x, layer.normalized_shape, *self._both(layer), layer.eps)

    def _both(self, layer: Any) -> tuple[Tensor, Tensor]:
        return self.weights[id(layer.weight)], self.weights[id(layer.bias)]


def _width(block: Any) -> int:
    """Return the number of channels of a transformer block."""
    return int(block.attn1.to_q.out_features)


def _weights(block: Any, without: set[int]) -> Iterator[tuple[Tensor, bool]]:
    for module in block.modules():
        for weight in module.parameters(recurse=False):
            if id(weight) not in without:
                yield weight, isinstance(module, nn.Linear | nn.Conv2d)
