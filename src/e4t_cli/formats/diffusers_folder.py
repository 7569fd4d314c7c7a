"""A folder in diffusers' layout whose tokenizer has one more token: the concept.

What `StableDiffusionPipeline.from_pretrained` reads, with the safety checker of a base that has
one; beside it learned_word.safetensors, the token's embedding alone as programs for textual
inversion read it, and README.md, which says what it is, of what base and licence.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from safetensors.torch import save
from torch import Tensor, nn
from transformers import AddedToken

from e4t_cli.errors import UsageError, printable
from e4t_cli.files import check_free, making, sync_tree, write_atomically
from e4t_cli.models.denoiser import TunedModel
from e4t_cli.models.loading import load_part
from e4t_cli.models.text_to_image import TextToImageModel

WORD_FILE = "learned_word.safetensors"
CHECKER, EYES = "safety_checker", "feature_extractor"

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_folder(
    model: TextToImageModel,
    tuned: TunedModel,
    word: Tensor,
    folder: Path,
    *,
    token: str,
    readme: str,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a tuned model so that other programs can draw with it; whole, or not at all.

    Args:
        model: the base that `tuned` was made from; it stays as it is.
        word: the embedding of the token (embedding_width,).
        folder: must not exist.
        token: what prompts call the concept.
        readme: the text of its README.md.
        dtype: of the stored weights.

    Raises:
        UsageError: the folder exists, or the base knows the token already.
        ResourceError: the disk has no room, or cannot be written to.
    """
    check_free(folder)
    tokenizer, text_encoder = _taught(model, word, token)
    parts = {"unet": tuned.unet, "vae": model.vae, "text_encoder": text_encoder}
    checker = model.base.folder / CHECKER
    safe = (checker / "config.json").is_file() and (model.base.folder / EYES).is_dir()
    with making(folder, _size(parts, checker if safe else None, dtype)) as place:
        for name, part in parts.items():
            _at_hand(part, dtype).save_pretrained(place / name)
        tokenizer.save_pretrained(place / "tokenizer")
        _for_older_readers(model.base.folder / "tokenizer", place / "tokenizer", tokenizer, token)
        # What e4t draws with; the schedule of training would take ten times the steps.
        scheduler = DPMSolverMultistepScheduler.from_config(model.noise_schedule.config)
        scheduler.save_pretrained(place / "scheduler")
        index: dict[str, Any] = dict(INDEX)
        if safe:
            index |= _with_checker(model.base.folder, place, dtype)
        embedding = save({"emb_params": word.detach().cpu().float()[None].contiguous()})
        write_atomically(place / WORD_FILE, embedding)
        write_atomically(place / "README.md", readme.encode())
        write_atomically(place / "model_index.json", json.dumps(index, indent=2).encode())
        _tidy(place)
        sync_tree(place)
        os.rename(place, folder)


def check_token(model: TextToImageModel, token: str) -> None:
    """Refuse a token that prompts mean something else by.

    Raises:
        UsageError: the base knows it.
    """
    alone = model.tokenizer(token, add_special_tokens=False).input_ids
    if len(alone) == 1 or token in model.tokenizer.get_vocab():
        raise UsageError(
            f"the base knows {printable(token)!r} as a word of its own",
            hint="choose another with --placeholder, such as '<me>'",
        )


def _taught(model: TextToImageModel, word: Tensor, token: str) -> tuple[Any, Any]:
    """Return copies of tokenizer and text encoder that know the token."""
    check_token(model, token)
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])
    number = tokenizer.convert_tokens_to_ids(token)
    text_encoder = copy.deepcopy(model.text_encoder)
    known = text_encoder.get_input_embeddings().num_embeddings
    text_encoder.resize_token_embeddings(max(known, number + 1), mean_resizing=False)
    table = text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[number] = word.to(table.device, table.dtype)
    return tokenizer, text_encoder


def _at_hand(part: nn.Module, dtype: torch.dtype) -> Any:
    """Return a copy in main memory; on its own device there may be no room for one."""
    memo: dict[int, Tensor] = {}
    for weight in part.parameters():
        memo[id(weight)] = nn.Parameter(weight.detach().to("cpu", dtype), requires_grad=False)
    for buffer in part.buffers():
        memo[id(buffer)] = buffer.to("cpu", dtype if buffer.is_floating_point() else None)
    # What deepcopy is told it has copied already, it takes as the copy.
    return copy.deepcopy(part, memo)


def _tidy(folder: Path) -> None:
    """Make of what the libraries wrote one model that anybody can load."""
    mode = (folder / "README.md").stat().st_mode  # safetensors writes for the owner alone
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
    for path in folder.glob("*/config.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings.pop("_name_or_path", None)  # a folder of this machine
        if "dtype" in settings:
            # transformers loads what this says, diffusers float32, unless one is asked for both.
            settings["dtype"] = "float32"
        write_atomically(path, json.dumps(settings, indent=2).encode())


def _for_older_readers(source: Path, target: Path, tokenizer: Any, token: str) -> None:
    """Add the files that transformers before version 5 reads a tokenizer from."""
    for name in ("vocab.json", "merges.txt"):
        if (source / name).is_file() and not (target / name).exists():
            shutil.copyfile(source / name, target / name)
    added = {token: tokenizer.convert_tokens_to_ids(token)}
    write_atomically(target / "added_tokens.json", json.dumps(added).encode())


def _with_checker(base: Path, place: Path, dtype: torch.dtype) -> dict[str, list[str]]:
    """Add the base's safety checker; returns its entries of model_index.json."""
    # Not at the top: two seconds of imports for the one family of bases that has it.
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    checker = load_part(StableDiffusionSafetyChecker, base / CHECKER, "cpu", dtype)
    checker.save_pretrained(place / CHECKER)
    shutil.copytree(base / EYES, place / EYES)  # follows the links of the hub's cache
    return {
        CHECKER: ["stable_diffusion", "StableDiffusionSafetyChecker"],
        EYES: ["transformers", "CLIPImageProcessor"],
    }


def _size(parts: dict[str, nn.Module], checker: Path | None, dtype: torch.dtype) -> int:
    numbers = sum(weight.numel() for part in parts.values() for weight in part.parameters())
    files = checker.glob("*.safetensors") if checker is not None else ()
    return numbers * dtype.itemsize + min((path.stat().st_size for path in files), default=0)
