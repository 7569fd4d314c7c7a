"""Runs Stable Diffusion's safety checker on results, on by default (section 6 of the paper).

It compares an image's CLIP embedding with those of a list of concepts. A base with a `safety_checker/` is checked; a
base without one, such as `mini`, which can generate nothing that it would find, is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy
import torch
from PIL import Image

from e4t_cli.models.loading import load_part, load_settings

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

FOLDER, PROCESSOR = "safety_checker", "feature_extractor"


class SafetyChecker:
    """Decides which images are withheld.

    Args:
        checker: diffusers' checker.
        processor: transformers' CLIPImageProcessor; its type differs between versions.
    """

    def __init__(self, checker: StableDiffusionSafetyChecker, processor: Any) -> None:
        self.checker = checker.train(False).requires_grad_(False)
        self.processor = processor

    @classmethod
    def of_base(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> Self | None:
        """Load the checker of a base, or return None where it has none.

        Raises:
            IntegrityError: it is damaged; images are not generated unchecked then.
        """
        if not (folder / FOLDER / "config.json").is_file():
            return None
        # Not at the top: two seconds of imports for the one family of bases that has it.
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        checker = load_part(StableDiffusionSafetyChecker, folder / FOLDER, device, dtype)
        if not (folder / PROCESSOR).is_dir():
            return cls(checker, CLIPImageProcessor())
        return cls(checker, load_settings(CLIPImageProcessor, folder / PROCESSOR))

    @torch.no_grad()
    def flags(self, images: Sequence[Image.Image]) -> list[bool]:
        """Return for each image whether it has to be withheld."""
        pixels = self.processor(list(images), return_tensors="pt").pixel_values
        weight = next(self.checker.parameters())
        # It blackens flagged images in a second array; only the flags are needed.
        unused = numpy.zeros((len(images), 1, 1, 3), dtype=numpy.float32)
        _, flagged = self.checker(pixels.to(weight.device, weight.dtype), unused)
        return [bool(flag) for flag in flagged]
