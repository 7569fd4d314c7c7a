"""The judge: a convolutional network that reads identity, context, and the colours of clothes and background from an image.

It is trained on drawings only and shares nothing with the encoder's image tower. Drawings are blurred, noised, shifted and
scaled in training, so that the typical artifacts of generated images do not change what it reads. None pass through the VAE: the
judge depends on no other network, and can be trained at any time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mini_world.next.data import FACTS, WHO_KINDS, Drawings
from mini_world.next.identities import ATTRIBUTES, DEGREES
from mini_world.next.loop import default_device, random_rows, train
from mini_world.next.optimizers import muon
from mini_world.next.scores import Reading, backdrop_visible, fact_visible, garment_visible, visible
from mini_world.next.world import Scene

CONTEXT = {name: values for name, values in FACTS.items() if name != "kind"}
"""The facts of a scene and their values, in the order of the columns of `Drawings.facts`."""
CONTEXT_SIZES = [len(values) for values in CONTEXT.values()]
HEADS = [(kind, name, len(choices)) for kind in WHO_KINDS for name, choices in ATTRIBUTES[kind].items()]
HEAD_SIZES = [size for _, _, size in HEADS]
DEGREE_HEADS = [(kind, name) for kind in WHO_KINDS for name in DEGREES[kind]]
ABSENT = -100  # the ignore_index of cross_entropy
WIDTHS = (64, 64, 96, 96, 128, 128)
DRAWINGS, OLD_DRAWINGS, STEPS = 50_000, 6000, 12_000
"""Of `train_judge`: numbers of drawings, and steps; about 50 minutes of one CPU core."""


@dataclass
class Outputs:
    """Logits and regressions for B images.

    attributes (B, sum of head sizes), context (B, sum of context sizes), degrees (B, degree heads), garment and backdrop (B, 3)
    in the units of the pixels, [-1, 1].
    """

    attributes: Tensor
    context: Tensor
    degrees: Tensor
    garment: Tensor
    backdrop: Tensor


class Judge(nn.Module):
    """Pixels in [-1, 1] (B, 3, 128, 128) to `Outputs`.

    The colours are means of the image's own pixels, with weights that the network computes: they are as exact as the pixels.
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        # No pixel is lost: the first layer sees 4x4 pixels as channels, on a 32x32 grid.
        self.unshuffle = nn.PixelUnshuffle(4)
        blocks, below = [], 48
        for width in widths:
            blocks.append(nn.Sequential(nn.Conv2d(below, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()))
            below = width
        self.blocks = nn.ModuleList(blocks)
        self.where = nn.Conv2d(widths[3], 2, 3, padding=1)
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(widths[-1] * 16, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU())
        self.attributes = nn.Linear(256, sum(HEAD_SIZES))
        self.context = nn.Linear(256, sum(CONTEXT_SIZES))
        self.degrees = nn.Linear(256, len(DEGREE_HEADS))

    def forward(self, pixels: Tensor) -> Outputs:
        found = self.unshuffle(pixels)
        for number, block in enumerate(self.blocks):
            found = block(found)
            if number == 3:
                weights = self.where(found).float().flatten(2).softmax(2)
                small = F.avg_pool2d(pixels.float(), pixels.shape[-1] // found.shape[-1]).flatten(2)
                colours = torch.einsum("bks,bcs->bkc", weights, small)
            if number % 2:
                found = F.max_pool2d(found, 2)
        hidden = self.hidden(found)
        return Outputs(self.attributes(hidden), self.context(hidden), self.degrees(hidden), colours[:, 0], colours[:, 1])


@dataclass
class Targets:
    """What a set of N drawings shows, with ABSENT or nan where there is nothing or the drawing hides it.

    attributes (N, heads) and context (N, 6) int64; degrees (N, degree heads), garment and backdrop (N, 3) float32, the colours in
    [-1, 1].
    """

    attributes: Tensor
    context: Tensor
    degrees: Tensor
    garment: Tensor
    backdrop: Tensor

    def select(self, rows: Tensor, device: torch.device) -> Targets:
        """The targets of some drawings, on a device."""
        return Targets(*(getattr(self, field.name)[rows].to(device) for field in fields(self)))

    @classmethod
    def concatenated(cls, parts: Sequence[Targets]) -> Targets:
        """The targets of several sets."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def targets_of(drawings: Drawings) -> Targets:
    """The targets of a set of drawings; what `scores` calls hidden is absent."""
    count = len(drawings)
    attributes = numpy.full((count, len(HEADS)), ABSENT)
    degrees = numpy.full((count, len(DEGREE_HEADS)), numpy.nan, numpy.float32)
    context = drawings.facts[:, :6].astype(numpy.int64)
    colours = {name: getattr(drawings, name).astype(numpy.float32) / 127.5 - 1 for name in ("garment", "backdrop")}
    heads = {(kind, name): column for column, (kind, name, _) in enumerate(HEADS)}
    # Some sets do not know everything about their drawings: what is -1 stays absent.
    context[context < 0] = ABSENT
    for row in range(count):
        scene, number = drawings.scene(row), int(drawings.facts[row, 6])
        kind = WHO_KINDS[number] if number >= 0 else "thing"
        if not fact_visible(scene, "colour"):
            context[row, 3] = ABSENT
        for name, shown in (("garment", garment_visible), ("backdrop", backdrop_visible)):
            if not shown(kind, scene) or getattr(drawings, name)[row, 0] < 0:
                colours[name][row] = numpy.nan
        who = drawings.identity(row)
        if who is None:
            continue
        for column, name in enumerate(ATTRIBUTES[kind]):
            if drawings.values[row, column] >= 0 and visible(who, scene, name):
                attributes[row, heads[kind, name]] = drawings.values[row, column]
        for column, name in enumerate(DEGREES[kind]):
            if not numpy.isnan(drawings.degrees[row, column]) and visible(who, scene, name):
                degrees[row, DEGREE_HEADS.index((kind, name))] = drawings.degrees[row, column]
    arrays = (attributes, context, degrees, colours["garment"], colours["backdrop"])
    return Targets(*(torch.from_numpy(array) for array in arrays))


def _augment(pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Blur, contrast and noise of a random amount per image, a shift and a scale of the batch; the contrasts (B, 1)."""
    batch, size = len(pixels), pixels.shape[-1]
    amount = torch.rand(batch, 4, generator=generator, device=pixels.device)[..., None, None, None]
    small = F.avg_pool2d(pixels, 2)
    soft = F.interpolate(small, size=size, mode="bilinear", align_corners=False)
    softer = F.interpolate(F.avg_pool2d(small, 2), size=size, mode="bilinear", align_corners=False)
    mixed = torch.lerp(pixels, soft, (amount[:, 0] * 1.7 - 0.6).clamp(0, 1))
    mixed = torch.lerp(mixed, softer, (amount[:, 3] * 2.0 - 1.4).clamp(0, 0.6))
    contrast = 0.92 + 0.16 * amount[:, 1]
    noise = torch.randn(pixels.shape, generator=generator, device=pixels.device)
    mixed = mixed * contrast + 0.08 * amount[:, 2] * noise
    scale, dx, dy = (2 * torch.rand(3, generator=generator, device=pixels.device) - 1).tolist()
    zoom = 1 + 0.05 * scale
    matrix = torch.tensor([[zoom, 0, 0.05 * dx], [0, zoom, 0.05 * dy]], device=pixels.device)
    grid = F.affine_grid(matrix.expand(batch, 2, 3), list(pixels.shape), align_corners=False)
    mixed = F.grid_sample(mixed, grid, padding_mode="border", align_corners=False)
    return mixed, contrast.flatten()[:, None]


def losses(found: Outputs, targets: Targets, contrast: Tensor) -> dict[str, Tensor]:
    """The terms of the loss: cross-entropies of attributes and context, Huber losses of degrees and colours."""
    attributes = torch.zeros((), device=contrast.device)
    for part, target in zip(found.attributes.float().split(HEAD_SIZES, 1), targets.attributes.unbind(1), strict=True):
        attributes = attributes + F.cross_entropy(part, target, reduction="sum", ignore_index=ABSENT)
    attributes = attributes / (targets.attributes != ABSENT).sum().clamp(min=1)
    context = torch.zeros((), device=contrast.device)
    for part, target in zip(found.context.float().split(CONTEXT_SIZES, 1), targets.context.unbind(1), strict=True):
        total = F.cross_entropy(part, target, reduction="sum", ignore_index=ABSENT)
        context = context + total / (target != ABSENT).sum().clamp(min=1)
    degrees = _huber(found.degrees.float(), targets.degrees)
    # The contrast changes the colours that the image shows, and so what is to be read.
    colours = [_huber(found.garment, targets.garment * contrast), _huber(found.backdrop, targets.backdrop * contrast)]
    return {"attributes": attributes, "context": 0.2 * context, "degrees": 2.0 * degrees, "colours": 2.0 * sum(colours)}


def _huber(found: Tensor, target: Tensor) -> Tensor:
    some = ~target.isnan()
    return F.smooth_l1_loss(found[some], target[some], beta=0.1, reduction="sum") / some.sum().clamp(min=1)


def pixels_at(images: numpy.ndarray, rows: Tensor, device: torch.device) -> Tensor:
    """Images (N, 128, 128, 3), which may be a memory map, at some rows, as pixels in [-1, 1] (B, 3, 128, 128)."""
    some = torch.from_numpy(numpy.ascontiguousarray(images[rows.cpu().numpy()])).to(device)
    return some.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def train_judge(
    folder: Path,
    drawings: Drawings,
    *,
    steps: int = STEPS,
    batch: int = 32,
    old: Drawings | None = None,
) -> Judge:
    """Train on drawings of a set of their own.

    `old`: drawings of another world, one image in eight, so that the judge can
    read images of today's base too (`today.old_drawings`).
    """
    device = default_device()
    torch.manual_seed(5)
    judge = Judge().to(memory_format=torch.channels_last)
    shares = [(drawings, batch)] if old is None else [(drawings, batch - batch // 8), (old, batch // 8)]
    sets = [(some, targets_of(some), size) for some, size in shares]

    def loss_of_step(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        images, wanted = [], []
        for some, targets, size in sets:
            rows = random_rows(len(some), size, generator)
            images.append(pixels_at(some.images, rows, device))
            wanted.append(targets.select(rows.cpu(), device))
        pixels, contrast = _augment(torch.cat(images), generator)
        found = judge(pixels.contiguous(memory_format=torch.channels_last))
        return losses(found, Targets.concatenated(wanted), contrast)

    train("judge", folder, {"judge": judge}, loss_of_step, steps=steps, learning_rate=0.01, optimizer=muon)
    return judge


@dataclass
class Readings:
    """What the judge reads in B images: indices into ATTRIBUTES and CONTEXT, degrees, and colours in 0..255."""

    attributes: numpy.ndarray
    context: numpy.ndarray
    degrees: numpy.ndarray
    garment: numpy.ndarray
    backdrop: numpy.ndarray

    def __len__(self) -> int:
        return len(self.attributes)

    def of(self, row: int, kind: str) -> Reading:
        """Image `row` in words, its attributes as those of a subject of `kind`."""
        facts = {name: values[int(k)] for (name, values), k in zip(CONTEXT.items(), self.context[row], strict=True)}
        read = zip(HEADS, self.attributes[row], strict=True)
        values = {name: ATTRIBUTES[kind][name][int(k)] for (owner, name, _), k in read if owner == kind}
        found = zip(DEGREE_HEADS, self.degrees[row], strict=True)
        degrees = {name: float(value) for (owner, name), value in found if owner == kind}
        garment, backdrop = (tuple(float(c) for c in colour[row]) for colour in (self.garment, self.backdrop))
        subject = facts.pop("subject")
        return Reading(subject, Scene(**facts), values, degrees, garment, backdrop)  # type: ignore[arg-type]


def save_judge(judge: Judge, path: Path) -> None:
    """Save the weights in half precision, safetensors."""
    state = judge.cpu().state_dict()
    save_file({key: (value.half() if value.is_floating_point() else value).contiguous() for key, value in state.items()}, path)


def load_judge(path: Path) -> Judge:
    """The judge that `save_judge` saved, in float32."""
    judge = Judge()
    judge.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in load_file(path).items()})
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def classify(judge: Judge, pixels: Tensor) -> Readings:
    """What the judge reads in images; pixels (B, 3, 128, 128) in [-1, 1]."""
    device = next(judge.parameters()).device
    parts: list[list[Tensor]] = []
    for part in pixels.split(128):
        found = judge(part.to(device))
        values = torch.stack([one.argmax(1) for one in found.attributes.split(HEAD_SIZES, 1)], 1)
        context = torch.stack([one.argmax(1) for one in found.context.split(CONTEXT_SIZES, 1)], 1)
        colours = [((one + 1) * 127.5).clamp(0, 255) for one in (found.garment, found.backdrop)]
        parts.append([values, context, found.degrees.clamp(-1, 1), *colours])
    return Readings(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


def batches(drawings: Drawings, size: int = 256) -> Iterator[Tensor]:
    """The pixels of a set of drawings, in parts."""
    for rows in torch.arange(len(drawings)).split(size):
        yield pixels_at(drawings.images, rows, torch.device("cpu"))


def accuracy(judge: Judge, drawings: Drawings) -> dict[str, float]:
    """Accuracy per attribute and fact of what drawings show, mean absolute errors per degree, and per colour in 0..255."""
    parts, targets = [classify(judge, pixels) for pixels in batches(drawings)], targets_of(drawings)
    read = {
        name: numpy.concatenate([getattr(part, name) for part in parts]) for name in (field.name for field in fields(Readings))
    }
    names = [f"{kind}.{name}" for kind, name, _ in HEADS]
    columns = [(names, "attributes"), (list(CONTEXT), "context")]
    result = {}
    for titles, part in columns:
        truth = getattr(targets, part).numpy()
        for column, title in enumerate(titles):
            some = truth[:, column] != ABSENT
            if some.any():
                result[title] = round(float((read[part][:, column] == truth[:, column])[some].mean()), 4)
    result |= {f"error of {kind}.{name}": round(float(numpy.nanmean(error)), 4)
               for (kind, name), error in zip(DEGREE_HEADS, numpy.abs(read["degrees"] - targets.degrees.numpy()).T, strict=True)
               if not numpy.isnan(error).all()}  # fmt: skip
    for name in ("garment", "backdrop"):
        squares = numpy.square(read[name] - (getattr(targets, name).numpy() + 1) * 127.5).mean(1)
        if not numpy.isnan(squares).all():
            result[f"distance of {name}"] = round(float(numpy.nanmean(numpy.sqrt(squares))), 2)
    return result
