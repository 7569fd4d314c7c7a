"""Segments faces: a label for every pixel of an image, and the names of the labels.

A SegFormer through transformers, from a folder as `save_pretrained` writes it. Labels are matched
by name: revisions of the public parser number them differently, and some names end in ".png".
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e4t_cli import IntegrityError, PreparationTarget, WeightsUnavailable

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor
    from transformers import SegformerForSemanticSegmentation

PACKAGED = {"mini": Path(__file__).parent / "packs" / "face" / "parser-mini"}
"""Base name → the parser that is part of this package."""

PUBLIC = "jonathandinu/face-parsing"
"""For photographs: 19 labels of CelebAMask-HQ. It states no licence; its data are for research."""

EYES = frozenset({"eyes", "l_eye", "r_eye"})
GLASSES = frozenset({"glasses", "eye_g"})
MOUTH = frozenset({"mouth", "u_lip", "l_lip"})
SKIN = frozenset({"skin", "nose", "beard"})
HEAD = EYES | GLASSES | MOUTH | SKIN | {"hair", "brows", "l_brow", "r_brow", "ears", "l_ear", "r_ear"}
"""Labels of the person rather than of clothes, jewellery or background."""


@dataclass(frozen=True, eq=False)
class LabelMap:
    """The labels of a square image.

    Args:
        labels: (side, side) int.
        names: label → name, from the model's configuration.
        confidence: (side, side) probability of the label.
    """

    labels: np.ndarray
    names: dict[int, str]
    confidence: np.ndarray

    def where(self, names: frozenset[str]) -> np.ndarray:
        """Return which pixels have one of these labels: (side, side) bool."""
        import numpy as np

        wanted = [index for index, name in self.names.items() if name in names]
        return np.isin(self.labels, wanted)


@dataclass(frozen=True, eq=False)
class Parser:
    """A network that segments faces.

    Args:
        model: SegformerForSemanticSegmentation, on its device.
        names: label → name.
        side: of its training images in pixels; None takes images as they are.
        mean, deviation: of its training images, per channel, in 0 to 1.
    """

    model: SegformerForSemanticSegmentation
    names: dict[int, str]
    side: int | None
    mean: np.ndarray
    deviation: np.ndarray

    def parse(self, images: Sequence[Image]) -> list[LabelMap]:
        """Segment square images of one size, at `side` × `side` or at their own resolution."""
        import torch

        batch = torch.stack([self._tensor(image) for image in images]).to(self.model.device)
        with torch.inference_mode():  # batch: (images, 3, side, side)
            logits = self.model(pixel_values=batch).logits  # (images, labels, side/4, side/4)
            logits = torch.nn.functional.interpolate(
                logits, size=batch.shape[-2:], mode="bilinear", align_corners=False
            )
            confidence, labels = logits.softmax(dim=1).max(dim=1)  # (images, side, side)
        pairs = zip(labels.cpu().numpy(), confidence.cpu().numpy(), strict=True)
        return [LabelMap(of_image, self.names, likely) for of_image, likely in pairs]

    def _tensor(self, image: Image) -> Tensor:
        import numpy as np
        import torch
        from PIL import Image as PILImage

        if self.side is not None and image.width != self.side:
            image = image.resize((self.side, self.side), PILImage.Resampling.LANCZOS)
        pixels = np.asarray(image, dtype=np.float32)
        pixels = pixels / (255 * self.deviation) - self.mean / self.deviation
        return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)  # (3, side, side)


def find_parser(target: PreparationTarget) -> Parser:
    """Return the parser for a base: the packaged one, or the public one from the hub.

    Raises:
        WeightsUnavailable: it is not on this machine and cannot be fetched.
        IntegrityError: its files do not fit.
    """
    folder = PACKAGED.get(target.base)
    if folder is not None and os.path.isfile(folder / "config.json"):
        return load_parser(folder, target.device)
    if target.fetch is None:
        raise WeightsUnavailable(f"there is no face parser for {target.base} here")
    return load_parser(target.fetch(PUBLIC), target.device)


@lru_cache(maxsize=2)
def load_parser(folder: Path, device: str = "cpu") -> Parser:
    """Load a parser; it is cached.

    Raises:
        IntegrityError: its weights do not fit, or none of its labels is part of a head.
    """
    import numpy as np
    from transformers import SegformerForSemanticSegmentation

    from e4t_cli import load_segmenter

    what = f"the face parser in {folder.name}"
    model = load_segmenter(SegformerForSemanticSegmentation, folder, what)
    names = {int(index): name.removesuffix(".png") for index, name in model.config.id2label.items()}
    if not HEAD.intersection(names.values()):
        raise IntegrityError(f"the face parser in {folder.name} has no label for a part of a head")
    config = _preprocessor_config(folder)
    size = config.get("size")
    side = size.get("height") if isinstance(size, dict) else size
    mean = np.array(config.get("image_mean", [0.5] * 3), np.float32)
    deviation = np.array(config.get("image_std", [0.5] * 3), np.float32)
    return Parser(model.eval().to(device), names, side, mean, deviation)


def _preprocessor_config(folder: Path) -> dict[str, Any]:
    """Return how images are normalized; the packaged parsers have no such file."""
    path = folder / "preprocessor_config.json"
    if not os.path.isfile(path):
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path.name} of {folder.name} cannot be read: {error}") from error
