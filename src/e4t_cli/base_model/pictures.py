"""Pictures as numbers, and what the VAE says about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from PIL import Image
from torch import Tensor


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
    """Return the pictures of (batch, 3, height, width) in −1 … 1, and beyond as it is clipped."""
    colours = ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(one) for one in colours.permute(0, 2, 3, 1).cpu().numpy()]
