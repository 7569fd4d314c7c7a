"""Several photos of one subject: their latents, their mean image features, and which photo a sample is of.

Departure: the paper personalizes from one photo; with one, all of this is what it was.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.models.text_to_image import Posterior, TextToImageModel
from e4t_cli.nn.randomness import generator
from e4t_cli.registry.domain import PreparedImage

Photos = PreparedImage | Sequence[PreparedImage]  # one photo, or several of the same subject


def as_sequence(photos: Photos) -> Sequence[PreparedImage]:
    """Return the photos as a sequence; raises ValueError if there is none."""
    some = (photos,) if isinstance(photos, PreparedImage) else tuple(photos)
    if not some:
        raise ValueError("a concept needs a photo")
    return some


def encode_latents(model: TextToImageModel, photos: Sequence[PreparedImage]) -> Posterior:
    """Return the Gaussian over the latents of each photo, (photos, channels, height, width).

    One photo at a time: its latents do not depend on the others, and large images need the VAE's memory once.
    """
    each = [model.posterior(model.pixels([one.image])) for one in photos]
    return Posterior(mean=torch.cat([one.mean for one in each]), logvar=torch.cat([one.logvar for one in each]))


def mean_image_features(model: TextToImageModel, pretrained: DomainWeights, photos: Sequence[PreparedImage]) -> Tensor:
    """Return the mean over the photos of each vector of image features, (1, vectors, width), float32.

    Paper silent: its encoder sees one photo. `encode_image` is affine, in both encoders, so the mean of the features
    is the mean of what the encoder makes of each photo: the subject stays, pose and background average out, and the
    concept stores one set of features however many photos there are. The alternative, in tuning the features of the
    photo that a sample is of, would train the encoder on inputs that sampling, which is of no photo, never gives it.
    """
    each = [pretrained.image_features(model, model.pixels([one.image])) for one in photos]
    return each[0] if len(each) == 1 else torch.cat(each).mean(dim=0, keepdim=True)


def photo_of_samples(seed: int, step: int, *, photos: int, batch_size: int) -> Tensor:
    """Return the index of the photo that each sample of a step's batch is of, (batch,).

    Paper silent: one photo. Here the samples of a step, and those of any number of steps, are divided among the
    photos with counts that differ by one at most. Which sample is of which photo is drawn anew in each step, because
    sample k has the k-th range of noise levels: otherwise each photo would be seen at some of them only.
    """
    order = torch.randperm(batch_size, generator=generator(seed, "photos", step))
    return (step * batch_size + order) % photos
