"""Standardizes the channels of a VAE's latents, exactly, in its two 1x1 convolutions.

The U-Net's loss weighs all channels of a latent alike, and one noise schedule serves all. Stable Diffusion's `scaling_factor` is
one number, and StableDiffusionPipeline ignores `shift_factor`, `latents_mean` and `latents_std`. But diffusers' AutoencoderKL
ends its encoder and begins its decoder with a linear map of the channels, so that mean 0 and deviation 1 of each channel can be
part of the weights: what it reconstructs stays the same, and every program of Stable Diffusion reads the result.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor


@torch.no_grad()
def standardize_channels(vae: AutoencoderKL, means: Tensor) -> None:
    """Change the latents of a VAE to mean 0 and deviation 1 in each channel, and its `scaling_factor` to 1.

    Args:
        vae: changed in place; its reconstructions stay the same up to rounding.
        means: posterior means of many images (N, channels, height, width), not scaled.

    Raises:
        ValueError: a channel is constant, or the VAE has not both 1x1 convolutions.
    """
    if vae.quant_conv is None or vae.post_quant_conv is None:
        raise ValueError("the VAE needs use_quant_conv and use_post_quant_conv")
    device, dtype = vae.quant_conv.weight.device, vae.quant_conv.weight.dtype
    channels = means.shape[1]
    shift = means.double().mean((0, 2, 3)).to(device)
    scale = means.double().std((0, 2, 3)).to(device)
    if not (scale > 1e-6).all():
        raise ValueError(f"channels {(scale <= 1e-6).nonzero().flatten().tolist()} of the latents are constant")
    encoded, decoded = vae.quant_conv, vae.post_quant_conv
    # mean' = (mean - shift) / scale and logvar' = logvar - 2 log scale.
    encoded.weight[:channels] = (encoded.weight[:channels].double() / scale[:, None, None, None]).to(dtype)
    encoded.bias[:channels] = ((encoded.bias[:channels].double() - shift) / scale).to(dtype)
    encoded.bias[channels:] = (encoded.bias[channels:].double() - 2 * scale.log()).to(dtype)
    # W z + b = (W scale) z' + (b + W shift)
    weight = decoded.weight.double()
    decoded.bias.copy_((decoded.bias.double() + (weight * shift[None, :, None, None]).sum((1, 2, 3))).to(dtype))
    decoded.weight.copy_((weight * scale[None, :, None, None]).to(dtype))
    vae.register_to_config(scaling_factor=1.0)
