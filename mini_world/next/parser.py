"""Trains the face parser of the next `mini`, transformers' SegFormer, on exact label maps."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from mini_world.next.canvas import LABELS
from mini_world.next.data import Drawings
from mini_world.next.judge import pixels_at
from mini_world.next.loop import default_device, random_rows, train

HEAD = ("skin", "hair", "eyes", "mouth", "glasses", "beard")
STEPS = 6000  # about 12 minutes of one CPU core
TRAINED_SIDE = 64  # of the label maps in the loss; logits have a quarter of the image's side, 32


def build_parser() -> SegformerForSemanticSegmentation:
    """The untrained network."""
    torch.manual_seed(4)
    config = SegformerConfig(
        num_encoder_blocks=3,
        depths=[1, 1, 1],
        sr_ratios=[8, 4, 2],
        hidden_sizes=[32, 64, 96],
        patch_sizes=[7, 3, 3],
        strides=[4, 2, 2],
        num_attention_heads=[1, 2, 3],
        mlp_ratios=[2, 2, 3],
        decoder_hidden_size=64,
        classifier_dropout_prob=0.0,
        drop_path_rate=0.0,
        id2label=dict(enumerate(LABELS)),
        label2id={name: number for number, name in enumerate(LABELS)},
    )
    return SegformerForSemanticSegmentation(config)


def train_parser(folder: Path, drawings: Drawings, *, steps: int = STEPS, batch: int = 16) -> SegformerForSemanticSegmentation:
    """Train on drawings with their label maps."""
    device = default_device()
    parser = build_parser()

    def loss_of_step(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = random_rows(len(drawings), batch, generator)
        logits = parser(pixel_values=pixels_at(drawings.images, rows, device)).logits.float()
        logits = F.interpolate(logits, size=(TRAINED_SIDE, TRAINED_SIDE), mode="bilinear", align_corners=False)
        labels = drawings.labels[rows.cpu().numpy()][:, 1::2, 1::2]
        return {"loss": F.cross_entropy(logits, torch.from_numpy(numpy.ascontiguousarray(labels)).to(device).long())}

    train("parser", folder, {"parser": parser}, loss_of_step, steps=steps, learning_rate=2e-3, average=0.99)
    return parser


@torch.no_grad()
def head_iou(parser: SegformerForSemanticSegmentation, drawings: Drawings) -> float:
    """Intersection over union of the head (skin, hair, eyes, mouth, glasses, beard) on held-out drawings, at full size."""
    heads = torch.tensor([LABELS.index(name) for name in HEAD])
    inter = union = 0
    for rows in torch.arange(len(drawings)).split(64):
        labels = torch.from_numpy(numpy.ascontiguousarray(drawings.labels[rows.numpy()])).long()
        logits = parser(pixel_values=pixels_at(drawings.images, rows, parser.device)).logits
        found = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False).argmax(1).cpu()
        a, b = torch.isin(found, heads), torch.isin(labels, heads)
        inter, union = inter + int((a & b).sum()), union + int((a | b).sum())
    return inter / max(1, union)
