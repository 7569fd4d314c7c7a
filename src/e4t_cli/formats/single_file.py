"""Stable Diffusion 1.x in one file, under the names of its first implementation.

model.diffusion_model.…      the U-Net
first_stage_model.…          the VAE
cond_stage_model.transformer.text_model.…   the text encoder
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from e4t_cli.errors import UsageError
from e4t_cli.formats.textual_inversion import check_pair, write_pair
from e4t_cli.models.denoiser import TunedModel
from e4t_cli.models.text_to_image import TextToImageModel

SHAPE = {
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "use_linear_projection": False,  # Stable Diffusion 2 has the same blocks otherwise
}
"""Of the one U-Net that such files can be of: they hold no configuration."""

Names = Sequence[tuple[str, str]]
"""Patterns of diffusers' names and what they are called here, the first match counts."""

RESIDUAL = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
ATTENTION = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip


def write_single_file(
    model: TextToImageModel,
    tuned: TunedModel,
    word: Tensor,
    path: Path,
    *,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a tuned model as one file, and its word beside it; both, or none.

    Args:
        model: the base that `tuned` was made from; it stays as it is.
        word: the embedding of the concept (embedding_width,).
        path: must not exist, nor what `word_path` says.
        dtype: of the stored weights.

    Raises:
        UsageError: a file exists, or the base is no Stable Diffusion 1.x.
        ResourceError: the disk has no room, or cannot be written to.
    """
    check_single_file(model, path)
    weights = dict(stable_diffusion_names(tuned.unet, model.vae, model.text_encoder))
    write_pair(path, weights, word, dtype=dtype)


def check_single_file(model: TextToImageModel, path: Path) -> None:
    """Refuse names that are taken, and a base that readers of such files would not know.

    Raises:
        UsageError: a file exists, or the base is no Stable Diffusion 1.x.
    """
    check_pair(path)
    config = model.unet.config
    for name, expected in SHAPE.items():
        found = config[name]
        if (tuple(found) if isinstance(found, list | tuple) else found) != expected:
            raise UsageError(
                f"one file can only hold Stable Diffusion 1.x, and {model.base.name} is another "
                "kind of model",
                hint="give a folder instead: it serves every base",
            )


def stable_diffusion_names(
    unet: nn.Module, vae: nn.Module, text_encoder: nn.Module
) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight under its name in the first implementation, in the shape it has there."""
    depth = unet.config.layers_per_block + 1
    names = _unet_names(len(unet.config.block_out_channels), depth)
    for key, value in unet.state_dict().items():
        yield f"model.diffusion_model.{_renamed(key, names, RESIDUAL)}", value
    names = _vae_names(len(vae.config.block_out_channels))
    for key, value in vae.state_dict().items():
        matrix = ".attentions." in key and value.dim() == 2
        # There, attention in the VAE is made of convolutions of one pixel.
        shaped = value[:, :, None, None] if matrix else value
        yield f"first_stage_model.{_renamed(key, names, {})}", shaped
    for key, value in text_encoder.state_dict().items():
        own = key.removeprefix("text_model.")  # transformers 4 has it, 5 has not
        yield f"cond_stage_model.transformer.text_model.{own}", value
    length = text_encoder.config.max_position_embeddings
    place = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    yield place, torch.arange(length)[None]


def _renamed(key: str, names: Names, inside: dict[str, str]) -> str:
    for pattern, name in names:
        if match := re.match(pattern, key):
            rest = key[match.end() :]
            if ".resnets." in match[0]:
                part, dot, last = rest.rpartition(".")
                rest = f"{inside.get(part, part)}{dot}{last}".replace(
                    "conv_shortcut", "nin_shortcut"
                )
            elif "mid_block.attentions" in match[0] and name.endswith("attn_1."):
                part, dot, last = rest.rpartition(".")
                rest = f"{ATTENTION[part]}{dot}{last}"
            return name + rest
    raise KeyError(key)


def _unet_names(blocks: int, depth: int) -> Names:
    """Return the names for a U-Net of so many blocks, `depth` - 1 layers each on the way down."""
    names = [
        (r"time_embedding\.linear_1\.", "time_embed.0."),
        (r"time_embedding\.linear_2\.", "time_embed.2."),
        (r"conv_in\.", "input_blocks.0.0."),
        (r"conv_norm_out\.", "out.0."),
        (r"conv_out\.", "out.2."),
        (r"mid_block\.resnets\.0\.", "middle_block.0."),
        (r"mid_block\.attentions\.0\.", "middle_block.1."),
        (r"mid_block\.resnets\.1\.", "middle_block.2."),
    ]
    for block in range(blocks):
        for layer in range(depth):
            down, up = block * depth + layer + 1, block * depth + layer
            names += [
                (rf"down_blocks\.{block}\.resnets\.{layer}\.", f"input_blocks.{down}.0."),
                (rf"down_blocks\.{block}\.attentions\.{layer}\.", f"input_blocks.{down}.1."),
                (rf"up_blocks\.{block}\.resnets\.{layer}\.", f"output_blocks.{up}.0."),
                (rf"up_blocks\.{block}\.attentions\.{layer}\.", f"output_blocks.{up}.1."),
            ]
        last = block * depth + depth
        # Behind the attention where there is one: everywhere but at the bottom.
        place = 1 if block == 0 else 2
        names += [
            (rf"down_blocks\.{block}\.downsamplers\.0\.conv\.", f"input_blocks.{last}.0.op."),
            (rf"up_blocks\.{block}\.upsamplers\.0\.", f"output_blocks.{last - 1}.{place}."),
        ]
    return names


def _vae_names(blocks: int) -> Names:
    names = [(r"quant_conv\.", "quant_conv."), (r"post_quant_conv\.", "post_quant_conv.")]
    for half in ("encoder", "decoder"):
        names += [
            (rf"{half}\.conv_norm_out\.", f"{half}.norm_out."),
            (rf"{half}\.conv_(?=in|out)", f"{half}.conv_"),
            (rf"{half}\.mid_block\.resnets\.0\.", f"{half}.mid.block_1."),
            (rf"{half}\.mid_block\.resnets\.1\.", f"{half}.mid.block_2."),
            (rf"{half}\.mid_block\.attentions\.0\.", f"{half}.mid.attn_1."),
        ]
    for block in range(blocks):
        down, up = f"encoder.down.{block}", f"decoder.up.{blocks - 1 - block}"
        names += [
            (rf"encoder\.down_blocks\.{block}\.resnets\.", f"{down}.block."),
            (rf"encoder\.down_blocks\.{block}\.downsamplers\.0\.", f"{down}.downsample."),
            (rf"decoder\.up_blocks\.{block}\.resnets\.", f"{up}.block."),
            (rf"decoder\.up_blocks\.{block}\.upsamplers\.0\.", f"{up}.upsample."),
        ]
    return names
