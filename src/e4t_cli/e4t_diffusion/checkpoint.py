"""What lies in a folder of e4t-diffusion, as far as its names and its config.json tell."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e4t_cli.errors import IntegrityError, UsageError, printable

ENCODER, OFFSETS, UNET, PHOTO = "encoder.pt", "weight_offsets.pt", "unet.pt", "domain.png"
MOST_CONFIG_BYTES = 1_000_000
_USUAL_TOWER = "ViT-H-14::laion2b_s32b_b79k"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint folder.

    Args:
        folder: with config.json, encoder.pt, and weight_offsets.pt or unet.pt.
        weights: which of the two it has.
        base: the model it was trained on, as written there: a hub id or somebody's path.
        tower: open_clip's name of the image tower, and of the weights it began with.
        descriptor: the coarse word, "face".
        scale: s of eq. 1.
        tuned: whether it was tuned on one picture.
        photo: the picture it was tuned on, if it lies there.
    """

    folder: Path
    weights: str
    base: str
    tower: str
    descriptor: str
    scale: float
    tuned: bool
    photo: Path | None = None

    @property
    def files(self) -> tuple[str, str]:
        """The files with weights."""
        return ENCODER, self.weights

    @property
    def bytes(self) -> int:
        """Length of both."""
        return sum((self.folder / name).stat().st_size for name in self.files)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Look at a folder without opening any weights.

    Raises:
        UsageError: there is no such folder.
        IntegrityError: it is not one of e4t-diffusion's, or its config.json says nonsense.
    """
    shown = printable(str(folder))
    if not folder.is_dir():
        raise UsageError(f"there is no folder {shown}")
    weights = [name for name in (UNET, OFFSETS) if (folder / name).is_file()]
    present = {"config.json": (folder / "config.json").is_file()}
    present |= {ENCODER: (folder / ENCODER).is_file(), f"{OFFSETS} or {UNET}": bool(weights)}
    for name, there in present.items():
        if not there:
            raise IntegrityError(
                f"{shown} is not a checkpoint of e4t-diffusion: it has no {name}",
                hint="give the folder that its training wrote, or that its repository holds",
            )
    config = _read_config(folder / "config.json")
    training = config.get("pretrained_args", config)
    try:
        if not isinstance(training, dict):
            raise ValueError("pretrained_args is no table")
        scale = config.get("domain_embed_scale", training.get("domain_embed_scale", 0.1))
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < 1e3:
            raise ValueError(f"domain_embed_scale is {scale!r}")
        if not math.isfinite(scale):
            raise ValueError("domain_embed_scale is not finite")
        descriptor = _text(training, "domain_class_token").strip()
        if not descriptor:
            raise ValueError("domain_class_token is empty")
        return Checkpoint(
            folder=folder,
            weights=weights[0],
            base=_text(training, "pretrained_model_name_or_path"),
            tower=_text(training, "clip_model_name_or_path", _USUAL_TOWER),
            descriptor=descriptor,
            scale=float(scale),
            tuned="pretrained_args" in config or weights[0] == UNET,
            photo=folder / PHOTO if (folder / PHOTO).is_file() else None,
        )
    except ValueError as error:
        raise IntegrityError(
            f"config.json in {shown} cannot be used: {printable(str(error))}"
        ) from error


def _read_config(path: Path) -> dict[str, Any]:
    shown = printable(str(path))
    try:
        with path.open("rb") as file:
            data = file.read(MOST_CONFIG_BYTES + 1)
        if len(data) > MOST_CONFIG_BYTES:
            raise IntegrityError(f"{shown} is larger than a config can be")
        table = json.loads(data)
    except OSError as error:
        raise IntegrityError(f"{shown} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{shown} is not JSON") from error
    if not isinstance(table, dict):
        raise IntegrityError(f"{shown} holds no table")
    return table


def _text(table: dict[str, Any], key: str, default: str | None = None) -> str:
    value = table.get(key, default)
    value = default if value is None else value  # written as null where it was not given
    if not isinstance(value, str) or len(value) > 1000:
        raise ValueError(f"{key} is {value!r}, not a text")
    return value
