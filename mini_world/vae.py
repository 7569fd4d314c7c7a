"""Trains the VAE of `mini`, diffusers' AutoencoderKL: 64x64 pixels to 16x16x4 latents."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from e4t_cli.nn.precision import PrecisionPolicy, half_precision
from mini_world.data import Drawings
from mini_world.loop import default_device, random_rows, train
from mini_world.world import SUBJECT_LABELS

# Few groups: a GroupNorm with two channels per group loses the colour of flat areas, which are most of a drawing.
CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "sample_size": 64,
    "layers_per_block": 1,
    "block_out_channels": (32, 64, 128),
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
}


def to_pixels(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) to float32 in [-1, 1] (B, 3, H, W)."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def _edges(pixels: Tensor) -> tuple[Tensor, Tensor]:
    return pixels[..., 1:, :] - pixels[..., :-1, :], pixels[..., :, 1:] - pixels[..., :, :-1]


def _zero_init_residuals(vae: AutoencoderKL) -> None:
    """Initialize as a shallow convolutional autoencoder, which trained several times faster than the default.

    Residual branches start at zero, so that the main path is fitted first. The posterior starts narrow, because with unit noise
    the decoder would first learn to ignore its input.
    """
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -6.0
        vae.quant_conv.weight[4:] *= 0.1


def _reconstruction_losses(decoded: Tensor, pixels: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
    """The terms of the reconstruction loss: pixels (L1 and MSE), edges, and 8x8 averages.

    `weights`: pixel weights (B, 1, H, W), about 1 on average.
    """
    error = decoded - pixels
    if weights is None:
        weights = torch.ones_like(error[:, :1])
    down, across = _edges(error)
    edges = (down.abs() * weights[..., 1:, :]).mean() + (across.abs() * weights[..., 1:]).mean()
    wide = F.avg_pool2d(error, 8).pow(2).mean()
    return {
        "l1": (error.abs() * weights).mean(),
        "mse": 2 * (error.pow(2) * weights).mean(),
        "edges": 0.5 * edges,
        "wide": 2 * wide,
    }


def train_vae(folder: Path, drawings: Drawings, *, crop_steps: int, whole_steps: int, batch: int) -> AutoencoderKL:
    """Train on crops, 2 · `batch` a step, which are cheap and contain all kinds of edges; then on `batch` whole images."""
    device = default_device()
    torch.manual_seed(1)
    vae = AutoencoderKL(**CONFIG)
    _zero_init_residuals(vae)
    images = torch.from_numpy(drawings.images).to(device)

    def loss_of_step(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        crops = step < crop_steps
        pixels = to_pixels(images[random_rows(len(images), 2 * batch if crops else batch, generator)])
        if crops:
            x, y = random_rows(33, 2, generator).tolist()
            pixels = pixels[..., y : y + 32, x : x + 32]
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return _reconstruction_losses(decoded, pixels) | {"kl": 1e-4 * kl}

    steps = crop_steps + whole_steps
    train("vae", folder, {"vae": vae}, loss_of_step, steps=steps, learning_rate=1e-3, average=0.997)
    latents = encode_images_to_latents(vae, images[:2048])[:, :4].float()
    vae.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 5))
    return vae


def train_decoder(folder: Path, vae: AutoencoderKL, drawings: Drawings, encoded: Tensor, *, steps: int, batch: int) -> None:
    """Train the decoder alone on encoded drawings (N, 8, 16, 16): images get sharper and latents do not change.

    Pixels of subjects have four times the weight: eyes are small, and stars and windows are many.
    """
    device = default_device()
    subject = torch.from_numpy(numpy.isin(drawings.labels[: len(encoded)], SUBJECT_LABELS))[:, None].to(device)
    images, encoded = torch.from_numpy(drawings.images[: len(encoded)]).to(device), encoded.to(device)
    vae.to(device)
    modules = {"decoder": vae.decoder.requires_grad_(True), "post_quant_conv": vae.post_quant_conv.requires_grad_(True)}

    def loss_of_step(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = random_rows(len(encoded), batch, generator)
        mean, logvar = encoded[rows].float().chunk(2, 1)
        noise = torch.randn(mean.shape, generator=generator, device=device)
        decoded = vae.decode(mean + (0.5 * logvar).exp() * noise).sample.float()
        weights = 1.0 + 3.0 * subject[rows]
        return _reconstruction_losses(decoded, to_pixels(images[rows]), weights / weights.mean())

    train("decoder", folder, modules, loss_of_step, steps=steps, learning_rate=5e-4, average=0.997)


@torch.no_grad()
def encode_images_to_latents(vae: AutoencoderKL, images: Tensor, batch: int = 64) -> Tensor:
    """Posterior means and log-variances of images, fp16 (N, 8, 16, 16), not scaled."""
    device = next(vae.parameters()).device
    parts = []
    for start in range(0, len(images), batch):
        with half_precision(device, PrecisionPolicy.resolve(device, loss_scaling=False).half):
            posterior = vae.encode(to_pixels(images[start : start + batch]).to(device)).latent_dist
        parts.append(torch.cat([posterior.mean, posterior.logvar], 1).half().cpu())
    return torch.cat(parts).contiguous()


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, drawings: Drawings) -> dict[str, float]:
    """Peak signal-to-noise ratio of the reconstruction, in dB: of all pixels, and of subjects."""
    device = next(vae.parameters()).device
    pixels = to_pixels(torch.from_numpy(drawings.images)).to(device)
    decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    error = (decoded - pixels).pow(2).mean(1).cpu()
    subject = torch.from_numpy(numpy.isin(drawings.labels, SUBJECT_LABELS))
    found = {"psnr": error.mean(), "psnr on subjects": error[subject].mean()}
    return {name: round(float(10 * torch.log10(4.0 / one)), 2) for name, one in found.items()}
