"""Reading a base from its folder: strictly, and without a look at the network."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from e4t_cli.errors import IntegrityError, WeightsUnavailable
from e4t_cli.nn.image_tower import ImageTower


def folder_fingerprint(folder: Path) -> str:
    """Return a short name for the content of a base's folder.

    Files of up to 64 MiB are read whole; of larger ones the length, the header and 64 blocks are,
    which tells one training from another in no time (integrity is checked elsewhere).
    """
    digest = hashlib.sha256()
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "image_tower")
    paths = sorted(path for part in parts for path in (folder / part).glob("*"))
    for path in paths:
        if path.suffix not in (".safetensors", ".json", ".txt"):
            continue
        if path.with_name(path.name.replace(".fp16.", ".")) in paths and ".fp16." in path.name:
            continue  # a second copy of the same numbers makes no other base
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


def load_part(
    kind: Any,
    folder: Path,
    device: str | torch.device,
    dtype: torch.dtype,
    *,
    half: bool = False,
) -> Any:
    """Read a part that has weights: diffusers' U-Net and VAE, transformers' text encoder.

    Args:
        dtype: of the numbers in memory, whatever the file holds.
        half: read the float16 file where there are both.
    """
    if not (folder / "config.json").is_file():
        raise WeightsUnavailable(f"the base is incomplete: there is no {folder.name}/config.json")
    names = [path.name for path in folder.glob("*.safetensors")]
    coarse = {name for name in names if ".fp16." in name or ".fp16-" in name}
    variant = "fp16" if coarse and (half or coarse == set(names)) else None
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
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
            transformers_logging.enable_progress_bar()
    # Both libraries answer a missing weight with a random one and a line in a log.
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
    except Exception as error:  # each library has its own idea of what a damaged file raises
        raise IntegrityError(f"the base's {folder.name} cannot be loaded: {error}") from error


def load_tower(folder: Path) -> ImageTower:
    """Read open_clip_config.json and model.safetensors, of the visual tower alone."""
    from open_clip.transformer import QuickGELU, VisionTransformer  # only who looks pays for it

    config_path, weights_path = folder / "open_clip_config.json", folder / "model.safetensors"
    if not config_path.is_file() or not weights_path.is_file():
        raise WeightsUnavailable(
            f"the base has no image tower: {folder} is incomplete",
            hint="e4t fetch sd14 brings the one of Stable Diffusion bases",
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
