"""Files of LoRAs, textual inversions and VAEs: what they are by their headers, and their hashes, without torch."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from e4t_cli.errors import InputError, IntegrityError, UsageError, printable
from e4t_cli.files import file_error
from e4t_cli.hub.bases import weight_files
from e4t_cli.hub.paths import REPOSITORY
from e4t_cli.hub.single_file import NO_WEIGHTS, SUFFIXES
from e4t_cli.prompts import plain_text

OPTIONS = {"lora": "--lora", "embedding": "--embedding", "vae": "--vae"}
MAX_WORD = 100  # characters
REVISION = re.compile(r"[\w][\w./-]{0,199}", re.ASCII)
_BLOCK = 1 << 20

# What is no product of two matrices, by the last parts of its keys.
_VARIANTS = {
    "LoHa": r"\.hada_", "LoKr": r"\.lokr_", "OFT": r"[._]oft_", "DoRA": r"\.dora_scale$|\.lora_magnitude_vector",
    "LoCon with a Tucker decomposition (lora_mid)": r"\.lora_mid\.", "GLoRA": r"\.[ab][12]\.weight$",
    "IA3": r"\.on_input$|\.ia3_", "LyCORIS with whole differences": r"\.diff(_b)?$|\.[wb]_norm$",
    "LoRA with biases": r"\.lora_(B|up)(\.\w+)?\.bias$",
}  # fmt: skip
_LORA_KEY = re.compile(r"[._](lora_(down|up|A|B)|lora(_linear_layer)?\.(down|up))(\.\w+)?\.weight$")
# Other models' names of blocks.
_OTHER_MODELS = {
    "SDXL": r"^lora_te[12]_|^text_encoder_2\.|transformer_blocks[._][1-9]\d*[._]",
    "Flux": r"double_blocks|single_(transformer_)?blocks",
    "Stable Diffusion 3": r"joint_blocks|^transformer\.transformer_blocks",
}


@dataclass(frozen=True)
class LoraFile:
    """A LoRA, and by how much its change is multiplied."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True)
class EmbeddingFile:
    """A textual inversion, and what prompts call it: "" is the word in the file, else the file's name."""

    path: Path
    word: str = ""


def is_repository(given: str) -> bool:
    """Whether this is "owner/name[@revision]"; what exists, or is called like a file, never is."""
    repository, at, revision = given.partition("@")
    named = REPOSITORY.fullmatch(repository) and not repository.lower().endswith(SUFFIXES)
    return bool(named and (REVISION.fullmatch(revision) or not at) and not os.path.lexists(given))


def not_downloaded(repository: str, file: str, option: str) -> UsageError:
    """Return the error for a repository of the hub in place of a file."""
    name = shlex.quote(printable(file))
    hint = f"of the hub: hf download {printable(repository)} {name} --local-dir ., then {option} {name}"
    return UsageError(f"there is no file {printable(repository)}", hint=hint)


def read_header(path: Path, option: str) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return the shapes of a safetensors file and what it says of itself.

    Raises:
        UsageError: there is no such file.
        IntegrityError: it is a pickle, or no complete safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    shown = printable(str(path))
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UsageError(f"{option} needs a file, and {shown} is a folder or a device")
        with path.open("rb") as file:
            begin = file.read(32)
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and is_repository(path.as_posix()):
            raise not_downloaded(path.as_posix(), "FILE.safetensors", option) from error
        refused = file_error(error, path, reading=True)
        if isinstance(error, FileNotFoundError) and option == OPTIONS["vae"]:
            refused.hint = "--vae takes a file, a folder, or OWNER/NAME of the hub"
        raise refused from error
    is_safetensors = begin[8:9] == b"{"  # before it the header's length: any bytes, also those of another format
    found = next((about for magic, about in NO_WEIGHTS.items() if begin.lstrip().startswith(magic)), None)
    if found and not is_safetensors:
        raise IntegrityError(f"{shown} is {found[0]}", hint=found[1])
    is_pickle = not is_safetensors and begin[:2] in (b"PK", b"\x80\x02")
    if is_pickle or path.suffix.lower() in (".pt", ".bin", ".ckpt", ".pth", ".pkl"):
        message = f"{shown} is a pickle, which can run any program, and e4t opens none"
        raise IntegrityError(message, hint="look for it as .safetensors, or save its tensors as such a file")
    try:
        with safe_open(path, framework="np") as opened:
            shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
            return shapes, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{shown} is damaged, or no safetensors file") from error


def describe(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str]:
    """Return what a safetensors file is, "" if nobody knows, and the option that takes it."""
    if any(key.startswith("model.diffusion_model.") for key in shapes):
        return "a whole model", "--base"
    if any(_LORA_KEY.search(key) for key in shapes):
        return "a LoRA", "--lora"
    if any(re.search(pattern, key) for key in shapes for pattern in _VARIANTS.values()):
        return "an adapter", "--lora"
    if any(key.startswith(("first_stage_model.", "decoder.mid", "decoder.up")) for key in shapes):
        return "a VAE", "--vae"
    if "emb_params" in shapes or {"clip_l", "clip_g"} & set(shapes) or _is_word(shapes):
        return "a textual inversion", "--embedding"
    return "", ""


def _is_word(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return len(shapes) == 1 and len(next(iter(shapes.values()))) in (1, 2)


def _other_kind(path: Path, shapes: Mapping[str, tuple[int, ...]], wanted: str) -> IntegrityError:
    what, option = describe(shapes)
    begin = ", ".join(printable(key, limit=60) for key in sorted(shapes)[:2]) or "nothing"
    message = f"{printable(str(path))} is {what}, not {wanted}" if what else f"no {wanted[2:]}: it has {begin}"
    if not what:
        message = f"{printable(str(path))} is {message}"
    return IntegrityError(message, hint=f"give it as {option}" if option and what[2:] != wanted[2:] else None)


def check_lora(path: Path) -> Path:
    """Return the path of a LoRA that may be one for Stable Diffusion 1 or 2; errors of `BaseAddons.check`."""
    shapes, _ = read_header(path, OPTIONS["lora"])
    shown = printable(str(path))
    for name, pattern in _VARIANTS.items():
        if key := next((key for key in shapes if re.search(pattern, key)), None):
            message = f"{shown} is no plain LoRA but {name} ({printable(key, limit=100)})"
            raise IntegrityError(message, hint="merge it into the base with the program that made it, then --base")
    if not any(_LORA_KEY.search(key) for key in shapes):
        raise _other_kind(path, shapes, "a LoRA")
    for model, pattern in _OTHER_MODELS.items():
        if any(re.search(pattern, key) for key in shapes):
            hint = "use one that was trained on Stable Diffusion 1 or 2, as the base is"
            raise IntegrityError(f"{shown} is a LoRA for {model}, which is another architecture", hint=hint)
    return path


def word_of(file: EmbeddingFile) -> str:
    """Return what prompts call a textual inversion, normalized; errors of `BaseAddons.check`."""
    shapes, _ = read_header(file.path, OPTIONS["embedding"])
    if {"clip_l", "clip_g"} & set(shapes):
        hint = "use one that was trained on Stable Diffusion 1 or 2, as the base is"
        raise IntegrityError(f"{printable(str(file.path))} is a textual inversion for SDXL", hint=hint)
    if describe(shapes)[1] != OPTIONS["embedding"] or not _is_word(shapes):
        raise _other_kind(file.path, shapes, "a textual inversion")
    key = next(iter(shapes))
    word = plain_text(file.word or (file.path.stem if key == "emb_params" else key), "the word of --embedding")
    if not 1 <= len(word) <= MAX_WORD:
        message = f"the word of {printable(str(file.path))} must have 1 to {MAX_WORD} characters"
        raise UsageError(message, hint="--embedding FILE:WORD")
    return word


def vae_file(path: Path) -> Path:
    """Return the file with a VAE's weights: itself, or the one of a folder in diffusers' layout."""
    folder = path / "vae" if os.path.isfile(path / "vae" / "config.json") else path
    if os.path.isdir(folder):
        files = weight_files([f"vae/{name}" for name in os.listdir(folder)], "vae", half=False)
        if not os.path.isfile(folder / "config.json") or len(files) != 1:
            hint = "it needs config.json and diffusion_pytorch_model.safetensors"
            raise IntegrityError(f"the folder {printable(str(path))} has no VAE", hint=hint)
        return folder / files[0].partition("/")[2]
    shapes, _ = read_header(path, OPTIONS["vae"])
    if describe(shapes)[1] not in (OPTIONS["vae"], "--base"):
        raise _other_kind(path, shapes, "a VAE")
    return path


def hash_of(path: Path, *, skip: bool = False) -> str:
    about = path.stat()
    return _hash_of_file(path.resolve(), skip, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=64)  # a command asks several times
def _hash_of_file(path: Path, skip: bool, *stamp: int) -> str:
    """Return the SHA-256 of a file; `skip`: of what follows its safetensors header."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            if skip:
                file.seek(8 + int.from_bytes(file.read(8), "little"))
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{printable(str(path))} cannot be read") from error
    return digest.hexdigest()
