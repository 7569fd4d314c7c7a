"""The U-Net's forward pass in three parts, and the features of z_t for section 3.1's refinement.

Their composition is `unet(z_t, t, text)` bit for bit:

    embed_latents   conv_in and the leading blocks without cross-attention
    down_and_mid    the remaining down blocks and the mid block    ─> pooled features of each block
    up_and_out      the up blocks and conv_out                     ─> the predicted noise

The encoder's feature pass reads the prompt "", as the unconditional pass of classifier-free
guidance does: one `down_and_mid` computes both, and one `embed_latents` serves every prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self, cast

import torch
from torch import Tensor, nn

from e4t_cli.nn.fused_unet import fused_step

if TYPE_CHECKING:
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel


# Options of diffusers for inputs that Stable Diffusion's U-Net does not have.
OTHER_INPUTS = (
    *("class_embed_type", "num_class_embeds", "addition_embed_type"),
    *("encoder_hid_dim_type", "time_cond_proj_dim"),
)


class _Block(Protocol):
    """What every down, mid and up block of diffusers has; the U-Net's lists hold plain modules."""

    resnets: Sequence[ResnetBlock2D]


@dataclass(frozen=True, kw_only=True, eq=False)
class UNetState:
    """A U-Net's forward pass, stopped after some of the down blocks or the mid block."""

    hidden: Tensor  # the current feature map (batch, channels, height, width)
    skips: tuple[Tensor, ...]  # the outputs kept for the up blocks
    time: Tensor  # the embedding of t (batch, time_width); in a fused step what the residual blocks make of it
    blocks_done: int  # down blocks already run

    @classmethod
    def cat(cls, states: Sequence[Self]) -> Self:
        """Concatenate states of the same stage along the batch."""
        skips = zip(*(state.skips for state in states), strict=True)
        return cls(
            hidden=torch.cat([state.hidden for state in states]),
            skips=tuple(torch.cat(same) for same in skips),
            time=torch.cat([state.time for state in states]),
            blocks_done=states[0].blocks_done,
        )


def embed_latents(unet: UNet2DConditionModel, z_t: Tensor, t: Tensor) -> UNetState:
    """Run what does not depend on the text.

    Args:
        unet: of Stable Diffusion's architecture (see `check_unet`).
        z_t: noisy latents (batch, channels, height, width).
        t: time steps, a scalar or (batch,).
    """
    if unet.config["center_input_sample"]:
        z_t = 2 * z_t - 1.0
    if (fused := fused_step(unet)) is not None:
        hidden, kept, time = fused.embed(z_t, t)
        return UNetState(hidden=hidden, skips=kept, time=time, blocks_done=len(fused.fused.plain))
    time = unet.time_embedding(unet.get_time_embed(sample=z_t, timestep=t), None)
    if unet.time_embed_act is not None:
        time = unet.time_embed_act(time)
    hidden = unet.conv_in(z_t)
    skips: tuple[Tensor, ...] = (hidden,)
    done = 0
    for block in unet.down_blocks:
        if _reads_text(block):
            break
        hidden, outputs = block(hidden_states=hidden, temb=time)
        skips += outputs
        done += 1
    return UNetState(hidden=hidden, skips=skips, time=time, blocks_done=done)


def down_and_mid(unet: UNet2DConditionModel, state: UNetState, text: Tensor) -> UNetState:
    """Run the remaining down blocks and the mid block on the text encoder's output (batch, tokens, width)."""
    hidden, skips, time = state.hidden, state.skips, state.time
    if (fused := fused_step(unet)) is not None:
        hidden, skips = fused.down_and_mid(hidden, skips, time, text)
        return UNetState(hidden=hidden, skips=skips, time=time, blocks_done=len(unet.down_blocks))
    for block in list(unet.down_blocks)[state.blocks_done :]:
        hidden, outputs = block(hidden_states=hidden, temb=time, **_text(block, text))
        skips += outputs
    if (middle := unet.mid_block) is not None:
        hidden = middle(hidden, time, **_text(middle, text))
    return UNetState(hidden=hidden, skips=skips, time=time, blocks_done=len(unet.down_blocks))


def up_and_out(unet: UNet2DConditionModel, state: UNetState, text: Tensor) -> Tensor:
    """Run the up blocks, after `down_and_mid`; returns the prediction, shaped like z_t."""
    hidden, skips = state.hidden, state.skips
    scale: int = 2**unet.num_upsamplers
    sized = any(side % scale for side in skips[0].shape[-2:])
    if (fused := fused_step(unet)) is not None:
        hidden = fused.up(hidden, skips, state.time, text, sized=sized)
    for block in unet.up_blocks if fused is None else ():
        count = len(cast(_Block, block).resnets)
        outputs, skips = skips[-count:], skips[:-count]
        hidden = block(
            hidden_states=hidden,
            temb=state.time,
            res_hidden_states_tuple=outputs,
            upsample_size=skips[-1].shape[2:] if sized and skips else None,
            **_text(block, text),
        )
    if unet.conv_norm_out is not None:
        hidden = unet.conv_act(unet.conv_norm_out(hidden))
    prediction: Tensor = unet.conv_out(hidden)
    return prediction


def pooled_features(state: UNetState) -> Tensor:
    """Return the spatial mean of every block's output, concatenated: (batch, sum of widths).

    Paper silent: a "block" is every output kept for the up blocks, and the mid block: 13 vectors,
    10,880 values on Stable Diffusion 1.x.
    """
    maps = (*state.skips, state.hidden)
    return torch.cat([feature_map.mean(dim=(2, 3)) for feature_map in maps], dim=1)


def feature_widths(unet: UNet2DConditionModel) -> tuple[int, ...]:
    """Return the width of each vector in `pooled_features`."""
    widths = [unet.conv_in.out_channels]
    for block in unet.down_blocks:
        widths += [resnet.out_channels for resnet in cast(_Block, block).resnets]
        widths += [layer.out_channels for layer in getattr(block, "downsamplers", None) or ()]
    bottom = unet.mid_block if unet.mid_block is not None else unet.down_blocks[-1]
    return (*widths, cast(_Block, bottom).resnets[-1].out_channels)


def check_unet(unet: UNet2DConditionModel) -> None:
    """Refuse a U-Net that needs more than latents, time and text.

    Raises:
        ValueError: it has a class, image, size or guidance input, as SDXL and others do.
    """
    for option in OTHER_INPUTS:
        if unet.config.get(option) is not None:
            raise ValueError(f"its U-Net has an input that Stable Diffusion has not ({option})")
    read, written = unet.config["in_channels"], unet.config["out_channels"]
    if read != written:
        raise ValueError(f"its U-Net reads {read} channels and writes {written}: inpainting models are not supported")


def _reads_text(block: nn.Module) -> bool:
    return bool(getattr(block, "has_cross_attention", False))


def _text(block: nn.Module, text: Tensor) -> dict[str, Tensor]:
    return {"encoder_hidden_states": text} if _reads_text(block) else {}
