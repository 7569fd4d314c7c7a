"""Trains the VAE of `mini`, diffusers' AutoencoderKL: 128x128 pixels to 16x16x8 latents.

As Stable Diffusion's (Rombach et al., 2022, section 3.1 and appendix G), with a perceptual distance and against a discriminator
of patches, whose weight is adapted to the gradients; unlike there, the discriminator trains the decoder alone, after the encoder.
"""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from e4t_cli.nn.precision import PrecisionPolicy, half_precision
from mini_world.next.data import Drawings
from mini_world.next.loop import Objective, default_device, random_rows, train, train_objectives
from mini_world.next.optimizers import muon
from mini_world.next.perceptual import Classifier, perceptual_distance
from mini_world.next.world import SUBJECT_LABELS

# Few groups: a GroupNorm with two channels per group loses the colour of flat areas, which are most of a drawing. Widths are
# multiples of 16, which AVX-512 needs: (24, 48, 96, 128) takes as long as (32, 64, 128, 128) and 2.3 times as long as this.
VAE_CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 8,
    "sample_size": 128,
    "layers_per_block": 1,
    "block_out_channels": (16, 32, 64, 128),
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
# Of a subject's pixel. Its details are small, and half of the error is there even so: after 850 steps the mean square error of
# subjects, a quarter of all pixels, was 3.4 times that of the background with a weight of 1, and 2.5 times with 4.
SUBJECT_WEIGHT = 8.0
PERCEPTUAL_WEIGHT = 0.05
ADVERSARIAL_WEIGHT = 0.1  # of the gradient of the other terms: drawings have to be reproduced more than to look real
KL_WEIGHT = 1e-5
MSE_WEIGHT = 6.0  # at the end of the training about as large as L1
HEAD_START = 200  # steps of the discriminator before its gradient is used


def to_pixels(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) to float32 in [-1, 1] (B, 3, H, W)."""
    return images.permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1.0


def build_vae(**options: object) -> AutoencoderKL:
    """A new VAE as a shallow convolutional autoencoder, which trains several times faster than the default initialization.

    Residual branches start at zero, so that the main path is fitted first. The posterior starts narrow, because with unit noise
    the decoder would first learn to ignore its input.
    """
    vae = AutoencoderKL(**(VAE_CONFIG | options))
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    channels = vae.config.latent_channels
    with torch.no_grad():
        vae.quant_conv.bias[channels:] = -6.0
        vae.quant_conv.weight[channels:] *= 0.1
    return vae


class Discriminator(nn.Module):
    """Pixels (B, 3, H, W) to logits of patches of 22 pixels (B, 1, H/4, W/4): high for drawings, low for decoded ones."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
            nn.GroupNorm(4, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 3, 1, 1, bias=False),
            nn.GroupNorm(4, 4 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 3, 1, 1),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)


def hinge_loss(real: Tensor, decoded: Tensor) -> Tensor:
    """The discriminator's loss on logits: 0 where real ones are above 1 and decoded ones below -1."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + decoded.float()).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """The ratio of the two losses' gradients at the decoder's last layer (Esser et al., 2021, eq. 7), at most 10,000."""
    wanted, found = (torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial))
    return (wanted / (found + 1e-4)).clamp(0, 1e4).detach()


def reconstruction_losses(decoded: Tensor, pixels: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
    """The terms of the reconstruction loss: pixels (L1 and MSE), edges, and 8x8 averages.

    `weights`: pixel weights (B, 1, H, W), about 1 on average.
    """
    error = decoded - pixels
    if weights is None:
        weights = torch.ones_like(error[:, :1])
    down, across = error[..., 1:, :] - error[..., :-1, :], error[..., 1:] - error[..., :-1]
    edges = (down.abs() * weights[..., 1:, :]).mean() + (across.abs() * weights[..., 1:]).mean()
    return {
        "l1": (error.abs() * weights).mean(),
        "mse": MSE_WEIGHT * (error.pow(2) * weights).mean(),
        "edges": 0.5 * edges,
        "wide": 2 * F.avg_pool2d(error, 8).pow(2).mean(),
    }


def _weighted(images: numpy.ndarray, labels: numpy.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixels (B, 3, H, W) and pixel weights (B, 1, H, W), 1 on average, of images (B, H, W, 3) and their label maps."""
    subject = torch.from_numpy(numpy.isin(labels, SUBJECT_LABELS))[:, None].to(device)
    weights = 1.0 + (SUBJECT_WEIGHT - 1.0) * subject
    return to_pixels(torch.from_numpy(images).to(device)), weights / weights.mean()


def _whole(drawings: Drawings, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixels and pixel weights of whole drawings."""
    chosen = rows.cpu().numpy()
    return _weighted(drawings.images[chosen], drawings.labels[chosen], device)


def _crops(drawings: Drawings, count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pixels and pixel weights of random crops of random drawings."""
    rows = random_rows(len(drawings), count, generator).tolist()
    places = random_rows(drawings.images.shape[1] - size + 1, 2 * count, generator).view(count, 2).tolist()
    windows = [(row, slice(y, y + size), slice(x, x + size)) for row, (y, x) in zip(rows, places, strict=True)]
    images, labels = (numpy.stack([array[window] for window in windows]) for array in (drawings.images, drawings.labels))
    return _weighted(images, labels, generator.device)


def train_vae(
    folder: Path, drawings: Drawings, classifier: Classifier, *, crop_steps: int, whole_steps: int, batch: int, crop: int = 64
) -> AutoencoderKL:
    """Train on 4 · `batch` crops a step, which contain all kinds of edges; then on `batch` whole images."""
    device = default_device()
    torch.manual_seed(1)
    vae = build_vae()
    classifier = classifier.to(device).eval().requires_grad_(False)

    def loss_of_step(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        if step < crop_steps:
            pixels, weights = _crops(drawings, 4 * batch, crop, generator)
        else:
            pixels, weights = _whole(drawings, random_rows(len(drawings), batch, generator), device)
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        terms = reconstruction_losses(decoded.float(), pixels, weights)
        terms["kl"] = KL_WEIGHT * 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
        if step >= crop_steps:
            terms["perceptual"] = PERCEPTUAL_WEIGHT * perceptual_distance(classifier, decoded, pixels)
        return terms

    steps = crop_steps + whole_steps
    train("vae", folder, {"vae": vae}, loss_of_step, steps=steps, learning_rate=0.015, average=0.997, optimizer=muon)
    some = torch.from_numpy(numpy.array(drawings.images[:1024]))
    latents = encode_images_to_latents(vae, some)[:, : vae.config.latent_channels].float()
    vae.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 5))
    return vae


def train_decoder(
    folder: Path,
    vae: AutoencoderKL,
    drawings: Drawings,
    encoded: Tensor,
    classifier: Classifier,
    *,
    steps: int,
    batch: int,
    adversarial_from: int,
) -> None:
    """Train the decoder alone on encoded drawings (N, 16, 16, 16): images get sharper and latents do not change.

    The discriminator starts at step `adversarial_from`, and its gradient is used HEAD_START steps later.
    """
    device = default_device()
    drawings, encoded = drawings.select(slice(len(encoded))), encoded.to(device)
    vae.to(device)
    classifier = classifier.to(device).eval().requires_grad_(False)
    torch.manual_seed(2)
    discriminator = Discriminator()
    modules = {"decoder": vae.decoder.requires_grad_(True), "post_quant_conv": vae.post_quant_conv.requires_grad_(True)}
    current: dict[str, Tensor] = {}  # the images of this step, for the discriminator

    def decoder_loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = random_rows(len(encoded), batch, generator)
        pixels, weights = _whole(drawings, rows, device)
        mean, logvar = encoded[rows].float().chunk(2, 1)
        noise = torch.randn(mean.shape, generator=generator, device=device)
        decoded = vae.decode(mean + (0.5 * logvar).exp() * noise).sample
        current.update(real=pixels, decoded=decoded.detach().float())
        terms = reconstruction_losses(decoded.float(), pixels, weights)
        terms["perceptual"] = PERCEPTUAL_WEIGHT * perceptual_distance(classifier, decoded, pixels)
        if step >= adversarial_from + HEAD_START:
            adversarial = -discriminator(decoded).float().mean()
            weight = adaptive_weight(sum(terms.values()), adversarial, vae.decoder.conv_out.weight)  # type: ignore[arg-type]
            terms["adversarial"] = ADVERSARIAL_WEIGHT * weight * adversarial
        return terms

    def discriminator_loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        real, decoded = discriminator(torch.cat([current["real"], current["decoded"]])).chunk(2)
        return {"discriminator": hinge_loss(real, decoded)}

    objectives = {
        "decoder": Objective(modules, decoder_loss, 0.005, average=0.997, optimizer=muon),
        "discriminator": Objective({"discriminator": discriminator}, discriminator_loss, 5e-4, start=adversarial_from),
    }
    train_objectives("decoder", folder, objectives, steps=steps)


@torch.no_grad()
def encode_images_to_latents(vae: AutoencoderKL, images: Tensor, batch: int = 32) -> Tensor:
    """Posterior means and log-variances of images (N, 128, 128, 3) uint8: fp16 (N, 16, 16, 16), not scaled."""
    device = next(vae.parameters()).device
    parts = []
    for part in images.split(batch):
        with half_precision(device, PrecisionPolicy.resolve(device, loss_scaling=False).half):
            posterior = vae.encode(to_pixels(part.to(device))).latent_dist
        parts.append(torch.cat([posterior.mean, posterior.logvar], 1).half().cpu())
    return torch.cat(parts).contiguous()


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor, batch: int = 16) -> Tensor:
    """Images (N, H, W, 3) uint8 encoded and decoded: pixels in [-1, 1] (N, 3, H, W) on the CPU."""
    device = next(vae.parameters()).device
    parts = [vae.decode(vae.encode(to_pixels(part.to(device))).latent_dist.mean).sample for part in images.split(batch)]
    return torch.cat([part.clamp(-1, 1).float().cpu() for part in parts])


def reconstruction_psnr(vae: AutoencoderKL, drawings: Drawings) -> dict[str, float]:
    """Peak signal-to-noise ratio of the reconstruction, in dB: of all pixels, and of subjects."""
    images = torch.from_numpy(numpy.array(drawings.images))
    error = (reconstruct(vae, images) - to_pixels(images)).pow(2).mean(1)
    subject = torch.from_numpy(numpy.isin(drawings.labels, SUBJECT_LABELS))
    found = {"psnr": error.mean(), "psnr on subjects": error[subject].mean()}
    return {name: round(float(10 * torch.log10(4.0 / one)), 2) for name, one in found.items()}
