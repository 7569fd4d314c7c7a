"""The safety checker that Stable Diffusion ships with, on by default (section 6 of the paper).

It compares a picture's CLIP embedding with those of a list of concepts. A base that has one keeps
it in `safety_checker/`, beside `feature_extractor/`; a base without one, such as `mini`, which can
draw nothing that it would look for, is not checked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy
import torch
from PIL import Image

from e4t_cli.errors import IntegrityError
from e4t_cli.models.loading import load_part

FOLDER, SETTINGS = "safety_checker", "feature_extractor/preprocessor_config.json"

SIZE = 224
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's pictures, where the base's settings do not say."""


class SafetyChecker:
    """Tells which pictures should not be shown.

    Args:
        checker: diffusers' StableDiffusionSafetyChecker.
        size, mean, deviation: of the pictures it reads.
    """

    def __init__(
        self,
        checker: Any,
        *,
        size: int = SIZE,
        mean: Sequence[float] = MEAN,
        deviation: Sequence[float] = DEVIATION,
    ) -> None:
        self.checker = checker.eval().requires_grad_(False)
        self.size = size
        self.mean, self.deviation = numpy.array(mean), numpy.array(deviation)

    @classmethod
    def of_base(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> Self | None:
        """Load the checker of a base, or return None where it has none.

        Raises:
            IntegrityError: it is damaged; pictures are then not drawn without it in silence.
        """
        if not (folder / FOLDER / "config.json").is_file():
            return None
        # Not at the top: two seconds of imports for the one family of bases that has it.
        from diffusers.pipelines.stable_diffusion.safety_checker import (
            StableDiffusionSafetyChecker,
        )

        checker = load_part(StableDiffusionSafetyChecker, folder / FOLDER, device, dtype)
        settings: dict[str, Any] = {}
        path = folder / SETTINGS
        try:
            if path.is_file():
                settings = json.loads(path.read_text(encoding="utf-8"))
            size = settings.get("crop_size", SIZE)
            size = size["height"] if isinstance(size, dict) else size
            return cls(
                checker,
                size=int(size),
                mean=settings.get("image_mean", MEAN),
                deviation=settings.get("image_std", DEVIATION),
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"the base's {SETTINGS} cannot be used: {error}") from error

    @torch.no_grad()
    def flags(self, images: Sequence[Image.Image]) -> list[bool]:
        """Return for each picture whether it has to be withheld."""
        arrays = []
        for image in images:
            small = image.convert("RGB").resize((self.size, self.size), Image.Resampling.BICUBIC)
            arrays.append((numpy.asarray(small) / 255 - self.mean) / self.deviation)
        weight = next(self.checker.parameters())
        pixels = torch.from_numpy(numpy.stack(arrays)).permute(0, 3, 1, 2)
        # It blackens what it flags in the array beside; we only want to know.
        beside = numpy.zeros((len(images), 1, 1, 3), dtype=numpy.float32)
        _, flagged = self.checker(clip_input=pixels.to(weight.device, weight.dtype), images=beside)
        return [bool(one) for one in flagged]
