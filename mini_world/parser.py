"""Trains the face parser of `mini`, transformers' SegFormer, on exact label maps."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from mini_world.canvas import LABELS
from mini_world.data import Drawings
from mini_world.loop import default_device, random_rows, train
from mini_world.vae import to_pixels


def train_parser(folder: Path, drawings: Drawings, *, steps: int, batch: int = 16) -> SegformerForSemanticSegmentation:
    """Train on drawings with their label maps; logits have a quarter of the image's side."""
    device = default_device()
    torch.manual_seed(4)
    config = SegformerConfig(
        num_encoder_blocks=3,
        depths=[1, 1, 1],
        sr_ratios=[4, 2, 1],
        hidden_sizes=[32, 64, 96],
        patch_sizes=[7, 3, 3],
        strides=[4, 2, 2],
        num_attention_heads=[1, 2, 3],
        mlp_ratios=[3, 3, 3],
        decoder_hidden_size=96,
        classifier_dropout_prob=0.0,
        drop_path_rate=0.0,
        id2label=dict(enumerate(LABELS)),
        label2id={name: number for number, name in enumerate(LABELS)},
    )
    parser = SegformerForSemanticSegmentation(config)
    images, labels = (torch.from_numpy(part).to(device) for part in (drawings.images, drawings.labels))

    def loss_of_step(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = random_rows(len(images), batch, generator)
        logits = parser(pixel_values=to_pixels(images[rows])).logits.float()
        logits = F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False)
        return {"loss": F.cross_entropy(logits, labels[rows].long())}

    train("parser", folder, {"parser": parser}, loss_of_step, steps=steps, learning_rate=2e-3, average=0.99)
    return parser


@torch.no_grad()
def head_iou(parser: SegformerForSemanticSegmentation, drawings: Drawings) -> float:
    """Intersection over union of the head (skin, hair, eyes, mouth, glasses, beard) on held-out drawings."""
    heads = torch.tensor([LABELS.index(name) for name in ("skin", "hair", "eyes", "mouth", "glasses", "beard")])
    inter = union = 0
    for images, labels in zip(
        torch.from_numpy(drawings.images).split(64), torch.from_numpy(drawings.labels).split(64), strict=True
    ):
        logits = parser(pixel_values=to_pixels(images).to(parser.device)).logits
        found = F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False).argmax(1).cpu()
        a, b = torch.isin(found, heads), torch.isin(labels.long(), heads)
        inter, union = inter + int((a & b).sum()), union + int((a | b).sum())
    return inter / max(1, union)
