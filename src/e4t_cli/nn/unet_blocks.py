"""Says whether a U-Net consists of Stable Diffusion's plain blocks, which `nn.fused_unet` can run.

diffusers' blocks have many options; what is not known here must not be run as if it were not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

PLAIN_BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D", "CrossAttnUpBlock2D"}


def transformers_of(block: Any) -> Sequence[Any]:
    """Return the `Transformer2DModel`s of a down, mid or up block."""
    return getattr(block, "attentions", None) or ()


def has_plain_blocks(unet: Any) -> bool:
    """Return whether a `UNet2DConditionModel` has the blocks of Stable Diffusion 1 and 2 with no further option.

    Nor hooks, which would not be called.
    """
    if any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules()):
        return False
    return all(map(_plain_block, (*unet.down_blocks, unet.mid_block, *unet.up_blocks)))


def _plain_block(block: Any) -> bool:
    if type(block).__name__ not in PLAIN_BLOCKS or getattr(block, "b1", None):  # FreeU
        return False
    samplers = [*(getattr(block, "downsamplers", None) or ()), *(getattr(block, "upsamplers", None) or ())]
    plain = all(map(_plain_residual, block.resnets)) and all(map(_plain_sampler, samplers))
    return plain and all(map(_plain_transformer, transformers_of(block)))


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
        and getattr(block, "fuser", None) is None
        and block.pos_embed is None and not block.only_cross_attention and block._chunk_size is None
        and type(block.ff.net[0]).__name__ == "GEGLU" and block.attn2 is not None
        and all(
            type(attn.processor).__name__ in ("AttnProcessor", "AttnProcessor2_0")
            and all(isinstance(layer, nn.Linear) for layer in (attn.to_q, attn.to_k, attn.to_v))
            and attn.norm_q is None and attn.norm_k is None and attn.group_norm is None and not attn.norm_cross
            and attn.spatial_norm is None and not attn.residual_connection and attn.rescale_output_factor == 1
            and attn.to_q.bias is None and attn.to_k.bias is None and attn.to_v.bias is None
            and attn.to_q.out_features == attn.to_k.out_features == attn.to_v.out_features == module.inner_dim
            for attn in (block.attn1, block.attn2)
        )
        for block in module.transformer_blocks
    )  # fmt: skip
