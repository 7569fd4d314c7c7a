"""Which image tower a checkpoint means by open_clip's name of it.

What a conversion is asked for, and what it answers: values that survive a trip as JSON.

What lies in a folder of e4t-diffusion, as far as its names and its config.json tell.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from e4t_cli.errors import IntegrityError, UsageError, printable
from e4t_cli.registry.config import PretrainingConfig, TuningConfig

_PLAIN = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
"""What a plain vision transformer is described by; another key means another kind of tower."""
_MISLED = {"openai"}
"""Weights trained with the approximate GELU under names whose configs do not say so."""


def tower_sizes(name: str, *, normalised_patches: bool = False) -> dict[str, Any]:
    """Return the fields of `PatchEncoderConfig` that describe a tower.

    Args:
        name: "ViT-H-14::laion2b_s32b_b79k", or without the weights it began with.
        normalised_patches: see `PatchTower`.

    Raises:
        IntegrityError: open_clip has no plain vision transformer of that name.
    """
    model, _, weights = name.partition("::")
    path = configs_folder() / f"{model}.json"
    vision: dict[str, Any] = {}
    config: dict[str, Any] = {}
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", model) and path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        vision = config.get("vision_cfg", {})
    if not {"image_size", "layers", "width", "patch_size"} <= set(vision) <= _PLAIN:
        raise IntegrityError(
            f"the checkpoint's image tower {printable(name)!r} is no plain vision transformer of "
            "open_clip"
        )
    return {
        "tower_width": vision["width"],
        "tower_layers": vision["layers"],
        "tower_heads": vision["width"] // vision.get("head_width", 64),
        "tower_image_size": vision["image_size"],
        "tower_patch_size": vision["patch_size"],
        "tower_mlp_ratio": vision.get("mlp_ratio", 4.0),
        "tower_quick_gelu": bool(config.get("quick_gelu")) or weights in _MISLED,
        "normalised_patches": normalised_patches,
    }


def configs_folder() -> Path:
    """Return where open_clip keeps its configs; importing it would take seconds."""
    spec = find_spec("open_clip")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "model_configs"


MERGED = "unet.safetensors"
"""What a tuned U-Net is called where it is wished for."""


@dataclass(frozen=True, kw_only=True)
class ConversionRequest:
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
    tuning: TuningConfig
    pretraining: PretrainingConfig
    templates: tuple[str, ...]
    licence: str = ""
    image_tower: str = ""
    notes: str = ""
    sha256: Mapping[str, str] = field(default_factory=dict)
    keep_unet: bool = False

    def to_json(self) -> str:
        configs = {"tuning": self.tuning.as_dict(), "pretraining": self.pretraining.as_dict()}
        return json.dumps({**asdict(self), **configs})

    @classmethod
    def from_json(cls, text: str) -> Self:
        fields = json.loads(text)
        fields["tuning"] = TuningConfig.from_dict(fields["tuning"])
        fields["pretraining"] = PretrainingConfig.from_dict(fields["pretraining"])
        fields["templates"] = tuple(fields["templates"])
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class ConversionResult:
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


ENCODER, OFFSETS, UNET, PHOTO = "encoder.pt", "weight_offsets.pt", "unet.pt", "domain.png"
MAX_CONFIG_BYTES = 1_000_000
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
            data = file.read(MAX_CONFIG_BYTES + 1)
        if len(data) > MAX_CONFIG_BYTES:
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
