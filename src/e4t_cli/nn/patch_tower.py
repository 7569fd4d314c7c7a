"""What the encoder of e4t-diffusion sees of a picture: [CLS] and patches of the last layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's normalisation of pixels in 0 … 1, for towers of every size."""


class PatchTower(nn.Module):
    """An open_clip vision transformer that returns [CLS] and every second patch.

    Args:
        visual: `open_clip.transformer.VisionTransformer` without its projection.
        size: side of the pictures it reads.
        normalised_patches: whether patches pass its last LayerNorm. open_clip returned them
            without when e4t-diffusion's weights were trained, and has since changed its mind.
    """

    def __init__(self, visual: nn.Module, size: int, *, normalised_patches: bool = False) -> None:
        super().__init__()
        self.visual = visual.requires_grad_(False)
        self.size = size
        self.normalised_patches = normalised_patches
        self.eval()

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Return (batch, vectors, width) in float32 for pixels in −1 … 1."""
        side = (self.size, self.size)
        # Without smoothing and corner on corner, as those weights were trained; no clamping.
        sized = functional.interpolate(
            pixels.float(), size=side, mode="bicubic", align_corners=True, antialias=False
        )
        mean, std = (sized.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        found = self.visual.forward_intermediates(
            (((sized + 1) / 2 - mean) / std).to(self.visual.conv1.weight.dtype),
            indices=1,  # the last layer
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        summary = self.visual.ln_post(found["image_intermediates_prefix"][0])
        patches = found["image_intermediates"][0]
        if self.normalised_patches:
            patches = self.visual.ln_post(patches)
        return torch.cat((summary, patches[:, 1::2]), dim=1).float()
