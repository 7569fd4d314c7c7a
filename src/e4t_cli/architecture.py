"""What kind of model a base is, whatever its weights: read from its configs, without torch.

A pack needs the very weights it was made for. When a base has others, equal configs tell another
training of the same model from another model; unequal ones may also be the same model, saved again
by another version of its library.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

CONFIGS = ("unet/config.json", "text_encoder/config.json")
TOWER_CONFIGS = ("open_clip_config.json", "config.json")
# Who wrote the file and how it was stored, which says nothing about the model.
_INCIDENTAL = {"architectures", "dtype", "torch_dtype", "transformers_version", "preprocess_cfg"}


def config_hash(folder: Path, tower: Path | None = None) -> str:
    """Return a SHA-256 of the configs of U-Net, text encoder and image tower.

    Args:
        folder: a base in diffusers' layout.
        tower: the folder of its image tower, if it is not the base's own.

    Returns:
        64 hexadecimal digits, or "" if there is no config that can be read.
    """
    found = {name: _essence(table) for name in CONFIGS if (table := _read(folder / name))}
    if about := _tower_config(tower or folder / "image_tower"):
        found["image_tower"] = _essence(about)
    if not found:
        return ""
    text = json.dumps(found, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def describe_tower(folder: Path, tower: Path | None = None) -> str:
    """Return a phrase about the CLIP tower of a base: "CLIP ViT, 32 layers of 1280, …"."""
    about = _tower_config(tower or folder / "image_tower")
    layers = about.get("layers", about.get("num_hidden_layers"))
    width = about.get("width", about.get("hidden_size"))
    if not layers or not width:
        return ""
    patch, side = about.get("patch_size", "?"), about.get("image_size", "?")
    return f"CLIP ViT, {layers} layers of {width}, patches of {patch}, {side} px"


def _tower_config(folder: Path) -> dict[str, Any]:
    for name in TOWER_CONFIGS:
        table = _read(folder / name)
        for part in ("model_cfg", "vision_cfg"):  # open_clip puts one into the other
            if isinstance(table.get(part), dict):
                table = table[part]
        if table:
            return table
    return {}


def _read(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # a base with a damaged config is refused where it is loaded
    return table if isinstance(table, dict) else {}


def _essence(table: Any) -> Any:
    if not isinstance(table, dict):
        return table
    return {
        key: _essence(value)
        for key, value in table.items()
        if not key.startswith("_") and key not in _INCIDENTAL
    }
