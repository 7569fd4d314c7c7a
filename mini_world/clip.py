"""Trains the image tower and the text encoder of `mini` together, as CLIP, with a loss for identity.

Besides the contrastive loss of images and captions there are a contrastive loss of two images of one identity, and a
classification of the attributes by linear heads on the tower's [CLS] tokens. They replace two billion captioned images.
"""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from mini_world.data import WHO_KINDS, Drawings
from mini_world.identities import ATTRIBUTES
from mini_world.loop import default_device, random_rows, train
from mini_world.scenes import FRAMINGS, MEDIA
from mini_world.text import WIDTH, CaptionEncoder, build_text_encoder, build_tokenizer, tokenize_drawings
from mini_world.vae import to_pixels

TOWER_CONFIG = {"image_size": 64, "patch_size": 8, "width": 128, "layers": 8, "heads": 4, "mlp_ratio": 4.0, "output_dim": 128}
MEAN, STD = 0.5, 0.5
SKETCH, AFAR = MEDIA.index("sketch"), FRAMINGS.index("afar")
# The attribute heads of all kinds, concatenated in one linear layer.
HEADS = [(kind, name, len(choices)) for kind in WHO_KINDS for name, choices in ATTRIBUTES[kind].items()]
HEAD_SIZES = [size for _, _, size in HEADS]
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
            "attributes": nn.ModuleList(nn.Linear(128, sum(HEAD_SIZES)) for _ in range(4)),
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
    """The value of every head's attribute in every drawing, (N, heads); ABSENT where it has none."""
    kinds, columns = drawings.facts[:, 5], []
    for kind, name, _ in HEADS:
        values = drawings.values[:, list(ATTRIBUTES[kind]).index(name)].astype(numpy.int64)
        columns.append(numpy.where(kinds == WHO_KINDS.index(kind), values, ABSENT))
    return torch.from_numpy(numpy.stack(columns, 1))


def attribute_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over all attributes present in the batch; logits (B, sum of head sizes), targets (B, heads)."""
    total = torch.zeros((), device=logits.device)
    for part, target in zip(logits.float().split(HEAD_SIZES, 1), targets.unbind(1), strict=True):
        total = total + F.cross_entropy(part, target, reduction="sum", ignore_index=ABSENT)
    return total / (targets != ABSENT).sum()


def concatenate(*sets: Drawings) -> Drawings:
    """Concatenate several sets of drawings."""
    return Drawings(*(numpy.concatenate([getattr(s, key) for s in sets]) for key in ("images", "labels", "facts", "values")))


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


def train_clip(folder: Path, drawings: Drawings, *, steps: int, pairs: int, captions_per_image: int):
    """Train text encoder and tower on drawings in pairs (2k, 2k + 1) of one identity; returns the tokenizer too.

    `captions_per_image`: variants of each drawing's caption.
    """
    device = default_device()
    torch.manual_seed(2)
    tokenizer = build_tokenizer(folder / "base" / "tokenizer")
    text_encoder, tower = build_text_encoder(tokenizer), build_tower()
    caption_encoder = CaptionEncoder(text_encoder)
    heads = build_heads()
    images = torch.from_numpy(drawings.images).to(device)
    captions = tokenize_drawings(drawings, tokenizer, captions_per_image).to(device)
    # A sketch has no colours, and a subject far away no visible eyes.
    unclear = (drawings.facts[:, 3] == SKETCH) | (drawings.facts[:, 4] == AFAR)
    targets = attribute_targets(drawings).masked_fill(torch.from_numpy(unclear)[:, None], ABSENT).to(device)

    def loss_of_step(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = _pairs(len(images), pairs, generator)
        tokens = class_tokens(tower, to_pixels(images[rows]))
        _, ends = caption_encoder(captions[rows * captions_per_image + random_rows(captions_per_image, len(rows), generator)])
        image_embeds = F.normalize(heads["image"](tokens[-1]).float(), dim=1)
        text_embeds = F.normalize(heads["text"](ends).float(), dim=1)
        logits = image_embeds @ text_embeds.T / 0.06
        same = torch.arange(len(rows), device=device)
        contrast = 0.5 * (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same))
        identity = _identity_loss(tokens[-1], heads)
        read = sum(attribute_loss(heads["attributes"][k](tokens[k]), targets[rows]) for k in range(1, 4))
        return {"contrast": 0.5 * contrast, "identity": 0.3 * identity, "attributes": read}

    modules = {"text_encoder": text_encoder, "tower": tower, "heads": heads}
    train("clip", folder, modules, loss_of_step, steps=steps, learning_rate=1e-3, warm_up=150, weight_decay=0.05, average=0.99)
    return tokenizer, text_encoder, tower, heads


def train_tower(folder: Path, drawings: Drawings, tower: VisionTransformer, heads: nn.ModuleDict, *, steps: int, pairs: int):
    """Train the tower further with a fixed text encoder: a small transformer learns shapes last."""
    device = default_device()
    images = torch.from_numpy(drawings.images).to(device)
    targets = attribute_targets(drawings).to(device)

    def loss_of_step(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = _pairs(len(images), pairs, generator)
        tokens = class_tokens(tower, to_pixels(images[rows]))
        read = sum(attribute_loss(heads["attributes"][k](tokens[k]), targets[rows]) for k in range(1, 4))
        return {"identity": 0.3 * _identity_loss(tokens[-1], heads), "attributes": read}

    modules = {"tower": tower, "heads": heads}
    train("tower", folder, modules, loss_of_step, steps=steps, learning_rate=1e-3, warm_up=50, weight_decay=0.05, average=0.99)


@torch.no_grad()
def probe(tower: VisionTransformer, heads: nn.ModuleDict, drawings: Drawings) -> dict[str, float]:
    """Accuracy of each attribute head on the last [CLS] token, and of retrieving the pair's other image."""
    tokens = torch.cat([class_tokens(tower, to_pixels(part))[-1] for part in torch.from_numpy(drawings.images).split(128)])
    logits = heads["attributes"][3](tokens).split(HEAD_SIZES, 1)
    result = {}
    for (kind, name, _), part, target in zip(HEADS, logits, attribute_targets(drawings).unbind(1), strict=True):
        some = target != ABSENT
        if some.any():
            result[f"{kind}.{name}"] = round(float((part.argmax(1) == target)[some].float().mean()), 3)
    who = F.normalize(heads["who"](tokens), dim=1)
    similarity = (who[0::2] @ who[1::2].T).argmax(1)
    result["retrieval"] = round(float((similarity == torch.arange(len(similarity))).float().mean()), 3)
    return result
