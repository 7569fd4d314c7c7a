"""A domain's pictures, looked at once: latents and [CLS] features never change in training.

How pre-training looks at pictures, kept or not: what it keeps of one, and how many at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
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
    """What training sees of some pictures, one row a sample; on any device, in any precision.

    Args:
        means, logvars: the VAE's posterior (rows, channels, height, width).
        image_features: [CLS] of every second layer (rows, layers, width), of the picture that the
            encoder is shown.
        masks: soft weights at latent size (rows, height, width), or None.
    """

    means: Tensor
    logvars: Tensor
    image_features: Tensor
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.means)


class TrainingData(Protocol):
    """Where a training run's samples come from: `EncodedImages`, or pictures that are read as
    they are needed.

    `rows` is a pure function: asked again for the same place it gives the same rows, whatever was
    asked before, by whichever process and in whichever order. All that resuming needs follows
    from that. A run asks for its steps in order, and within a step for its micro-batches in order.
    """

    @property
    def fingerprint(self) -> str:
        """Identify content and settings, so that a run is not resumed on other pictures."""
        ...

    def __len__(self) -> int:
        """How many pictures there are; they go onto the domain's card."""
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
class EncodedImages:
    """A domain's pictures as training sees them.

    Args:
        means, logvars: the VAE's posterior of each picture (count, channels, height, width).
        image_features: [CLS] of every second layer (count, layers, width).
        masks: soft weights at latent size (count, height, width), or None.
        encoder_index: for each picture the indices of pictures of the same concept (count, k), one
            of which the encoder is shown in its place. Departure: None, the paper's way, shows it
            the very picture it has to reproduce, background and all.
    """

    means: Tensor
    logvars: Tensor
    image_features: Tensor
    masks: Tensor | None = None
    encoder_index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.means)

    def rows(self, *, seed: int, step: int, positions: range, batch_size: int) -> EncodedRows:
        """Walk through a new order of all pictures in each epoch (see `TrainingData`)."""
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
        tensors = {
            key: value.contiguous() for key, value in vars(self).items() if value is not None
        }
        write_atomically(path, save(tensors))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote."""
        return cls(**load_file(path))

    @property
    def fingerprint(self) -> str:
        """Identify the content, so that a run is not resumed on other pictures."""
        digest = hashlib.sha256()
        for key, value in vars(self).items():
            if value is not None:
                digest.update(f"{key}{tuple(value.shape)}".encode())
                digest.update(value.contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()[:32]


def epoch_indices(seed: int, step: int, positions: range, batch_size: int, count: int) -> Tensor:
    """Return which of `count` pictures stand at some positions of one step's batch, (positions,).

    Each epoch visits every picture once, in an order of its own; a batch may span two epochs.
    """
    places = [step * batch_size + position for position in positions]
    orders = {epoch: _order(seed, epoch, count) for epoch in {place // count for place in places}}
    return torch.stack([orders[place // count][place % count] for place in places])


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> Tensor:
    return epoch_order(seed, epoch, count)


def encode_images(
    model: TextToImageModel,
    images: Iterable[PreparedImage],
    *,
    batch_size: int = 32,
    total: int = 0,
    autocast: bool | None = False,
    on_progress: ProgressCallback | None = None,
) -> EncodedImages:
    """Look at every picture once: latents, [CLS] features, masks; in float16 on the CPU.

    Args:
        images: prepared pictures; masks are kept if every picture has one.
        total: how many there are, for progress reports.
        autocast: look in bfloat16, which is less exact than what is stored; None where the
            hardware has such products.

    Raises:
        InputError: there are none.
    """
    precision = PrecisionPolicy.resolve(model.device, model.dtype, autocast, loss_scaling=False)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
    batch: list[PreparedImage] = []
    count = 0

    def encode() -> None:
        pixels = model.pixels([one.image for one in batch])
        with half_precision(model.device, precision.half):
            posterior, features = model.posterior(pixels), model.image_features(pixels)
        masks = None
        if all(one.mask is not None for one in batch):
            whole = model.masks([one.mask for one in batch if one.mask is not None])
            masks = latent_mask(whole, model.latent_shape[1:]).half().cpu()
        parts.append(
            (*(x.half().cpu() for x in (posterior.mean, posterior.logvar, features)), masks)
        )
        batch.clear()
        if on_progress:
            on_progress(Progress(stage="encode", done=count, total=total))

    for prepared in images:
        batch.append(prepared)
        count += 1
        if len(batch) == batch_size:
            encode()
    if batch:
        encode()
    if not parts:
        raise InputError("there are no pictures to train on")
    means, logvars, features = (torch.cat([part[i] for part in parts]) for i in range(3))
    masks = [part[3] for part in parts if part[3] is not None]
    return EncodedImages(
        means=means,
        logvars=logvars,
        image_features=features,
        masks=torch.cat(masks) if len(masks) == len(parts) else None,
    )


def bytes_per_picture(model: TextToImageModel, *, mask: bool) -> int:
    """Return what a picture takes in the cache."""
    channels, height, width = model.latent_shape
    tower = model.image_tower
    numbers = 2 * channels * height * width + len(tower.indices) * tower.width
    return 2 * (numbers + (height * width if mask else 0)) + 33 + SIGNATURE


def look(
    model: TextToImageModel,
    pictures: Iterable[PreparedImage],
    on_progress: ProgressCallback | None = None,
) -> EncodedRows:
    """Return what training sees of prepared pictures, in their order."""
    # The VAE's first layers are the largest tensors of all: about eight pictures of 512 pixels.
    batch = max(1, min(32, 8 * 512**2 // model.resolution**2))
    found = encode_images(model, pictures, batch_size=batch, on_progress=on_progress)
    return EncodedRows(
        means=found.means,
        logvars=found.logvars,
        image_features=found.image_features,
        masks=found.masks,
    )
