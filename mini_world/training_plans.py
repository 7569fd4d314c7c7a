"""Training steps, batch sizes and data sizes of `make mini`, on a CPU and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BASE_COUNT = 120_000
PORTRAITS = {"face": 24_000, "cat": 12_000, "art": 10_000}
HELD_OUT = {"face": 600, "cat": 300, "art": 300}


@dataclass(frozen=True)
class Round:
    """One cosine schedule of the U-Net's training: steps, peak learning rate, number of encoded images.

    `text_encoder_lr`: the peak learning rate of the text encoder's layers; contrastive training alone leaves words that it
    does not distinguish. `oversampled`: subjects that are used twice as often.
    """

    steps: int
    learning_rate: float
    images: int
    text_encoder_lr: float = 0.0
    oversampled: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainingPlan:
    """Training steps and batch size of each network; batch sizes are per process.

    `captions_per_image`: variants of a caption; `clip_pairs`: pairs of images in a batch; `domain_batch`: of pre-training.
    """

    vae_crops: int
    vae_wholes: int
    vae_batch: int
    decoder: int
    clip: int
    clip_pairs: int
    tower: int
    unet: tuple[Round, ...]
    unet_batch: int
    parser: int
    judge: int
    face: int
    cat: int
    art: int
    domain_batch: int
    images: dict[str, int]  # of each domain
    captions_per_image: int = 8


CPU = TrainingPlan(
    vae_crops=3000,
    vae_wholes=480,
    vae_batch=4,
    decoder=2400,
    clip=1150,
    clip_pairs=32,
    tower=900,
    unet=(
        Round(2800, 1e-3, 32_000, text_encoder_lr=2e-4),
        Round(4200, 6e-4, 64_000, text_encoder_lr=2e-4),
        # One drawing in ten is a dog; after two rounds dogs with a spotted coat had no eyes.
        Round(4000, 6e-4, 64_000, text_encoder_lr=2e-4, oversampled=("dog",)),
    ),
    unet_batch=32,
    parser=900,
    judge=1200,
    face=1200,
    cat=800,
    art=700,
    domain_batch=32,
    images={"face": 13_600, "cat": 7200, "art": 6400},
)
# One hour of a GPU that is bound by a slow CPU: on an H100 a step took .04 s (VAE), .07 s (CLIP), .09 s (U-Net) and .15 s (a
# domain, three at once).
CUDA = TrainingPlan(
    vae_crops=1000,
    vae_wholes=8000,
    vae_batch=64,
    decoder=4000,
    clip=3000,
    clip_pairs=512,
    tower=1000,
    unet=(Round(16_000, 1e-3, BASE_COUNT, text_encoder_lr=2e-4),),
    unet_batch=512,
    parser=2000,
    judge=4000,
    face=3000,
    cat=2000,
    art=2000,
    domain_batch=128,
    images=PORTRAITS,
    captions_per_image=4,
)


def training_plan() -> TrainingPlan:
    """The plan for this machine."""
    return CUDA if torch.cuda.is_available() else CPU
