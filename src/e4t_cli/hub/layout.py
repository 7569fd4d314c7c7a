"""Which files of a repository in diffusers' layout are needed, and whether the model can be used.

Safetensors only, one precision only, no second copies: of the 45 GB that lie in a Stable Diffusion
repository about 3 are fetched. The same functions look at a list from the hub and at a folder.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from e4t_cli.errors import IntegrityError, printable

SETTINGS = (
    *("model_index.json", "base.toml", "*/config.json", "scheduler/scheduler_config.json"),
    *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json"),
    *("tokenizer/merges.txt", "tokenizer/special_tokens_map.json"),
    *("feature_extractor/preprocessor_config.json", "image_tower/open_clip_config.json"),
)
"""What is fetched before any weight, to see what the model is."""
_STEMS = {"text_encoder": "model", "safety_checker": "model", "image_tower": "model"}


def setting_files(names: Collection[str]) -> list[str]:
    """Return the small files that are needed, of those that there are."""
    from fnmatch import fnmatchcase

    # The image tower of another program, or a text encoder of XL, is none of ours.
    parts = {"unet", "vae", "text_encoder", "safety_checker"}
    return [
        name
        for name in names
        if any(fnmatchcase(name, pattern) for pattern in SETTINGS)
        and (not name.endswith("/config.json") or name.partition("/")[0] in parts)
    ]


def weight_files(names: Collection[str], part: str, *, half: bool) -> list[str]:
    """Return the files with the weights of one part.

    Args:
        names: of all files of the repository.
        part: "unet", "vae", "text_encoder", "safety_checker" or "image_tower".
        half: prefer float16 where it was published.

    Returns:
        One file, or an index with its shards; none if there are no safetensors.
    """
    stem = f"{part}/{_STEMS.get(part, 'diffusion_pytorch_model')}"
    for variant in (".fp16", "") if half else ("", ".fp16"):
        if (whole := f"{stem}{variant}.safetensors") in names:
            return [whole]
        if (index := f"{stem}.safetensors.index{variant}.json") in names:
            # diffusers writes stem.fp16-00001-of-00002.safetensors, transformers the same.
            begin = f"{stem}{variant}-"
            return [
                index,
                *(n for n in names if n.startswith(begin) and n.endswith(".safetensors")),
            ]
    return []


def needed_files(
    names: Collection[str], *, half: bool, safety: bool, source: str
) -> tuple[list[str], list[str]]:
    """Return what is needed of a repository: settings, weights.

    Args:
        safety: also the safety checker, where there is one.
        source: the repository's name, for the error.

    Raises:
        IntegrityError: a part has no safetensors, or is missing.
    """
    weights = []
    for part in ("unet", "vae", "text_encoder"):
        found = weight_files(names, part, half=half)
        if not found:
            raise IntegrityError(
                f"{printable(source)} has no safetensors for its {part}, and pickles are refused",
                hint="Stable Diffusion 1 and 2 in diffusers' layout can be used",
            )
        weights += found
    for part in ("safety_checker", "image_tower"):
        if part != "safety_checker" or safety:
            weights += weight_files(names, part, half=half)
    return setting_files(names), weights


def names_in(folder: Path) -> set[str]:
    """Return the files of a folder and its sub-folders, as a repository lists them."""
    if not folder.is_dir():
        return set()
    return {
        path.relative_to(folder).as_posix() for path in folder.glob("*/*") if path.is_file()
    } | {path.name for path in folder.glob("*") if path.is_file()}


def is_complete(folder: Path, *, half: bool, safety: bool) -> bool:
    """Whether everything that is needed of a base is in a folder.

    A float32 copy serves where float16 is preferred: what a user has is not fetched again.
    """
    names = names_in(folder)
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        _, weights = needed_files(names, half=half, safety=False, source="")
    except (OSError, ValueError, IntegrityError):
        return False
    if not half and any(".fp16." in name for name in weights):
        return False  # float32 was asked for, and there is only float16
    listed = index.get("safety_checker") if isinstance(index, dict) else None
    if safety and listed and listed[0] and not weight_files(names, "safety_checker", half=half):
        return False
    if any(not (folder / shard).is_file() for name in weights for shard in _shards(folder / name)):
        return False
    tokenizer = {"tokenizer/vocab.json", "tokenizer/merges.txt"} <= names
    settings = {
        *("unet/config.json", "vae/config.json", "text_encoder/config.json"),
        "scheduler/scheduler_config.json",
    }
    return settings <= names and (tokenizer or "tokenizer/tokenizer.json" in names)


def _shards(index: Path) -> set[str]:
    """Return the files that an index names, relative to the base's folder."""
    if index.suffix != ".json":
        return set()
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return {f"{index.parent.name}/{Path(name).name}" for name in names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {f"{index.parent.name}/{index.name} is damaged"}  # which is no file


def check_shape(folder: Path) -> None:
    """Refuse a model that is not shaped like Stable Diffusion 1 or 2, by its configs alone.

    Called before weights are fetched or loaded: gigabytes that cannot be used are not wanted.

    Raises:
        IntegrityError: it is of another kind; the sentence says which.
    """
    shown = printable(str(folder))
    try:
        unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
        schedule = json.loads(
            (folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")
        )
        channels = unet["in_channels"]
        kind = unet.get("_class_name", "UNet2DConditionModel")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"{shown} is not a base: it has no U-Net or no noise schedule that can be read",
            hint="Stable Diffusion 1 and 2 in diffusers' layout can be used",
        ) from error
    predicts = schedule.get("prediction_type", "epsilon")
    wrong = (
        f"its denoiser is a {printable(str(kind))}"
        if kind != "UNet2DConditionModel"
        else f"its U-Net takes {channels} channels, as those for inpainting do"
        if channels != 4
        else "it is a Stable Diffusion XL"
        if unet.get("addition_embed_type")
        else f"it predicts {printable(str(predicts))}"
        if predicts not in ("epsilon", "v_prediction")
        else ""
    )
    if wrong:
        raise IntegrityError(
            f"{shown} cannot be used: {wrong}", hint="Stable Diffusion 1 and 2 can be used"
        )
