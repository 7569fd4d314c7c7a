"""The autoencoder of `mini`: 64x64 pixels to 16x16x4 latents, of diffusers' own class."""

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
from mini_world.loop import draw_rows, pick_device, train
from mini_world.world import SUBJECT_LABELS

# Few groups: a GroupNorm of two channels a group forgets what colour a flat area has, and flat areas are most of a drawing.
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
    """Bytes (B, H, W, 3) to [-1, 1] (B, 3, H, W)."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def _edges(pixels: Tensor) -> tuple[Tensor, Tensor]:
    return pixels[..., 1:, :] - pixels[..., :-1, :], pixels[..., :, 1:] - pixels[..., :, :-1]


def _start_simple(vae: AutoencoderKL) -> None:
    """Begin as a shallow convolutional autoencoder: seen to learn several times faster than the default start.

    Residual branches start at zero, so that gradients first fit the straight path, and the posterior starts narrow:
    under unit noise the decoder would first learn to ignore its input.
    """
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -6.0
        vae.quant_conv.weight[4:] *= 0.1


def _faults(decoded: Tensor, pixels: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
    """What is wrong with a decoded picture: its colours, its edges, and what it is from afar.

    `weights`: how much each pixel counts (B, 1, H, W), about 1 on average.
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
    """First on crops, which are cheap and already hold every edge, then on `batch` whole pictures; crops are twice as many."""
    device = pick_device()
    torch.manual_seed(1)
    vae = AutoencoderKL(**CONFIG)
    _start_simple(vae)
    images = torch.from_numpy(drawings.images).to(device)

    def loss_of_step(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        crops = step < crop_steps
        pixels = to_pixels(images[draw_rows(len(images), 2 * batch if crops else batch, generator)])
        if crops:
            x, y = draw_rows(33, 2, generator).tolist()
            pixels = pixels[..., y : y + 32, x : x + 32]
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return _faults(decoded, pixels) | {"kl": 1e-4 * kl}

    steps = crop_steps + whole_steps
    train("vae", folder, {"vae": vae}, loss_of_step, steps=steps, learning_rate=1e-3, average=0.997)
    latents = encode_all(vae, images[:2048])[:, :4].float()
    vae.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 5))
    return vae


def train_decoder(folder: Path, vae: AutoencoderKL, drawings: Drawings, encoded: Tensor, *, steps: int, batch: int) -> None:
    """Go on with the decoder alone on encoded drawings (N, 8, 16, 16): it gets sharper, and what latents mean stays.

    A subject counts four times as much as what is around it: eyes are small, stars and windows are many.
    """
    device = pick_device()
    subject = torch.from_numpy(numpy.isin(drawings.labels[: len(encoded)], SUBJECT_LABELS))[:, None].to(device)
    images, encoded = torch.from_numpy(drawings.images[: len(encoded)]).to(device), encoded.to(device)
    vae.to(device)
    modules = {"decoder": vae.decoder.requires_grad_(True), "post_quant_conv": vae.post_quant_conv.requires_grad_(True)}

    def loss_of_step(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = draw_rows(len(encoded), batch, generator)
        mean, logvar = encoded[rows].float().chunk(2, 1)
        noise = torch.randn(mean.shape, generator=generator, device=device)
        decoded = vae.decode(mean + (0.5 * logvar).exp() * noise).sample.float()
        weights = 1.0 + 3.0 * subject[rows]
        return _faults(decoded, to_pixels(images[rows]), weights / weights.mean())

    train("decoder", folder, modules, loss_of_step, steps=steps, learning_rate=5e-4, average=0.997)


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: Tensor, batch: int = 64) -> Tensor:
    """Posterior means and log-variances of many pictures, fp16 (N, 8, 16, 16), not scaled."""
    device = next(vae.parameters()).device
    parts = []
    for start in range(0, len(images), batch):
        with half_precision(device, PrecisionPolicy.resolve(device, loss_scaling=False).half):
            posterior = vae.encode(to_pixels(images[start : start + batch]).to(device)).latent_dist
        parts.append(torch.cat([posterior.mean, posterior.logvar], 1).half().cpu())
    return torch.cat(parts).contiguous()


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, drawings: Drawings) -> dict[str, float]:
    """Peak signal-to-noise ratio of encode-then-decode, in dB: over all pixels, and over those of subjects."""
    device = next(vae.parameters()).device
    pixels = to_pixels(torch.from_numpy(drawings.images)).to(device)
    decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    error = (decoded - pixels).pow(2).mean(1).cpu()
    subject = torch.from_numpy(numpy.isin(drawings.labels, SUBJECT_LABELS))
    found = {"psnr": error.mean(), "psnr on subjects": error[subject].mean()}
    return {name: round(float(10 * torch.log10(4.0 / one)), 2) for name, one in found.items()}
