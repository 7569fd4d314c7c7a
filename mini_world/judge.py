"""The judge: a convolutional network that classifies the identity's attributes and the context in an image.

It is trained on drawings only and shares nothing with the encoder's image tower. In training, drawings are blurred, noised and
passed through the VAE, so that the typical artifacts of generated images do not change the classification.
"""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from mini_world.clip import ABSENT, HEAD_SIZES, HEADS, attribute_loss, attribute_targets
from mini_world.data import SUBJECTS, Drawings
from mini_world.loop import default_device, random_rows, train
from mini_world.scenes import FRAMINGS, MEDIA, PLACES, ROLES
from mini_world.vae import to_pixels

CONTEXT_SIZES = [len(SUBJECTS), len(PLACES), len(ROLES), len(MEDIA), len(FRAMINGS)]
CONTEXT_NAMES = ("subject", "place", "role", "medium", "framing")


class Judge(nn.Module):
    """Pixels in [-1, 1] (B, 3, 64, 64) to logits of attributes (B, sum of head sizes) and context (B, sum of sizes)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = (width, 2 * width, 3 * width, 4 * width)
        layers: list[nn.Module] = [nn.Conv2d(3, width, 5, stride=2, padding=2), nn.BatchNorm2d(width), nn.ReLU()]
        for below, above in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(below, above, 3, padding=1), nn.BatchNorm2d(above), nn.ReLU()]
            layers += [nn.Conv2d(above, above, 3, padding=1), nn.BatchNorm2d(above), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(widths[-1] * 16, 256), nn.ReLU())
        self.attributes = nn.Linear(256, sum(HEAD_SIZES))
        self.context = nn.Linear(256, sum(CONTEXT_SIZES))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(self.features(pixels))
        return self.attributes(hidden), self.context(hidden)


def _augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Augmentation: blur, contrast and noise of a random amount per sample, and a small shift of the batch."""
    batch = len(pixels)
    device = generator.device
    amount = torch.rand(batch, 4, generator=generator, device=device)[..., None, None, None]
    small = F.interpolate(pixels, scale_factor=0.5, mode="bilinear", align_corners=False, antialias=True)
    soft = F.interpolate(small, size=pixels.shape[-1], mode="bilinear", align_corners=False)
    mixed = torch.lerp(pixels, soft, (amount[:, 0] * 1.6 - 0.6).clamp(0, 1))
    noise = torch.randn(pixels.shape, generator=generator, device=device)
    mixed = mixed * (0.85 + 0.3 * amount[:, 1]) + 0.08 * amount[:, 2] * noise
    dx, dy = (random_rows(5, 2, generator) - 2).tolist()
    return torch.roll(mixed, (dy, dx), (2, 3))


def train_judge(folder: Path, drawings: Drawings, vae: AutoencoderKL | None, *, steps: int, batch: int = 64) -> Judge:
    """Train on drawings (a separate set); one image in 16 goes through the VAE."""
    device = default_device()
    torch.manual_seed(5)
    judge = Judge()
    images = torch.from_numpy(drawings.images).to(device)
    targets = attribute_targets(drawings).to(device)
    facts = torch.from_numpy(drawings.facts[:, :5].astype(numpy.int64)).to(device)

    def loss_of_step(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = random_rows(len(images), batch, generator)
        pixels = to_pixels(images[rows])
        if vae is not None:
            with torch.no_grad():
                some = batch // 16
                pixels[:some] = vae.decode(vae.encode(pixels[:some]).latent_dist.mean).sample.float()
        attributes, context = judge(_augment(pixels, generator))
        parts = context.float().split(CONTEXT_SIZES, 1)
        context_loss = sum(F.cross_entropy(part, facts[rows, k]) for k, part in enumerate(parts))
        return {"attributes": attribute_loss(attributes, targets[rows]), "context": 0.2 * context_loss}

    train("judge", folder, {"judge": judge}, loss_of_step, steps=steps, learning_rate=2e-3, average=None)
    return judge


@torch.no_grad()
def classify(judge: Judge, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The predicted attribute values (B, heads) and context values (B, 5), as indices."""
    parts = [judge(part.to(next(judge.parameters()).device)) for part in pixels.split(128)]
    attributes = torch.cat([part[0] for part in parts]).cpu()
    context = torch.cat([part[1] for part in parts]).cpu()
    values = torch.stack([part.argmax(1) for part in attributes.split(HEAD_SIZES, 1)], 1)
    scene = torch.stack([part.argmax(1) for part in context.split(CONTEXT_SIZES, 1)], 1)
    return values, scene


def accuracy(judge: Judge, drawings: Drawings) -> dict[str, float]:
    """Accuracy on held-out drawings, per attribute and per part of the context."""
    values, scene = classify(judge, to_pixels(torch.from_numpy(drawings.images)))
    result = {}
    for k, ((kind, name, _), target) in enumerate(zip(HEADS, attribute_targets(drawings).unbind(1), strict=True)):
        some = target != ABSENT
        if some.any():
            result[f"{kind}.{name}"] = round(float((values[:, k] == target)[some].float().mean()), 3)
    for k, name in enumerate(CONTEXT_NAMES):
        truth = torch.from_numpy(drawings.facts[:, k].astype(numpy.int64))
        result[name] = round(float((scene[:, k] == truth).float().mean()), 3)
    return result
