"""Encodes training images: VAE latents and [CLS] features, which never change in training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Protocol, Self

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from e4t_cli.datasets.reader import SIGNATURE
from e4t_cli.errors import InputError
from e4t_cli.files import write_atomically
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.precision import PrecisionPolicy, half_precision
from e4t_cli.nn.randomness import choose, epoch_order, uniforms
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.registry.domain import PreparedImage
from e4t_cli.training.loss import latent_mask


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedRows:
    """Encoded images, one row a sample; on any device, in any dtype."""

    means: Tensor  # of the VAE's posterior (rows, channels, height, width)
    logvars: Tensor
    image_features: Tensor  # [CLS] of every second layer (rows, layers, width)
    masks: Tensor | None = None  # soft weights at latent size (rows, height, width)

    def __len__(self) -> int:
        return len(self.means)


class TrainingData(Protocol):
    """The samples of a training run: `EncodedImages`, or images that are encoded on the fly.

    `rows` is a pure function of its arguments, which makes resumed runs exact. A run reads its
    steps in order, and within a step its micro-batches in order.
    """

    @property
    def fingerprint(self) -> str:
        """Identifies content and settings, so that a run is not resumed on other images."""
        ...

    def __len__(self) -> int:
        """How many images there are, for the domain's manifest."""
        ...

    def rows(self, *, seed: int, step: int, positions: range, batch_size: int) -> EncodedRows:
        """Return the samples at some positions of one step's batch.

        Args:
            seed: of the run.
            step: steps done before this one, 0 …
            positions: which samples of the batch: one process's micro-batch, without gaps.
            batch_size: of the whole batch, over all processes and micro-batches.
        """
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedImages(EncodedRows):
    """A domain's encoded images in memory.

    Args:
        encoder_index: for each image the indices of images of the same concept (count, k), one
            of which is the encoder's input in its place. Departure: None, the paper's way, gives
            it the very image that it has to reproduce, background and all.
    """

    encoder_index: Tensor | None = None

    def rows(self, *, seed: int, step: int, positions: range, batch_size: int) -> EncodedRows:
        """Visit all images once an epoch, in a new order (see `TrainingData`)."""
        index = epoch_indices(seed, step, positions, batch_size, len(self))
        shown = index
        if self.encoder_index is not None:
            numbers = uniforms(seed, step, batch_size)[positions.start : positions.stop, 2]
            choice = choose(numbers, self.encoder_index.shape[1])
            shown = self.encoder_index[index, choice].long()
        return EncodedRows(
            means=self.means[index],
            logvars=self.logvars[index],
            image_features=self.image_features[shown],
            masks=None if self.masks is None else self.masks[index],
        )

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file."""
        tensors = {key: value.contiguous() for key, value in vars(self).items() if value is not None}
        write_atomically(path, save(tensors))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote."""
        return cls(**load_file(path))

    @property
    def fingerprint(self) -> str:
        """Identifies the content (see `TrainingData`)."""
        digest = hashlib.sha256()
        for key, value in vars(self).items():
            if value is not None:
                digest.update(f"{key}{tuple(value.shape)}".encode())
                digest.update(value.contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()[:32]


def epoch_indices(seed: int, step: int, positions: range, batch_size: int, count: int) -> Tensor:
    """Return which of `count` images are at some positions of one step's batch, (positions,).

    Each epoch visits every image once, in an order of its own; a batch may span two epochs.
    """
    samples = [step * batch_size + position for position in positions]
    orders = {epoch: _order(seed, epoch, count) for epoch in {one // count for one in samples}}
    return torch.stack([orders[one // count][one % count] for one in samples])


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> Tensor:
    return epoch_order(seed, epoch, count)


def encode_images(
    model: TextToImageModel,
    images: Iterable[PreparedImage],
    *,
    batch_size: int | None = None,
    total: int = 0,
    autocast: bool | None = False,
    on_progress: ProgressCallback | None = None,
) -> EncodedImages:
    """Encode every image once: latents, [CLS] features, masks; in float16 on the CPU.

    Args:
        images: prepared images; masks are kept if every image has one.
        batch_size: None for as many as a small GPU holds.
        total: how many there are, for progress reports.
        autocast: encode in bfloat16, which is less exact than what is stored; None where the
            hardware multiplies bfloat16.

    Raises:
        InputError: there are none.
    """
    precision = PrecisionPolicy.resolve(model.device, model.dtype, autocast, loss_scaling=False)
    # The VAE's first layers are the largest tensors of all: about eight images of 512 pixels.
    batch_size = batch_size or max(1, min(32, 8 * 512**2 // model.resolution**2))
    parts: list[EncodedRows] = []
    source, count = iter(images), 0
    while batch := list(islice(source, batch_size)):
        count += len(batch)
        pixels = model.pixels([one.image for one in batch])
        with half_precision(model.device, precision.half):
            posterior, features = model.posterior(pixels), model.image_features(pixels)
        found = [one.mask for one in batch if one.mask is not None]
        masks = None
        if len(found) == len(batch):
            masks = latent_mask(model.masks(found), model.latent_shape[1:]).half().cpu()
        means, logvars = posterior.mean.half().cpu(), posterior.logvar.half().cpu()
        rows = features.half().cpu()
        parts.append(EncodedRows(means=means, logvars=logvars, image_features=rows, masks=masks))
        if on_progress:
            on_progress(Progress(stage="encode", done=count, total=total))
    if not parts:
        raise InputError("there are no images to train on")
    masked = [part.masks for part in parts if part.masks is not None]
    return EncodedImages(
        means=torch.cat([part.means for part in parts]),
        logvars=torch.cat([part.logvars for part in parts]),
        image_features=torch.cat([part.image_features for part in parts]),
        masks=torch.cat(masked) if len(masked) == len(parts) else None,
    )


def bytes_per_image(model: TextToImageModel, *, mask: bool) -> int:
    """Return the size of an encoded image in the cache."""
    channels, height, width = model.latent_shape
    tower = model.image_tower
    values = 2 * channels * height * width + len(tower.indices) * int(tower.width)
    return 2 * (values + (height * width if mask else 0)) + 33 + SIGNATURE
