"""A domain's pictures, looked at once: latents and [CLS] features never change in training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from e4t_cli.base_model import TextToImageModel
from e4t_cli.domain import PreparedImage
from e4t_cli.errors import InputError
from e4t_cli.files import write_atomically
from e4t_cli.nn.losses import latent_mask
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.training_loss import half_precision


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
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
    batch: list[PreparedImage] = []
    count = 0

    def encode() -> None:
        pixels = model.pixels([one.image for one in batch])
        with half_precision(model.device, autocast):
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
