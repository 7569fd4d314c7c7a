"""What a face parser sees: a label for every pixel of a picture, and the labels' names.

A SegFormer through transformers, from a folder as `save_pretrained` writes it. Labels are known by
name only: revisions of the public parser number them differently, and some end in ".png".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e4t_cli import IntegrityError, PreparationTarget, WeightsUnavailable

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

PACKAGED = {"mini": Path(__file__).parent / "packs" / "face" / "parser-mini"}
"""Base name → the parser that came with this package."""

PUBLIC = "jonathandinu/face-parsing"
"""For photographs: 19 labels of CelebAMask-HQ. It states no licence; its data are for research."""

EYES = frozenset({"eyes", "l_eye", "r_eye"})
GLASSES = frozenset({"glasses", "eye_g"})
MOUTH = frozenset({"mouth", "u_lip", "l_lip"})
SKIN = frozenset({"skin", "nose", "beard"})
HEAD = (
    EYES | GLASSES | MOUTH | SKIN | {"hair", "brows", "l_brow", "r_brow", "ears", "l_ear", "r_ear"}
)
"""Labels that are the person rather than clothes, jewellery or place."""


@dataclass(frozen=True, eq=False)
class LabelMap:
    """A square picture, label by label.

    Args:
        labels: (side, side) int.
        names: of each label, as the model's configuration has them.
        certainty: (side, side) probability of the label.
    """

    labels: np.ndarray
    names: dict[int, str]
    certainty: np.ndarray

    def where(self, names: frozenset[str]) -> np.ndarray:
        """Return which pixels have one of these labels: (side, side) bool."""
        import numpy as np

        wanted = [index for index, name in self.names.items() if name in names]
        return np.isin(self.labels, wanted)


@dataclass(frozen=True, eq=False)
class Parser:
    """A network that labels faces.

    Args:
        model: SegformerForSemanticSegmentation, on its device.
        names: label → name.
        side: of the pictures it was trained on; None takes pictures as they are.
        mean, deviation: of its training pictures, per channel, in 0 to 1.
    """

    model: Any
    names: dict[int, str]
    side: int | None
    mean: Any
    deviation: Any

    def parse(self, images: Sequence[Image]) -> list[LabelMap]:
        """Label square pictures of one size, pixel by pixel of `side`, or of their own."""
        import torch

        batch = torch.stack([self._tensor(image) for image in images]).to(self.model.device)
        with torch.inference_mode():  # batch: (pictures, 3, side, side)
            logits = self.model(pixel_values=batch).logits  # (pictures, labels, side/4, side/4)
            logits = torch.nn.functional.interpolate(
                logits, size=batch.shape[-2:], mode="bilinear", align_corners=False
            )
            certainty, labels = logits.softmax(dim=1).max(dim=1)  # (pictures, side, side)
        pairs = zip(labels.cpu().numpy(), certainty.cpu().numpy(), strict=True)
        return [LabelMap(one, self.names, sure) for one, sure in pairs]

    def _tensor(self, image: Image) -> Any:
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
    if folder is not None and (folder / "config.json").is_file():
        return load_parser(folder, target.device)
    if target.fetch is None:
        raise WeightsUnavailable(f"there is no face parser for {target.base} here")
    return load_parser(target.fetch(PUBLIC), target.device)


@lru_cache(maxsize=2)
def load_parser(folder: Path, device: str = "cpu") -> Parser:
    """Load a parser and keep it.

    Raises:
        IntegrityError: its weights do not fit, or it names no part of a head.
    """
    import numpy as np
    from transformers import SegformerForSemanticSegmentation

    from e4t_cli import load_segmenter

    what = f"the face parser in {folder.name}"
    model = load_segmenter(SegformerForSemanticSegmentation, folder, what)
    names = {int(index): name.removesuffix(".png") for index, name in model.config.id2label.items()}
    if not HEAD.intersection(names.values()):
        raise IntegrityError(f"the face parser in {folder.name} names no part of a head")
    plan = _plan(folder)
    size = plan.get("size")
    side = size.get("height") if isinstance(size, dict) else size
    mean = np.array(plan.get("image_mean", [0.5] * 3), np.float32)
    deviation = np.array(plan.get("image_std", [0.5] * 3), np.float32)
    return Parser(model.eval().to(device), names, side, mean, deviation)


def _plan(folder: Path) -> dict[str, Any]:
    """Return how pictures are brought before it; the packaged parsers have no such file."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path.name} of {folder.name} cannot be read: {error}") from error
