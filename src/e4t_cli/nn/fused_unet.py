"""The U-Net's forward pass for full fine-tuning, in three fifths of the operations that its modules start.

The three parts are those of `nn.unet`, equal up to rounding, on the same modules and weights:

    residual block     h + shift_i(t), with shift_i of all blocks from one matrix multiplication, for both passes
    transformer block  q, k, v from one matrix multiplication; k, v of the text from one for all blocks
    weights            see `nn.fused_projections`

`FusedUNet.fits` says whether a U-Net has Stable Diffusion's plain blocks; others run module by module.
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
from e4t_cli.nn.precision import math_attention

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
        unet: a `UNet2DConditionModel` that `fits`, its offsets attached if it has any.
    """

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        down, up = list(unet.down_blocks), list(unet.up_blocks)
        plain = next((number for number, block in enumerate(down) if _transformers(block)), len(down))
        self.plain, self.read, self.up = down[:plain], [*down[plain:], unet.mid_block], up
        blocks = [*down, unet.mid_block, *up]
        self.residuals: list[Any] = [one for block in blocks for one in block.resnets]
        self.head = sum(len(block.resnets) for block in self.plain), sum(len(block.resnets) for block in self.read)
        self.transformers = [one for block in blocks for each in _transformers(block) for one in each.transformer_blocks]
        self.before_up = sum(len(each.transformer_blocks) for block in self.read for each in _transformers(block))
        joint = {id(weight) for one in self.residuals for weight in one.time_emb_proj.parameters()}
        for one in self.transformers:
            for layer in (one.attn1.to_q, one.attn1.to_k, one.attn1.to_v, one.attn2.to_q, one.attn2.to_k, one.attn2.to_v):
                joint |= {id(weight) for weight in layer.parameters()}
        # (weight, whether a matrix multiplication reads it) of each block; passes that read them.
        self.groups = [
            ([*_weights(block, joint)], 2 if block in self.read else 1) for block in blocks
        ]

    @staticmethod
    def fits(unet: Any) -> bool:
        """Return whether a U-Net consists of the plain blocks of Stable Diffusion 1 and 2."""
        blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
        kinds = {"DownBlock2D", "CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D", "CrossAttnUpBlock2D"}
        return all(
            type(block).__name__ in kinds
            and not getattr(block, "b1", None)  # FreeU
            and all(map(_plain_residual, block.resnets))
            and all(map(_plain_transformer, _transformers(block)))
            and all(_plain_sampler(one) for kind in ("down", "up") for one in getattr(block, f"{kind}samplers", None) or ())
            for block in blocks
        )  # fmt: skip

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run `nn.unet`'s functions on this U-Net in few operations inside a `with` block, in this thread.

        Weights are evaluated once, so they must not change inside. Not under gradient checkpointing, where the backward
        pass has to recompute what the forward pass computed.
        """
        token = _STEP.set((self, []))
        # The text encoder's attention, too; on a CPU `half_precision` decides.
        fused = self.unet.device.type in (*FUSED_ATTENTION, "cpu")
        try:
            with nullcontext() if fused else math_attention():
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
            wide = joint_weights([layer for own, text in attentions for layer in (own.to_q, own.to_k, own.to_v, text.to_q)])
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
            transformers = iter(_transformers(block))
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
        transformers = iter(_transformers(block))
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


def _transformers(block: Any) -> Sequence[Any]:
    return getattr(block, "attentions", None) or ()


def _width(block: Any) -> int:
    """Return the number of channels of a transformer block."""
    return int(block.attn1.to_q.out_features)


def _weights(block: Any, without: set[int]) -> Iterator[tuple[Tensor, bool]]:
    for module in block.modules():
        for weight in module.parameters(recurse=False):
            if id(weight) not in without:
                yield weight, isinstance(module, nn.Linear | nn.Conv2d)


def _plain_residual(block: Any) -> bool:
    plain = type(block).__name__ == "ResnetBlock2D" and block.time_embedding_norm == "default"
    plain = plain and block.time_emb_proj is not None and not block.skip_time_act and not (block.up or block.down)
    return plain and isinstance(block.nonlinearity, nn.SiLU) and block.output_scale_factor == 1


def _plain_sampler(module: Any) -> bool:
    plain = type(module).__name__ in ("Downsample2D", "Upsample2D") and module.norm is None and module.use_conv
    return plain and module.conv.padding == (1, 1) and not getattr(module, "use_conv_transpose", False)


def _plain_transformer(module: Any) -> bool:
    return type(module).__name__ == "Transformer2DModel" and module.is_input_continuous and all(
        type(block).__name__ == "BasicTransformerBlock" and block.norm_type == "layer_norm"
        and block.pos_embed is None and not block.only_cross_attention and block._chunk_size is None
        and type(block.ff.net[0]).__name__ == "GEGLU" and block.attn2 is not None
        and all(
            attn.norm_q is None and attn.norm_k is None and attn.group_norm is None and not attn.norm_cross
            and attn.spatial_norm is None and not attn.residual_connection and attn.rescale_output_factor == 1
            and attn.to_q.bias is None and attn.to_k.bias is None and attn.to_v.bias is None
            and attn.to_q.out_features == attn.to_k.out_features == attn.to_v.out_features == module.inner_dim
            for attn in (block.attn1, block.attn2)
        )
        for block in module.transformer_blocks
    )  # fmt: skip
