"""One word embedding for all time steps, for programs that cannot predict it anew at each.

Departure: section 3.1 refines e_c at every step of drawing. Here it is the mean over the noise
levels that training sees, each of its own noisy view of the photo: what is left out is what the
refinement adds, and docs/mini.md has its size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from e4t_cli.base_model import TextToImageModel
from e4t_cli.domain import PreparedImage
from e4t_cli.nn.unet_features import encoder_half, pooled_features, stem
from e4t_cli.randomness import draw
from e4t_cli.tuned_model import TunedModel

LEVELS = 16
"""Noise levels looked at, each in its own range of time steps, as in a step of tuning."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FixedWord:
    """e_c without its time.

    Args:
        embedding: (embedding_width,), float32.
        variation: how far e_c strays from it over the noise levels, as a share of how far it is
            itself from the descriptor's embedding.
    """

    embedding: Tensor
    variation: float


@torch.no_grad()
def fixed_word(
    model: TextToImageModel, tuned: TunedModel, prepared: PreparedImage, *, seed: int = 0
) -> FixedWord:
    """Return the mean of e_c over noise levels of the photo.

    Args:
        model: the base that `tuned` was made from.
        prepared: the photo it was tuned on.
        seed: of the noise.
    """
    if not tuned.encoder.reads_unet:
        return FixedWord(embedding=tuned.embedding(None)[0], variation=0.0)
    draws = draw(
        seed, 0, range(LEVELS), batch_size=LEVELS, train_timesteps=model.train_timesteps,
        shape=model.latent_shape,
    ).to(model.device)  # fmt: skip
    z_0 = model.posterior(model.pixels([prepared.image])).sample(draws.posterior)
    z_t = model.add_noise(z_0, draws.epsilon, draws.timesteps).to(tuned.unet.dtype)
    nothing, seen = model.empty_text.to(z_t.dtype), []
    for level in range(LEVELS):  # one by one: it is done once, and large pictures fill a card
        one = slice(level, level + 1)
        start = stem(tuned.unet, z_t[one], draws.timesteps[one])
        seen.append(pooled_features(encoder_half(tuned.unet, start, nothing)).float())
    e_c = tuned.embedding(torch.cat(seen))
    mean = e_c.mean(dim=0)
    strayed = (e_c - mean).norm(dim=1).mean() / (mean - tuned.e_domain).norm().clamp(min=1e-12)
    return FixedWord(embedding=mean, variation=float(strayed))
