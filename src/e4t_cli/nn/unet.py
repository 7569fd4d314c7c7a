"""What the denoiser's own encoder sees in z_t: the iterative refinement of section 3.1.

The U-Net is run in three pieces whose composition is `unet(z_t, t, text)` bit for bit:

    stem          conv_in and the leading blocks that never look at the text
    encoder_half  the remaining down blocks and the mid block     ─> pooled features of each block
    decoder_half  the up blocks and conv_out                      ─> the predicted noise

The feature pass of the encoder reads the prompt "", and so does the unconditional branch of
classifier-free guidance: one `encoder_half` serves both, and one `stem` serves every prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, eq=False)
class UNetState:
    """A U-Net forward, stopped somewhere on its way down or at the bottom.

    Args:
        hidden: the current feature map (batch, channels, height, width).
        skips: the outputs kept for the way up.
        time: the embedding of t (batch, time_width).
        blocks_done: down blocks already run.
    """

    hidden: Tensor
    skips: tuple[Tensor, ...]
    time: Tensor
    blocks_done: int

    @classmethod
    def cat(cls, states: Sequence[Self]) -> Self:
        """Stack states of the same stage along the batch."""
        return cls(
            hidden=torch.cat([state.hidden for state in states]),
            skips=tuple(
                torch.cat(same) for same in zip(*(state.skips for state in states), strict=True)
            ),
            time=torch.cat([state.time for state in states]),
            blocks_done=states[0].blocks_done,
        )


def embed_latents(unet: nn.Module, z_t: Tensor, t: Tensor) -> UNetState:
    """Run what does not depend on the text.

    Args:
        unet: a diffusers UNet2DConditionModel of Stable Diffusion's shape (see `check_unet`).
        z_t: noisy latents (batch, channels, height, width).
        t: time steps, a scalar or (batch,).
    """
    if unet.config.center_input_sample:
        z_t = 2 * z_t - 1.0
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


def down_and_mid(unet: nn.Module, state: UNetState, text: Tensor) -> UNetState:
    """Run the rest of the way down and the mid block, from a `stem`.

    Args:
        text: text encoder output (batch, tokens, width).
    """
    hidden, skips = state.hidden, state.skips
    for block in unet.down_blocks[state.blocks_done :]:
        if _reads_text(block):
            hidden, outputs = block(
                hidden_states=hidden, temb=state.time, encoder_hidden_states=text
            )
        else:
            hidden, outputs = block(hidden_states=hidden, temb=state.time)
        skips += outputs
    if unet.mid_block is not None:
        if _reads_text(unet.mid_block):
            hidden = unet.mid_block(hidden, state.time, encoder_hidden_states=text)
        else:
            hidden = unet.mid_block(hidden, state.time)
    return UNetState(hidden=hidden, skips=skips, time=state.time, blocks_done=len(unet.down_blocks))


def up_and_out(unet: nn.Module, state: UNetState, text: Tensor) -> Tensor:
    """Run the way up, from an `encoder_half`; returns the prediction, shaped like z_t."""
    hidden, skips = state.hidden, state.skips
    whole_pixels = 2**unet.num_upsamplers
    sized = any(side % whole_pixels for side in skips[0].shape[-2:])
    for index, block in enumerate(unet.up_blocks):
        count = len(block.resnets)
        outputs, skips = skips[-count:], skips[:-count]
        last = index == len(unet.up_blocks) - 1
        size = skips[-1].shape[2:] if sized and not last else None
        if _reads_text(block):
            hidden = block(
                hidden_states=hidden,
                temb=state.time,
                res_hidden_states_tuple=outputs,
                encoder_hidden_states=text,
                upsample_size=size,
            )
        else:
            hidden = block(
                hidden_states=hidden,
                temb=state.time,
                res_hidden_states_tuple=outputs,
                upsample_size=size,
            )
    if unet.conv_norm_out is not None:
        hidden = unet.conv_act(unet.conv_norm_out(hidden))
    return unet.conv_out(hidden)


def pooled_features(state: UNetState) -> Tensor:
    """Return the spatial means of every block's output, side by side: (batch, sum of widths).

    Paper silent: a "block" is every output that the encoder half keeps for the way up, and the
    mid block; 13 vectors and 10,880 numbers on Stable Diffusion 1.x.
    """
    maps = (*state.skips, state.hidden)
    return torch.cat([feature_map.mean(dim=(2, 3)) for feature_map in maps], dim=1)


def feature_widths(unet: nn.Module) -> tuple[int, ...]:
    """Return the width of each vector in `pooled_features`."""
    widths = [unet.conv_in.out_channels]
    for block in unet.down_blocks:
        widths += [resnet.out_channels for resnet in block.resnets]
        widths += [sampler.out_channels for sampler in block.downsamplers or ()]
    bottom = unet.mid_block if unet.mid_block is not None else unet.down_blocks[-1]
    return (*widths, bottom.resnets[-1].out_channels)


def check_unet(unet: nn.Module) -> None:
    """Refuse a U-Net that needs more than latents, time and text.

    Raises:
        ValueError: it has a class, image, size or guidance input, as SDXL and others do.
    """
    for option in (
        "class_embed_type",
        "num_class_embeds",
        "addition_embed_type",
        "encoder_hid_dim_type",
        "time_cond_proj_dim",
    ):
        if unet.config.get(option) is not None:
            raise ValueError(f"its U-Net has an input that Stable Diffusion has not ({option})")
    if unet.config.in_channels != unet.config.out_channels:
        raise ValueError(
            f"its U-Net reads {unet.config.in_channels} channels and writes "
            f"{unet.config.out_channels}: inpainting models are not supported"
        )


def _reads_text(block: nn.Module) -> bool:
    return bool(getattr(block, "has_cross_attention", False))
