"""What a conversion is asked for, and what it answers: values that survive a trip as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from e4t_cli.recipes import PretrainingRecipe, TuningRecipe

MERGED = "unet.safetensors"
"""What a tuned U-Net is called where it is wished for."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A checkpoint to read and a pack to write.

    Args:
        folder: of the checkpoint.
        weights: its second file, beside encoder.pt.
        tower: sizes of the image tower, as fields of `PatchEncoderConfig`; its widths are the
            checkpoint's own.
        sha256: file -> what it must be, as far as somebody declared it.
        name, descriptor, base, licence, image_tower, notes, templates: for the pack's card.
        tuning, pretraining: its recipes.
        keep_unet: write the merged weights of a tuned U-Net, too.
    """

    folder: str
    weights: str
    tower: Mapping[str, Any]
    name: str
    descriptor: str
    base: str
    tuning: TuningRecipe
    pretraining: PretrainingRecipe
    templates: tuple[str, ...]
    licence: str = ""
    image_tower: str = ""
    notes: str = ""
    sha256: Mapping[str, str] = field(default_factory=dict)
    keep_unet: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        fields = json.loads(text)
        fields["tuning"] = TuningRecipe.from_dict(fields["tuning"])
        fields["pretraining"] = PretrainingRecipe.from_dict(fields["pretraining"])
        fields["templates"] = tuple(fields["templates"])
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a conversion found.

    Args:
        offset_parameters, encoder_parameters: numbers in the checkpoint.
        offset_bytes: of the offsets in the pack, without the file's header.
        offset_error: largest difference of any ΔW from what its network computes layer by layer.
        offset_size: largest |ΔW|, for comparison.
        sha256: of the files that were read.
    """

    offset_parameters: int
    encoder_parameters: int
    offset_bytes: int
    offset_error: float
    offset_size: float
    sha256: Mapping[str, str]

    def sentence(self) -> str:
        """Return what people want to know of it."""
        return (
            f"{self.offset_parameters:,} numbers of weight offsets became "
            f"{self.offset_bytes / 1e6:.2f} MB of factors; the largest error of a ΔW is "
            f"{self.offset_error:.1e}, where the largest ΔW is {self.offset_size:.2g}"
        )
