"""Trains the image tower of `mini`: attributes, degrees, identity, and CLIP's contrastive loss with a fixed text encoder.

The attributes are classified, and the degrees estimated, by linear heads on the tower's [CLS] tokens. They replace two billion
captioned images. The text encoder is trained before, on captions alone (read_out.py).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from transformers import CLIPTextModel

from mini_world.next.data import WHO_KINDS, Drawings
from mini_world.next.identities import ATTRIBUTES, DEGREES
from mini_world.next.loop import default_device, random_rows, train
from mini_world.next.optimizers import adamw
from mini_world.next.scenes import FRAMINGS, MEDIA
from mini_world.next.text import WIDTH, CaptionEncoder, TokenizedCaptions
from mini_world.next.vae import to_pixels

TOWER_CONFIG = {"image_size": 128, "patch_size": 16, "width": 128, "layers": 8, "heads": 4, "mlp_ratio": 4.0, "output_dim": 128}
MEAN, STD = 0.5, 0.5
SKETCH, AFAR = MEDIA.index("sketch"), FRAMINGS.index("afar")
# The attribute heads of all kinds, concatenated in one linear layer; those of the degrees after them.
HEADS = [(kind, name, len(choices)) for kind in WHO_KINDS for name, choices in ATTRIBUTES[kind].items()]
HEAD_SIZES = [size for _, _, size in HEADS]
DEGREE_HEADS = [(kind, name) for kind in WHO_KINDS for name in DEGREES[kind]]
ABSENT = -100  # the ignore_index of cross_entropy


def build_tower() -> VisionTransformer:
    """open_clip's vision transformer in a small configuration, untrained."""
    return VisionTransformer(**TOWER_CONFIG)


def build_heads() -> nn.ModuleDict:
    """The heads on tower and text encoder that are used in training only."""
    return nn.ModuleDict(
        {
            "image": nn.Linear(128, 128, bias=False),
            "text": nn.Linear(WIDTH, 128, bias=False),
            "who": nn.Linear(128, 128, bias=False),
            "attributes": nn.ModuleList(nn.Linear(128, sum(HEAD_SIZES) + len(DEGREE_HEADS)) for _ in range(3)),
        }
    )


def class_tokens(tower: VisionTransformer, pixels: Tensor) -> list[Tensor]:
    """[CLS] of every second layer through the final norm: four tensors (B, width); pixels in [-1, 1]."""
    layers = range(1, TOWER_CONFIG["layers"], 2)
    found = tower.forward_intermediates(
        pixels, indices=list(layers), intermediates_only=True, output_fmt="NLC", output_extra_tokens=True
    )["image_intermediates_prefix"]
    return [tower.ln_post(token[:, 0]) for token in found]


def attribute_targets(drawings: Drawings) -> Tensor:
    """The value of every head's attribute in every drawing, (N, heads); ABSENT where it has none, or none that can be seen."""
    kinds, columns = drawings.facts[:, -1], []
    for kind, name, _ in HEADS:
        values = drawings.values[:, list(ATTRIBUTES[kind]).index(name)].astype(numpy.int64)
        present = kinds == WHO_KINDS.index(kind)
        if name == "frame":
            glasses = drawings.values[:, list(ATTRIBUTES[kind]).index("glasses")]
            present &= numpy.isin(glasses, [ATTRIBUTES[kind]["glasses"].index(shape) for shape in ("round", "square")])
        columns.append(numpy.where(present, values, ABSENT))
    return torch.from_numpy(numpy.stack(columns, 1))


def degree_targets(drawings: Drawings) -> Tensor:
    """The value of every degree in every drawing, (N, degrees); NaN where it has none."""
    kinds, columns = drawings.facts[:, -1], []
    for kind, name in DEGREE_HEADS:
        values = drawings.degrees[:, list(DEGREES[kind]).index(name)].astype(numpy.float32)
        columns.append(numpy.where(kinds == WHO_KINDS.index(kind), values, numpy.float32("nan")))
    return torch.from_numpy(numpy.stack(columns, 1))


def attribute_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over all attributes present in the batch; logits (B, sum of head sizes), targets (B, heads)."""
    total = torch.zeros((), device=logits.device)
    for part, target in zip(logits.float().split(HEAD_SIZES, 1), targets.unbind(1), strict=True):
        total = total + F.cross_entropy(part, target, reduction="sum", ignore_index=ABSENT)
    return total / (targets != ABSENT).sum().clamp(min=1)


def degree_loss(values: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error over all degrees present in the batch; both (B, degrees)."""
    present = targets.isfinite()
    error = torch.where(present, values.float() - targets.nan_to_num(), 0.0)
    return error.square().sum() / present.sum().clamp(min=1)


def _pairs(count: int, pairs: int, generator: torch.Generator) -> Tensor:
    """Row numbers of random pairs 2k, 2k + 1, which show one identity, (2 · pairs,)."""
    first = random_rows(count // 2, pairs, generator) * 2
    return torch.stack([first, first + 1], 1).flatten()


def _identity_loss(token: Tensor, heads: nn.ModuleDict) -> Tensor:
    """Contrastive loss of a batch of pairs: the positive of each image is the other one of its identity."""
    who = F.normalize(heads["who"](token).float(), dim=1)
    rows = torch.arange(len(who), device=who.device)
    similarity = (who @ who.T / 0.1).masked_fill(torch.eye(len(who), dtype=torch.bool, device=who.device), -1e4)
    return F.cross_entropy(similarity, rows ^ 1)


def train_tower(
    folder: Path, drawings: Drawings, text_encoder: CLIPTextModel, captions: TokenizedCaptions, *, steps: int, pairs: int
) -> tuple[VisionTransformer, nn.ModuleDict]:
    """Train the tower on drawings in pairs (2k, 2k + 1) of one identity; the text encoder does not change.

    `captions`: equally many for each drawing, in the order of the drawings. The images may be memory-mapped: only those of a
    batch are read.
    """
    device = default_device()
    torch.manual_seed(3)
    tower, heads, caption_encoder = build_tower(), build_heads(), CaptionEncoder(text_encoder.to(device).eval())
    captions = captions.to(device)
    captions_per_image = len(captions) // len(drawings)
    # A sketch has no colours, and a subject far away no visible eyes.
    unclear = torch.from_numpy((drawings.facts[:, 4] == SKETCH) | (drawings.facts[:, 5] == AFAR))[:, None]
    targets = attribute_targets(drawings).masked_fill(unclear, ABSENT).to(device)
    degrees = degree_targets(drawings).masked_fill(unclear, float("nan")).to(device)

    def loss_of_step(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = _pairs(len(drawings), pairs, generator)
        images = torch.from_numpy(drawings.images[rows.cpu().numpy()]).to(device)
        tokens = class_tokens(tower, to_pixels(images))
        with torch.no_grad():
            chosen = captions[rows * captions_per_image + random_rows(captions_per_image, len(rows), generator)]
            _, ends = caption_encoder(chosen.shortened(int(chosen.ends.max()) + 1))
        image_embeds = F.normalize(heads["image"](tokens[-1]).float(), dim=1)
        text_embeds = F.normalize(heads["text"](ends).float(), dim=1)
        logits = image_embeds @ text_embeds.T / 0.06
        same = torch.arange(len(rows), device=device)
        contrast = 0.5 * (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same))
        losses = {"contrast": 0.25 * contrast, "identity": 0.3 * _identity_loss(tokens[-1], heads)}
        read = [head(token) for head, token in zip(heads["attributes"], tokens[1:], strict=True)]
        losses["attributes"] = sum(attribute_loss(part[:, : sum(HEAD_SIZES)], targets[rows]) for part in read)
        losses["degrees"] = sum(degree_loss(part[:, sum(HEAD_SIZES) :], degrees[rows]) for part in read)
        return losses

    modules = {"tower": tower, "heads": heads}
    options = {"learning_rate": 1e-3, "warm_up": 150, "average": 0.99, "optimizer": partial(adamw, weight_decay=0.05)}
    train("tower", folder, modules, loss_of_step, steps=steps, **options)  # type: ignore[arg-type]
    return tower, heads


@torch.no_grad()
def probe(tower: VisionTransformer, heads: nn.ModuleDict, drawings: Drawings) -> dict[str, float]:
    """Read from the last [CLS] token: accuracy of each attribute, mean absolute error of each degree, and the accuracy of
    retrieving the pair's other image."""
    batches = [drawings.images[start : start + 128] for start in range(0, len(drawings), 128)]
    tokens = torch.cat([class_tokens(tower, to_pixels(torch.from_numpy(numpy.array(part))))[-1] for part in batches])
    read = heads["attributes"][-1](tokens)
    result = {}
    parts = read[:, : sum(HEAD_SIZES)].split(HEAD_SIZES, 1)
    for (kind, name, _), part, target in zip(HEADS, parts, attribute_targets(drawings).unbind(1), strict=True):
        some = target != ABSENT
        if some.any():
            result[f"{kind}.{name}"] = round(float((part.argmax(1) == target)[some].float().mean()), 3)
    columns = zip(DEGREE_HEADS, read[:, sum(HEAD_SIZES) :].unbind(1), degree_targets(drawings).unbind(1), strict=True)
    for (kind, name), value, target in columns:
        if target.isfinite().any():
            result[f"{kind}.{name} error"] = round(float((value - target)[target.isfinite()].abs().mean()), 3)
    who = F.normalize(heads["who"](tokens), dim=1)
    similarity = (who[0::2] @ who[1::2].T).argmax(1)
    result["retrieval"] = round(float((similarity == torch.arange(len(similarity))).float().mean()), 3)
    return result
