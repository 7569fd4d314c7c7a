"""Whether a folder in diffusers' layout holds a model that E4T works with, by its configs alone.

Configs come from strangers: they can be of any size, depth and type.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from e4t_cli.errors import IntegrityError, printable

USABLE = "Stable Diffusion 1 and 2 in diffusers' layout can be used"
MAX_CONFIG = 32 << 20  # bytes: a tokenizer.json has 4 MB
MAX_SIDE = 4096  # pixels
MAX_TIMESTEPS = 100_000  # Stable Diffusion has 1,000
# Modules are built before a file is compared with them, so their number is bounded.
MAX_WIDTH = 65_536  # of any layer; the widest of Stable Diffusion has 10,240
MAX_BLOCKS = 16
MAX_PARAMETERS = 20_000_000_000  # of one part; Stable Diffusion's U-Net has 0.9
_LIMITS = {
    "layers_per_block": 32,
    "transformer_layers_per_block": 32,
    "num_hidden_layers": 256,
    "layers": 256,
    "vocab_size": 1 << 20,
    "image_size": MAX_SIDE,
    "sample_size": MAX_SIDE,
}
_WIDTHS = (
    *("block_out_channels", "in_channels", "out_channels", "latent_channels", "norm_num_groups", "sample_size"),
    *("cross_attention_dim", "attention_head_dim", "num_attention_heads", "time_embedding_dim", "projection_dim"),
    *("hidden_size", "intermediate_size", "max_position_embeddings", "width", "head_width", "patch_size"),
)
_CONFIGS = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")


def read_config(path: Path) -> dict[str, Any]:
    """Return the table in a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no table in JSON, or too large or too deep.
    """
    if not os.path.isfile(path):  # a FIFO would block
        raise FileNotFoundError(2, "there is no such file", str(path))
    with path.open("rb") as file:
        data = file.read(MAX_CONFIG + 1)
    if len(data) > MAX_CONFIG:
        raise ValueError(f"{path.name} is larger than {MAX_CONFIG >> 20} MiB")
    try:
        table = json.loads(data.decode("utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path.name} holds no table")
    return table


def shard_names(index: Path) -> list[str]:
    """Return the files that an index of shards names, all beside it; errors as of `read_config`."""
    table = read_config(index).get("weight_map")
    names = sorted({str(name) for name in table.values()}) if isinstance(table, dict) else []
    if not names or any(name != os.path.basename(name) or not name.endswith(".safetensors") for name in names):
        raise ValueError(f"{index.name} names no safetensors beside it")
    return names


def resolution_of(folder: Path) -> int:
    """Return the side in pixels of a model's images: the U-Net's latents × the VAE's down-sampling.

    Raises:
        OSError, ValueError: a config is damaged.
    """
    unet, vae = (read_config(folder / part / "config.json") for part in ("unet", "vae"))
    latents, blocks = unet.get("sample_size"), vae.get("block_out_channels")
    if type(latents) is not int or not isinstance(blocks, list) or not 0 < len(blocks) < 16:
        raise ValueError("sample_size of the U-Net and block_out_channels of the VAE give no size of an image")
    return check_side(latents << (len(blocks) - 1))


def check_side(value: object) -> int:
    """Return the side of an image in pixels; ValueError if it is none."""
    if type(value) is not int or not 8 <= value <= MAX_SIDE:
        raise ValueError(f"resolution is {str(value)[:40]!r}, not 8 to {MAX_SIDE} pixels")
    return value


def check_architecture(folder: Path) -> None:
    """Raise IntegrityError if a model's configs are not those of a Stable Diffusion 1 or 2."""
    shown = printable(str(folder))
    try:
        unet, vae, text, schedule = (read_config(folder / name) for name in _CONFIGS)
    except (OSError, ValueError) as error:
        message = f"{shown} is not a base: it has no U-Net or no noise schedule that can be read: {error}"
        raise IntegrityError(printable(message), hint=USABLE) from error
    kind = unet.get("_class_name", "UNet2DConditionModel")
    if kind != "UNet2DConditionModel":
        wrong = f"its denoiser is a {printable(str(kind), limit=60)}"
    elif (channels := unet.get("in_channels", 4)) != 4:
        wrong = f"its U-Net takes {printable(str(channels), limit=20)} channels, as those for inpainting do"
    elif unet.get("addition_embed_type"):
        wrong = "it is a Stable Diffusion XL"
    else:
        wrong = wrong_size(unet, vae, text) or wrong_schedule(schedule)
    if wrong:
        raise IntegrityError(f"{shown} cannot be used: {wrong}", hint="Stable Diffusion 1 and 2 can be used")


def wrong_size(*configs: dict[str, Any]) -> str:
    """Return which depth or width of a network in configs, or in tables inside them, is impossible, or ""."""
    for config in configs:
        for key in (*_LIMITS, *_WIDTHS):
            value, limit = config.get(key, 1), _LIMITS.get(key, MAX_WIDTH)
            counts = value if isinstance(value, list) else [value]
            if value is None and key in _WIDTHS:
                continue  # derived from another
            if any(type(count) is not int or not 0 < count <= limit for count in counts) or len(counts) > MAX_BLOCKS:
                return f"{key} in a config is {printable(str(value), limit=40)}"
        for key, value in config.items():
            if isinstance(value, list) and len(value) > MAX_BLOCKS and key.endswith("block_types"):
                return f"{key} in a config has {len(value):,} entries"
            if isinstance(value, dict) and (wrong := wrong_size(value)):
                return wrong
    return ""


def wrong_schedule(config: dict[str, Any]) -> str:
    """Return why a model with this noise schedule cannot be trained as one of Stable Diffusion, or ""."""
    name = config.get("_class_name", "")
    predicts = config.get("prediction_type", "epsilon")
    if "flow" in f"{name} {predicts}".lower() or config.get("use_flow_sigmas"):
        return "it was trained by flow matching, which is another loss than the paper's"
    if predicts not in ("epsilon", "v_prediction"):
        return f"it predicts {printable(repr(predicts), limit=60)}"
    if not {"beta_start", "beta_end", "beta_schedule", "trained_betas"} & config.keys():
        return f"its noise schedule{f', {printable(str(name), limit=60)},' if name else ''} states no betas"
    steps = config.get("num_train_timesteps", 1)
    betas = [config[key] for key in ("beta_start", "beta_end") if key in config]
    possible = all(isinstance(beta, int | float) and 0 < beta < 1 for beta in betas)
    if type(steps) is not int or not 0 < steps <= MAX_TIMESTEPS or not possible:
        return "its noise schedule has impossible numbers"
    return ""


def check_schedule(path: Path, base: str) -> None:
    """Raise IntegrityError for the config of a noise schedule that cannot be used."""
    try:
        wrong = wrong_schedule(read_config(path))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"the base's scheduler cannot be loaded: {printable(str(error))}") from error
    if wrong:
        raise IntegrityError(f"the base {base} cannot be used: {wrong}", hint=USABLE)


def no_safetensors(names: Collection[str], stem: str, source: str) -> IntegrityError:
    """Return the error for a part without weights that are read, and what to do about those it has.

    Args:
        names: the files of the model.
        stem: "unet/diffusion_pytorch_model", without what follows it.
        source: the folder or repository.
    """
    part = stem.partition("/")[0]
    found = f"{printable(source)} has no safetensors for its {part}"
    named = re.escape(stem) + r"\.([\w-]+?)(-\d+-of-\d+)?\.safetensors"
    variants = sorted(match[1] for match in (re.fullmatch(named, name) for name in names) if match)
    pickle = next((name for name in sorted(names) if re.fullmatch(rf"{part}/.*\.(bin|ckpt|pt|pth)", name)), "")
    if variants:
        message = f"{found} but those of the variant {printable(variants[0])}, which is not read"
        hint = f"if that is what you want: copy {stem}.{variants[0]}.safetensors to {stem}.safetensors in a folder"
        return IntegrityError(message, hint=hint)
    if pickle:
        message = f"{found}, and pickles are refused: {printable(pickle)} can run any code"
        hint = (
            "convert it where you trust its source, with diffusers: "
            "StableDiffusionPipeline.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
        return IntegrityError(message, hint=hint)
    return IntegrityError(f"{found}, and pickles are refused", hint=USABLE)
