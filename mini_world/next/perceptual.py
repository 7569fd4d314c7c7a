"""The perceptual distance that the VAE is trained with: features of a small classifier of drawings.

Stable Diffusion's VAE was trained with LPIPS, features of VGG trained on photographs. Here the features are those of a network
that is trained, from nothing, to read from a drawing what it shows: every fact of the scene and every attribute. It is not the
judge, with which results are measured, and shares neither weights nor training images with it.
"""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini_world.next.data import FACTS, WHO_KINDS, Drawings
from mini_world.next.identities import ATTRIBUTES
from mini_world.next.loop import default_device, random_rows, train

_SCENE = list(FACTS)[:6]  # all facts but the kind of identity, which follows from the attributes' presence
# One head per fact and per attribute of each kind: (kind, column of `Drawings.values`, number of values).
_HEADS = [
    (kind, column, len(choices))
    for kind, name in enumerate(WHO_KINDS)
    for column, choices in enumerate(ATTRIBUTES[name].values())
]
SIZES = [len(FACTS[name]) for name in _SCENE] + [size for _, _, size in _HEADS]
ABSENT = -100  # ignored by the cross-entropy


def targets_of(drawings: Drawings) -> Tensor:
    """What the classifier is to read, int64 (N, heads); ABSENT where a drawing has no such attribute."""
    facts, values = numpy.asarray(drawings.facts), numpy.asarray(drawings.values)
    columns = [facts[:, k] for k in range(len(_SCENE))]
    columns += [numpy.where(facts[:, 6] == kind, values[:, column], ABSENT) for kind, column, _ in _HEADS]
    return torch.from_numpy(numpy.stack(columns, 1).astype(numpy.int64))


def _block(below: int, above: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(below, above, 3, stride, 1, bias=False), nn.BatchNorm2d(above), nn.ReLU())


class Classifier(nn.Module):
    """Pixels in [-1, 1] (B, 3, H, W) to features of three resolutions, H/2, H/4 and H/8; for H = W = 128 also to logits."""

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 96)) -> None:
        super().__init__()
        one, two, three = widths
        self.stages = nn.ModuleList(
            [
                nn.Sequential(_block(3, one, 2), _block(one, one, 1)),
                nn.Sequential(_block(one, two, 2), _block(two, two, 1)),
                nn.Sequential(_block(two, three, 2), _block(three, three, 1)),
            ]
        )
        self.head = nn.Sequential(
            _block(three, 32, 2), nn.Flatten(), nn.Linear(32 * 64, 256), nn.ReLU(), nn.Linear(256, sum(SIZES))
        )

    def features(self, pixels: Tensor) -> list[Tensor]:
        found = []
        for stage in self.stages:
            pixels = stage(pixels)
            found.append(pixels)
        return found

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.features(pixels)[-1])


def perceptual_distance(classifier: Classifier, decoded: Tensor, pixels: Tensor) -> Tensor:
    """The squared distance of features normalized to length 1 in each place, averaged over places and resolutions.

    LPIPS with equal weights (Zhang et al., 2018, eq. 1). Gradients flow into `decoded` alone.
    """
    with torch.no_grad():
        wanted = classifier.features(pixels)
    distances = []
    for found, target in zip(classifier.features(decoded), wanted, strict=True):
        # A floor of the length: in flat areas features are tiny, and their direction is noise.
        one, other = (part.float() / (part.float().pow(2).sum(1, keepdim=True) + 0.01).sqrt() for part in (found, target))
        distances.append((one - other).pow(2).sum(1).mean())
    return torch.stack(distances).mean()


def classification_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of the heads, over those that a batch has targets for."""
    losses = []
    for part, target in zip(logits.float().split(SIZES, 1), targets.unbind(1), strict=True):
        present = (target != ABSENT).sum()
        losses.append(F.cross_entropy(part, target, ignore_index=ABSENT, reduction="sum") / present.clamp(min=1))
    return torch.stack(losses).mean()


def train_classifier(folder: Path, drawings: Drawings, *, steps: int, batch: int = 32) -> Classifier:
    """Train on drawings with some noise and contrast; frozen and in evaluation mode afterwards."""
    device = default_device()
    torch.manual_seed(7)
    classifier = Classifier()
    targets = targets_of(drawings).to(device)

    def loss_of_step(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = random_rows(len(drawings), batch, generator)
        images = torch.from_numpy(drawings.images[rows.cpu().numpy()]).to(device)
        pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1.0
        amount = torch.rand(2, batch, 1, 1, 1, generator=generator, device=device)
        noise = torch.randn(pixels.shape, generator=generator, device=device)
        logits = classifier(pixels * (0.8 + 0.4 * amount[0]) + 0.1 * amount[1] * noise)
        return {"classification": classification_loss(logits, targets[rows])}

    train("perceptual", folder, {"classifier": classifier}, loss_of_step, steps=steps, learning_rate=2e-3)
    return classifier.requires_grad_(False)


@torch.no_grad()
def accuracy(classifier: Classifier, drawings: Drawings) -> float:
    """The mean accuracy of the heads on drawings."""
    device = next(classifier.parameters()).device
    images = torch.from_numpy(numpy.array(drawings.images)).permute(0, 3, 1, 2)
    logits = torch.cat([classifier(part.to(device).float() / 127.5 - 1.0).cpu() for part in images.split(64)])
    shares = []
    for part, target in zip(logits.split(SIZES, 1), targets_of(drawings).unbind(1), strict=True):
        present = target != ABSENT
        if present.any():
            shares.append((part.argmax(1) == target)[present].float().mean())
    return round(float(torch.stack(shares).mean()), 4)
