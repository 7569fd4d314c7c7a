"""Converts one file with a whole Stable Diffusion into a folder in diffusers' layout, in e4t's cache.

A file has no configs and no vocabulary: those of Stable Diffusion 1 and 2 are beside this module, the vocabulary
travels with open_clip. Names are translated by diffusers' own functions. Its `from_single_file` is not used: it
changes torch's default dtype and `nn.Module` for the whole process while it loads, and where a file lacks a tensor of
the text encoder (0.42.1) the weight stays without values, without a word. Here every name and shape is compared with
those of the network before anything is written.

A folder, not a model in memory: it serves every later run without another conversion, in the memory that any folder
takes, and all that identifies a base (fingerprints, `e4t info`, saved concepts) reads folders.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import single_file_utils
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPTextModel

from e4t_cli.errors import IntegrityError, printable
from e4t_cli.files import rename_folder_to_free_name, staging_directory, sync_tree
from e4t_cli.hub.bases import name_of_file, weight_stem
from e4t_cli.hub.single_file import (
    SOURCE,
    TEXT_ENCODERS,
    UNET,
    VAE,
    ConvertedFile,
    SingleFile,
    converted_path,
    find_converted,
    hash_file,
    list_converted_files,
    remember_use,
)
from e4t_cli.models.loading import canonical_key, empty_part, load_part
from e4t_cli.progress import Progress, ProgressCallback

CONFIGS = Path(__file__).parent / "stable_diffusion"  # a folder for each version, in diffusers' layout without weights
KINDS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
_CALLED = {"unet": "U-Net", "vae": "VAE", "text_encoder": "text encoder"}
_VOCABULARY = 49_152 - 256 - 2  # merges of CLIP; the file has more


def convert_file(file: SingleFile, on_progress: ProgressCallback | None = None) -> ConvertedFile:
    """Return the folder with what a file holds, converted unless it was before.

    Raises:
        IntegrityError: a weight is missing, or of another shape.
        InputError, ResourceError: it cannot be read; the disk has no room.
    """
    if (known := find_converted(str(file.path))) is not None:
        remember_use(known)
        return known
    report = on_progress or (lambda event: None)
    report(Progress(stage="convert", done=0, total=4))
    stamp = hash_file(file.path)
    report(Progress(stage="convert", done=1, total=4))
    target = converted_path(str(stamp["sha256"]))
    same = next((one for one in list_converted_files() if one.folder == target and one.is_whole), None)
    if same is not None:
        remember_use(same, stamp)
        return same
    shutil.rmtree(target, ignore_errors=True)  # of a conversion whose weights somebody deleted
    name = _name_of(file, str(stamp["sha256"]))
    converted = ConvertedFile(folder=target, name=name, source=stamp)
    with staging_directory(target, file.path.stat().st_size) as staging:
        _write_parts(file, staging, report)
        prediction = file.prediction_type or (_measured_prediction(staging) if file.version == "2" else "epsilon")
        side = _write_settings(file, staging, prediction)
        manifest = {"name": name, "revision": stamp["sha256"], "resolution": side}
        lines = ["schema = 1", *(f"{key} = {json.dumps(value)}" for key, value in manifest.items())]
        (staging / "base.toml").write_bytes("\n".join(lines).encode())
        (staging / SOURCE).write_bytes(json.dumps({"name": name, **stamp}).encode())
        sync_tree(staging)
        with contextlib.suppress(FileExistsError):  # another process was faster, with the same file
            rename_folder_to_free_name(staging, target)
    report(Progress(stage="convert", done=4, total=4))
    return converted


def _name_of(file: SingleFile, digest: str) -> str:
    """Return the name of the base, which no other file's has."""
    name = name_of_file(file.path)
    taken = any(one.name == name for one in list_converted_files() if not one.is_superseded)
    return f"{name}-{digest[:8]}" if taken else name


def _write_parts(file: SingleFile, folder: Path, report: ProgressCallback) -> None:
    """Check all parts, then write them: weights as they are, under diffusers' names."""
    shutil.copytree(CONFIGS / file.version, folder, dirs_exist_ok=True)
    shown = printable(str(file.path))
    try:
        with safe_open(file.path, framework="pt") as opened:
            # Tensors are views of the file: nothing is read before it is written.
            stored = {key: opened.get_tensor(key) for key in file.keys if not key.startswith("model_ema.")}
        parts = {part: _translated(part, stored, folder) for part in KINDS}
    except (SafetensorError, KeyError) as error:
        raise IntegrityError(f"{shown} is damaged: {printable(str(error))}", hint="download it again") from error
    for part, tensors in parts.items():
        _check(part, tensors, folder, shown)
    for done, (part, tensors) in enumerate(parts.items(), 2):
        write_tensors(tensors, folder / f"{weight_stem(part)}.safetensors")
        report(Progress(stage="convert", done=min(done, 3), total=4))


def _translated(part: str, stored: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Return a part's tensors under diffusers' names; those that a file lacks are missing or None."""
    prefixes = {"unet": (UNET,), "vae": VAE, "text_encoder": TEXT_ENCODERS}[part]
    own = {key: value for key, value in stored.items() if key.startswith(prefixes)}
    utils: Any = single_file_utils
    if part == "unet":
        found = utils.convert_ldm_unet_checkpoint(own, UNet2DConditionModel.load_config(folder / part))
    elif part == "vae":
        found = utils.convert_ldm_vae_checkpoint(own, AutoencoderKL.load_config(folder / part))
    elif any(key.startswith(TEXT_ENCODERS[1]) for key in own):
        empty = empty_part(CLIPTextModel, folder / part, torch.float32)
        found = utils.convert_open_clip_checkpoint(empty, own, prefix=TEXT_ENCODERS[1])
    else:
        found = utils.convert_ldm_clip_checkpoint(own)
    return {key: value for key, value in found.items() if value is not None}


def _check(part: str, tensors: dict[str, Tensor], folder: Path, shown: str) -> None:
    """Reduce a part's tensors to those of the network; IntegrityError if one is missing or of another shape."""
    network = empty_part(KINDS[part], folder / part, torch.float32)
    expected = {canonical_key(key): tuple(value.shape) for key, value in network.state_dict().items()}
    found = {canonical_key(key): (key, tuple(value.shape)) for key, value in tensors.items()}
    for key in [key for name, (key, _) in found.items() if name not in expected]:
        del tensors[key]  # what nothing reads: positions, a projection of another use
    about = f"the {_CALLED[part]} in {shown}"
    if missing := sorted(expected.keys() - found.keys()):
        message = f"{about} lacks {len(missing)} of {len(expected)} weights, as {missing[0]}"
        raise IntegrityError(message, hint="it would make other pictures: download it again, or take another file")
    for name, wanted in expected.items():
        key, shape = found[name]
        if shape != wanted or tensors[key].dtype not in _STORED_AS:
            message = f"{about} is of another kind: {name} is {shape} of {tensors[key].dtype}, not {wanted}"
            raise IntegrityError(message, hint="Stable Diffusion 1 and 2 can be used")


_STORED_AS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file, one tensor at a time: `save_file` holds a copy of all of them in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, value in tensors.items():
        size = value.numel() * value.element_size()
        header[key] = {
            "dtype": _STORED_AS[value.dtype], "shape": list(value.shape), "data_offsets": [offset, offset + size],
        }  # fmt: skip
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in tensors.values():
            file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)


@torch.no_grad()
def _measured_prediction(folder: Path) -> str:
    """Return what the U-Net of a Stable Diffusion 2 predicts, which no key tells.

    As AUTOMATIC1111's web UI finds it: at the last time step the input is nearly all noise, so a U-Net that predicts
    the noise returns its input, and one that predicts v something far below it.
    """
    unet = load_part(UNet2DConditionModel, folder / "unet", "cpu", torch.float32)
    x = torch.full((1, 4, 8, 8), 0.5)
    context = torch.full((1, 2, unet.config["cross_attention_dim"]), 0.5)
    difference = float((unet(x, torch.tensor([999]), context).sample - x).mean())
    return "v_prediction" if difference < -1 else "epsilon"


def _write_settings(file: SingleFile, folder: Path, prediction: str) -> int:
    """Write the tokenizer, and what the file's own way of training changes; return the side of the images."""
    write_tokenizer(folder / "tokenizer")
    schedule = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(schedule.read_text(encoding="utf-8")) | {"prediction_type": prediction}
    schedule.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    config = folder / "unet" / "config.json"
    table = json.loads(config.read_text(encoding="utf-8"))
    if file.version == "2" and prediction == "v_prediction":
        table["sample_size"] = 96  # 768 pixels, the one way in which Stability trained v
        config.write_text(json.dumps(table, indent=2), encoding="utf-8")
    vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    return int(table["sample_size"]) << (len(vae["block_out_channels"]) - 1)


def write_tokenizer(folder: Path) -> None:
    """Add CLIP's vocabulary to a tokenizer's settings: open_clip's, with transformers' names of the two marks."""
    spec = find_spec("open_clip")  # importing it takes seconds
    assert spec is not None and spec.origin is not None
    with gzip.open(Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz") as packed:
        lines = packed.read().decode("utf-8").split("\n")
    merges = lines[1 : _VOCABULARY + 1]
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves, then the others
    letters = [chr(byte) for byte in printed] + [chr(256 + rank) for rank in range(256 - len(printed))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    os.makedirs(folder, exist_ok=True)
    table = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_bytes(json.dumps(table, ensure_ascii=False).encode())
    (folder / "merges.txt").write_bytes("\n".join(["#version: 0.2", *merges, ""]).encode())
