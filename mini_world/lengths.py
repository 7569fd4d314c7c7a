"""How long `make mini` trains what, on a CPU and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BASE_COUNT = 120_000
PORTRAITS = {"face": 24_000, "cat": 12_000, "art": 10_000}
HELD_OUT = {"face": 600, "cat": 300, "art": 300}


@dataclass(frozen=True)
class Round:
    """One cosine schedule of the U-Net's training: its steps, its peak learning rate, over how many encoded pictures.

    `words_rate`: the peak learning rate of the text encoder's layers, which contrast alone leaves with words that it had no
    need to tell apart. `twice`: subjects that are shown twice as often as they are drawn.
    """

    steps: int
    learning_rate: float
    pictures: int
    words_rate: float = 0.0
    twice: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lengths:
    """How long each network is trained, in steps, and on how much at once; batches are those of one process.

    `wordings`: of each picture; `clip_pairs`: pairs of pictures; `domain_batch`: of a domain's pre-training.
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
    pictures: dict[str, int]  # of each domain
    wordings: int = 8


CPU = Lengths(
    vae_crops=3000,
    vae_wholes=480,
    vae_batch=4,
    decoder=2400,
    clip=1150,
    clip_pairs=32,
    tower=900,
    unet=(
        Round(2800, 1e-3, 32_000, words_rate=2e-4),
        Round(4200, 6e-4, 64_000, words_rate=2e-4),
        # One drawing in ten is a dog: after two rounds their eyes were lost in a spotted coat.
        Round(4000, 6e-4, 64_000, words_rate=2e-4, twice=("dog",)),
    ),
    unet_batch=32,
    parser=900,
    judge=1200,
    face=1200,
    cat=800,
    art=700,
    domain_batch=32,
    pictures={"face": 13_600, "cat": 7200, "art": 6400},
)
# An hour of a card that is fed by a slow processor: seconds a step were .04 (autoencoder), .07 (contrast), .09 (U-Net) and
# .15 (a domain, three at once) on an H100.
CUDA = Lengths(
    vae_crops=1000,
    vae_wholes=8000,
    vae_batch=64,
    decoder=4000,
    clip=3000,
    clip_pairs=512,
    tower=1000,
    unet=(Round(16_000, 1e-3, BASE_COUNT, words_rate=2e-4),),
    unet_batch=512,
    parser=2000,
    judge=4000,
    face=3000,
    cat=2000,
    art=2000,
    domain_batch=128,
    pictures=PORTRAITS,
    wordings=4,
)


def lengths() -> Lengths:
    """The plan for this machine."""
    return CUDA if torch.cuda.is_available() else CPU
