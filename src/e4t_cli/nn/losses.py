"""The three terms of section 3: eq. 4, eq. 2, and their sum, eq. 5.

L = L_diffusion + λ_r · L_reg
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

SMALLEST_MASK = 0.01
"""Share of the picture under which a mask is taken for a failed one."""


def diffusion_loss(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Eq. 4 for each sample, inside the mask: Σ m·(prediction − target)² / (Σ m · channels).

    Args:
        prediction, target: (batch, channels, height, width).
        mask: soft weights in 0 … 1 (batch, height, width), or None for the whole picture.

    Returns:
        The loss of each sample, (batch,). Each is normalised by its own mask, so that neither the
        size of a subject nor the split into micro-batches changes its weight.
    """
    squared = (prediction - target).square()  # in the target's precision, not in bfloat16
    if mask is None:
        return squared.mean(dim=(1, 2, 3))
    weight = mask.unsqueeze(1)  # (batch, 1, height, width)
    return (weight * squared).sum(dim=(1, 2, 3)) / (weight.sum(dim=(1, 2, 3)) * squared.shape[1])


def embedding_penalty(offset: Tensor) -> Tensor:
    """Eq. 2, ‖E(I_c)‖², for each sample: on the encoder's output, not on e_c. (batch,)."""
    return offset.square().sum(dim=1)


def latent_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring a mask of the picture to the size of its latents.

    Paper silent: by area, so that a border latent counts in part; and a mask of under 1 % of the
    picture is taken for "nothing found" and replaced by the whole picture.

    Args:
        mask: (batch, height, width) in 0 … 1.
        size: height and width of the latents.

    Returns:
        (batch, *size) in 0 … 1.
    """
    small = functional.adaptive_avg_pool2d(mask.unsqueeze(1), size).squeeze(1)
    found = small.mean(dim=(1, 2), keepdim=True) >= SMALLEST_MASK
    return small.where(found, small.new_ones(()))
