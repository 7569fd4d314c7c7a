"""The hierarchy of [CLS] tokens that the encoder starts from (section 3.1).

"We extract the features of the [CLS] token of each 2nd CLIP layer as an hierarchical feature
representation": 16 vectors of 1280 numbers from OpenCLIP's ViT-H/14.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class ImageTower(nn.Module):
    """An open_clip vision transformer that returns its hierarchy of [CLS] tokens (section 3.1).

    Args:
        visual: `open_clip.transformer.VisionTransformer`.
        mean, std: normalisation of pixels in 0 … 1.
        size: side of the pictures it reads.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, visual: nn.Module, mean: Sequence[float], std: Sequence[float], size: int
    ) -> None:
        super().__init__()
        # Paper silent: the backbone stays as CLIP training left it, so one look is enough.
        self.visual = visual.requires_grad_(False)
        self.size = size
        self.width = visual.class_embedding.shape[0]
        self.indices = list(range(1, len(visual.transformer.resblocks), 2))  # every 2nd layer
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (batch, layers, width) in float32 for pixels in −1 … 1."""
        colours = (pixels.float() + 1) / 2
        if pixels.shape[-1] != self.size:
            colours = functional.interpolate(
                colours, size=(self.size, self.size), mode="bicubic", antialias=True
            ).clamp(0, 1)
        weights = self.visual.conv1.weight
        found = self.visual.forward_intermediates(
            ((colours - self.mean.float()) / self.std.float()).to(weights.dtype),
            indices=self.indices,
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )["image_intermediates_prefix"]
        # Paper silent: through the tower's final LayerNorm, since raw [CLS] grows with depth.
        return self.visual.ln_post(torch.cat(found, dim=1)).float()
