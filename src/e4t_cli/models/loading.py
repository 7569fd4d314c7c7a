"""Loads the parts of a base from its folder, strictly and offline, and hashes its configs.

Domain weights need the very base they were trained for. When a base has other weights, equal
configs tell another training of the same model from another model; configs that differ may also
be the same model, saved by another version of its library.
"""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from e4t_cli.errors import IntegrityError, WeightsUnavailable
from e4t_cli.nn.word_embedding_encoder import ImageTower

CONFIGS = ("unet/config.json", "text_encoder/config.json")
TOWER_CONFIGS = ("open_clip_config.json", "config.json")
# Who wrote the file and how it was stored: not part of the model.
_INCIDENTAL = {"architectures", "dtype", "torch_dtype", "transformers_version", "preprocess_cfg"}


def config_hash(folder: Path, tower: Path | None = None) -> str:
    """Return a SHA-256 of the configs of a base, "" if none can be read.

    Args:
        folder: in diffusers' layout.
        tower: the folder of the visual tower, if that is outside the base.
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
    return {key: _essence(value) for key, value in table.items() if not key.startswith("_") and key not in _INCIDENTAL}


def folder_fingerprint(folder: Path) -> str:
    """Return a hash of the content of a base's folder, 32 hexadecimal digits.

    Files of up to 64 MiB are read whole; of larger ones the size, the header and 64 blocks, which
    is fast and tells one training from another (integrity is checked elsewhere).
    """
    digest = hashlib.sha256()
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "image_tower")
    paths = sorted(path for part in parts for path in (folder / part).glob("*"))
    for path in paths:
        if path.suffix not in (".safetensors", ".json", ".txt"):
            continue
        if path.with_name(path.name.replace(".fp16.", ".")) in paths and ".fp16." in path.name:
            continue  # a second copy of the same weights makes no other base
        size, block = path.stat().st_size, 1 << 20
        digest.update(f"{path.parent.name}/{path.name}:{size}\n".encode())
        starts = range(0, size, block)
        if len(starts) > 64:
            starts = range(0, size, size // 64)
        with path.open("rb") as file:
            for start in starts:
                file.seek(start)
                digest.update(file.read(block))
    return digest.hexdigest()[:32]


# While diffusers and transformers load, torch's default dtype and `register_parameter` are changed
# for the whole process; two loads at once would leave them changed for good.
_LOADING = threading.Lock()


def load_part(kind: Any, folder: Path, device: str | torch.device, dtype: torch.dtype, *, half: bool = False) -> Any:
    """Read a part that has weights: diffusers' U-Net and VAE, transformers' text encoder.

    Args:
        dtype: in memory, whatever the file has.
        half: read the float16 file where there are both.
    """
    if not (folder / "config.json").is_file():
        raise WeightsUnavailable(f"the base is incomplete: there is no {folder.name}/config.json")
    names = [path.name for path in folder.glob("*.safetensors")]
    coarse = {name for name in names if ".fp16." in name or ".fp16-" in name}
    variant = "fp16" if coarse and (half or coarse == set(names)) else None
    with _LOADING:
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            part, report = kind.from_pretrained(
                folder,
                dtype=dtype,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise IntegrityError(f"the base's {folder.name} cannot be loaded: {error}") from error
        finally:
            if bars:
                transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    # Both libraries initialize missing weights at random and only log it.
    wrong = [*report["missing_keys"], *report["mismatched_keys"]]
    if wrong:
        raise IntegrityError(f"the base's {folder.name} lacks {len(wrong)} weights, as {wrong[0]}")
    return part.to(device)


def load_settings(kind: Any, folder: Path) -> Any:
    """Read a part that has no weights: the tokenizer, the noise schedule."""
    if not folder.is_dir():
        raise WeightsUnavailable(f"the base is incomplete: there is no {folder.name}")
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # what a damaged file raises differs between the libraries
        raise IntegrityError(f"the base's {folder.name} cannot be loaded: {error}") from error


def load_tower(folder: Path) -> ImageTower:
    """Read a visual tower from open_clip_config.json and model.safetensors."""
    from open_clip.transformer import QuickGELU, VisionTransformer  # slow to import

    config_path, weights_path = folder / "open_clip_config.json", folder / "model.safetensors"
    if not config_path.is_file() or not weights_path.is_file():
        raise WeightsUnavailable(
            f"the base has no image tower: {folder} is incomplete",
            hint="e4t fetch sd14 downloads the one of Stable Diffusion bases",
        )
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        model, preprocess = config["model_cfg"], config["preprocess_cfg"]
        options = dict(model["vision_cfg"])
        options.setdefault("mlp_ratio", 4.0)
        if model.get("quick_gelu"):
            options["act_layer"] = QuickGELU
        heads = options["width"] // options.pop("head_width", 64)
        with torch.device("meta"):
            visual = VisionTransformer(heads=heads, output_dim=model["embed_dim"], **options)
        visual.load_state_dict(load_file(weights_path), strict=True, assign=True)
        size = preprocess.get("size", options["image_size"])
        side = size if isinstance(size, int) else size[0]
        return ImageTower(visual, preprocess["mean"], preprocess["std"], side)
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise IntegrityError(f"the image tower in {folder} cannot be used: {error}") from error
