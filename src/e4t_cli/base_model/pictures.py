"""Pictures as numbers, and what the VAE says about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from PIL import Image
from torch import Tensor

from e4t_cli.errors import DivergedError


@dataclass(frozen=True, kw_only=True, eq=False)
class Posterior:
    """What the VAE says about a picture: a Gaussian over its latents, in the U-Net's units."""

    mean: Tensor  # (batch, channels, height, width)
    logvar: Tensor  # the same

    def sample(self, noise: Tensor) -> Tensor:
        """Return latents z_0 for standard normal `noise`."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise


def planes_of(images: Sequence[Image.Image], side: int, mode: str) -> Tensor:
    """Return pictures as bytes: (batch, side, side, 3) for RGB, without the 3 for L."""
    arrays = []
    for image in images:
        image = image.convert(mode)
        if image.size != (side, side):
            image = image.resize((side, side), Image.Resampling.LANCZOS)
        arrays.append(numpy.asarray(image))
    return torch.from_numpy(numpy.stack(arrays))


def pictures_of(decoded: Tensor) -> list[Image.Image]:
    """Return the pictures of (batch, 3, height, width) in −1 … 1, and beyond as it is clipped.

    Raises:
        DivergedError: a number is not finite; the picture would be black.
    """
    if not decoded.isfinite().all():
        raise DivergedError(
            "a picture came out of numbers that are not finite: too large for this number format",
            hint="draw it again with --dtype fp32",
        )
    colours = ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(one) for one in colours.permute(0, 2, 3, 1).cpu().numpy()]
