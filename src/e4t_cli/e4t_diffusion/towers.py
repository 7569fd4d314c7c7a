"""Which image tower a checkpoint means by open_clip's name of it."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from e4t_cli.errors import IntegrityError, printable

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
