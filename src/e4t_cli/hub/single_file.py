"""What one file given as a base is, by its first bytes and the names of its tensors, and its conversion in the cache.

Such a file is a Stable Diffusion under the names of its first implementation, as people share fine-tunes. It is
converted once into a folder (`models.single_file`), in e4t's cache under the SHA-256 of the file. Nothing in this
module reads a tensor, imports torch or uses the network. Headers come from strangers.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from e4t_cli.errors import IntegrityError, UsageError, printable
from e4t_cli.files import file_error, sha256_of
from e4t_cli.hub.paths import matches, user_cache, write_to_cache

FORMAT = 1  # version of what a conversion writes; files converted by an older one are converted again
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".sft")  # of files that are never a repository
SOURCE = "source.json"  # in a converted folder: which file it was made from
UNET, VAE = "model.diffusion_model.", ("first_stage_model.", "vae.")
TEXT_ENCODERS = ("cond_stage_model.transformer.", "cond_stage_model.model.")  # of transformers, of open_clip
CONTEXT = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"  # (320, width of the text encoder)
VERSIONS = {768: "1", 1024: "2"}  # that width -> the version of Stable Diffusion
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32")
USABLE = "--base takes a Stable Diffusion 1 or 2 as one .safetensors file, or as a folder in diffusers' layout"
_MAX_HEADER = 25_000_000  # bytes; that of a Stable Diffusion has 0.2 MB
_WHOLE = "--base takes the whole model that it was made for"
_PICTURE = "the photo is given before the prompt: e4t personalize DOMAIN PHOTO PROMPT --base MODEL"
_PICKLE = (
    "a checkpoint of pickles, which can run any code and is not opened",
    "take the .safetensors file of the same model, or convert it where you trust its source",
)
NO_WEIGHTS: dict[bytes, tuple[str, str]] = {
    b"version https://git-lfs": ("a pointer of Git LFS, without the weights", "git lfs pull fetches them"),
    b"<": ("a web page: its download did not deliver the model", "download it again; sites may ask for a login"),
}
# First bytes, what they are of, and what to do.
_MAGIC: dict[bytes, tuple[str, str]] = {
    b"\x89PNG": ("a picture", _PICTURE), b"\xff\xd8\xff": ("a picture", _PICTURE), b"GIF8": ("a picture", _PICTURE),
    b"RIFF": ("a picture", _PICTURE), b"PK\x03\x04": _PICKLE, b"\x80": _PICKLE,
    b"GGUF": ("a quantized model (GGUF)", "take the .safetensors file of the same model"),
    **NO_WEIGHTS,
}  # fmt: skip
# Parts of tensors' names, what has them, and what to do; the first that is found counts.
_SDXL = ("a Stable Diffusion XL, which has two text encoders", "docs/bases.md says what it would take; " + USABLE)
_OTHER = ("another kind of model than Stable Diffusion 1 or 2", USABLE)
_NAMES: list[tuple[str, tuple[str, str]]] = [
    (r"\.lora_(down|up|A|B)\.|lora\.(down|up)\.|\.(hada|lokr)_w|^lora_(unet|te)|^oft_unet", ("a LoRA", _WHOLE)),
    (r"^(emb_params|clip_[lg]|string_to_param.*)$|^<", ("a textual inversion (an embedding of one word)", _WHOLE)),
    (r"^(control_model|controlnet_cond_embedding|input_hint_block)\.", ("a ControlNet", _WHOLE)),
    (r"^(image_proj|ip_adapter)\.", ("an IP-Adapter", _WHOLE)),
    (r"motion_modules\.", ("a motion module", _WHOLE)),
    (r"^conditioner\.embedders\.|label_emb\.0\.|^add_embedding\.", _SDXL),
    (r"joint_blocks\.", ("a Stable Diffusion 3", USABLE)),
    (r"(^|\.)(double|single)_blocks\.", ("a Flux, or of its kind", USABLE)),
    (r"^model\.diffusion_model\.(?!input_blocks|middle_block|output_blocks|time_embed|out\.)", _OTHER),
]
_PARTS: list[tuple[str, str]] = [  # looked for where there is no U-Net
    (r"^(first_stage_model\.|vae\.)?(encoder|decoder)\.(conv_in|mid|down|up)", "a VAE"),
    (r"^(cond_stage_model\.\w+\.|text_model\.|transformer\.resblocks\.)|^embeddings\.token_emb", "a text encoder"),
    (r"^(down_blocks|mid_block|up_blocks)\.", "the U-Net of a folder in diffusers' layout"),
    (r"^transformer_blocks\.", "another kind of model than Stable Diffusion 1 or 2"),
]


@dataclass(frozen=True, kw_only=True)
class SingleFile:
    """A file that holds a whole Stable Diffusion 1 or 2, as far as names tell."""

    path: Path
    version: str  # "1" or "2"
    keys: Collection[str] = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict)  # what its header states

    @property
    def prediction_type(self) -> str:
        """What its U-Net predicts if the header states it, as programs for training write, else ""."""
        stated = self.metadata.get("modelspec.prediction_type", "").lower()
        return {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}.get(stated, "")

    @property
    def resolution(self) -> int:
        """Side of its images in pixels, 0 where only its conversion finds out."""
        return 512 if self.version == "1" else {"v_prediction": 768, "epsilon": 512}.get(self.prediction_type, 0)

    @property
    def has_ema(self) -> bool:
        """Whether there are averaged weights beside the plain ones."""
        return any(key.startswith("model_ema.") for key in self.keys)


def is_file_name(wanted: str) -> bool:
    """Whether a base is asked for by the name of a file, which may not exist."""
    return wanted.lower().endswith(SUFFIXES) or (os.path.exists(wanted) and not os.path.isdir(wanted))


def recognize_file(wanted: str | os.PathLike[str]) -> SingleFile:
    """Return what is known about a file that is to be a base, by its header.

    Raises:
        UsageError: there is no such file.
        InputError: it cannot be read.
        IntegrityError: it is damaged, lacks a part, or is something else, which the message names.
    """
    path = Path(wanted)
    shown = printable(str(path))
    if not os.path.isfile(path):
        there = "is a folder or a device, not a file" if os.path.exists(path) else "does not exist"
        raise UsageError(f"the model file {shown} {there}", hint=USABLE)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begin = file.read(512)
            _check_begin(begin, shown, path.suffix.lower())
            length = int.from_bytes(begin[:8], "little")
            file.seek(8)
            text = file.read(length) if length <= min(_MAX_HEADER, size - 8) else b""
    except (OSError, ValueError) as error:
        raise file_error(error, path, reading=True) from error
    shapes, dtypes, metadata, end = _read_header(text, shown)
    if size != 8 + length + end:
        message = f"{shown} is damaged: it has {size:,} of {8 + length + end:,} bytes"
        raise IntegrityError(message, hint="download it again")
    if wrong := name_of_tensors(shapes, metadata):
        raise IntegrityError(f"{shown} is {wrong[0]}", hint=_folder_of(path) or wrong[1])
    if not any(key.startswith(UNET) for key in shapes):
        keys = ", ".join(printable(key, limit=40) for key in sorted(shapes)[:3]) or "none"
        raise IntegrityError(f"{shown} is no model that e4t knows: its tensors are {keys}", hint=USABLE)
    _check_parts(shapes, dtypes, shown)
    width = shapes[CONTEXT][-1] if len(shapes.get(CONTEXT, ())) >= 2 else 0
    if width not in VERSIONS:
        message = f"{shown} is of another size than Stable Diffusion 1 or 2: its U-Net reads words of {width} values"
        raise IntegrityError(message, hint=USABLE)
    return SingleFile(path=path, version=VERSIONS[width], keys=shapes.keys(), metadata=metadata)


def _check_begin(begin: bytes, shown: str, suffix: str) -> None:
    if not begin:
        raise IntegrityError(f"{shown} is empty", hint="download it again")
    found = next((about for magic, about in _MAGIC.items() if begin.lstrip().startswith(magic)), None)
    if begin[8:9] == b"{":
        return
    if found is None and suffix in (".ckpt", ".pt", ".pth", ".bin"):
        found = _PICKLE
    what, hint = found or ("no safetensors file", USABLE)
    raise IntegrityError(f"{shown} is {what}", hint=hint)


def _read_header(text: bytes, shown: str) -> tuple[dict[str, tuple[int, ...]], set[str], dict[str, str], int]:
    """Return shapes, dtypes, metadata, and the number of bytes of all tensors."""
    try:
        table = json.loads(text.decode("utf-8"))
        metadata = {str(key): str(value) for key, value in table.pop("__metadata__", {}).items()}
        shapes = {str(key): tuple(int(side) for side in one["shape"]) for key, one in table.items()}
        dtypes = {str(one["dtype"]) for one in table.values()}
        end = max((int(one["data_offsets"][1]) for one in table.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        message = f"{shown} is damaged: it does not begin with a complete header of safetensors"
        raise IntegrityError(message, hint="download it again") from error
    return shapes, dtypes, metadata, end


def name_of_tensors(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> tuple[str, str] | None:
    """Return what a safetensors file is instead of a Stable Diffusion, and what to do; None if that is not known."""
    if "e4t" in metadata:
        return "a concept of e4t", "e4t generate CONCEPT PROMPT generates from it; " + USABLE
    for pattern, about in _NAMES:
        if any(re.search(pattern, key) for key in shapes):
            return about
    if any(key.startswith(UNET) for key in shapes):
        conv_in = shapes.get(f"{UNET}input_blocks.0.0.weight", ())
        if len(conv_in) == 4 and conv_in[1] != 4:
            kind = {9: "a model for inpainting", 8: "a model for editing pictures", 7: "a model for enlarging"}
            what = kind.get(conv_in[1], "another kind of model")
            return f"{what}: its U-Net takes {conv_in[1]} channels instead of 4", USABLE
        return None
    for pattern, what in _PARTS:
        if any(re.search(pattern, key) for key in shapes):
            return f"{what}, not a whole model", USABLE
    if len(shapes) == 1 and next(iter(shapes.values()))[-1:] in ((768,), (1024,), (1280,)):
        return "a textual inversion (an embedding of one word)", _WHOLE
    return None


def _folder_of(path: Path) -> str:
    """Return a hint where a file is part of a folder that can be a base, else ""."""
    whole = path.absolute().parent.parent
    return f"--base {printable(str(whole))}" if os.path.isfile(whole / "model_index.json") else ""


def _check_parts(shapes: Iterable[str], dtypes: set[str], shown: str) -> None:
    """Raise IntegrityError for a file with a U-Net that lacks another part, or with numbers that are not read."""
    for part, prefixes in (("VAE", VAE), ("text encoder", TEXT_ENCODERS)):
        if not any(key.startswith(prefixes) for key in shapes):
            hint = f"take the file of this model that has it (with a baked {part}), or a folder in diffusers' layout"
            raise IntegrityError(f"{shown} has no {part}: it is a part of a model", hint=hint)
    if others := sorted(dtypes - set(DTYPES)):
        message = f"{shown} is stored in {printable(others[0])}, which is not read"
        raise IntegrityError(message, hint="take the file of this model in float16 or float32")


# ── in e4t's cache ──


@dataclass(frozen=True, kw_only=True)
class ConvertedFile:
    """The folder that a single file was converted to."""

    folder: Path
    name: str  # of the base
    source: Mapping[str, object]  # format, sha256, path, size, mtime_ns

    @property
    def is_whole(self) -> bool:
        names = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")
        return all(os.path.isfile(self.folder / f"{name}.safetensors") for name in names)

    @property
    def is_superseded(self) -> bool:
        """Whether another version of e4t made it."""
        return self.source.get("format") != FORMAT

    @property
    def source_exists(self) -> bool:
        """Whether the file is still there, so that it can be converted again."""
        return _stamp(str(self.source.get("path"))).items() <= self.source.items()

    @property
    def last_used(self) -> float:
        with contextlib.suppress(OSError):
            return os.path.getmtime(self.folder / SOURCE)
        return 0.0


def list_converted_files() -> list[ConvertedFile]:
    """Return the conversions in the cache."""
    found = []
    for path in matches(user_cache() / "single-files", f"*/{SOURCE}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            table = json.loads(path.read_text(encoding="utf-8"))
            found.append(ConvertedFile(folder=path.parent, name=str(table.pop("name")), source=table))
    return found


def find_converted(wanted: str) -> ConvertedFile | None:
    """Return the conversion of a file whose path, size and time are those of before, or with that name of a base."""
    ready = [one for one in list_converted_files() if one.is_whole and not one.is_superseded]
    if not os.path.exists(wanted):
        named = [one for one in ready if one.name == wanted]
        return max(named, key=lambda one: one.last_used, default=None)
    stamp = _stamp(wanted)
    return next((one for one in ready if stamp and stamp.items() <= one.source.items()), None)


def converted_path(digest: str) -> Path:
    """Return the folder for the conversion of a file with this SHA-256, whether it exists or not."""
    return user_cache() / "single-files" / f"{digest[:32]}-{FORMAT}"


def hash_file(path: Path) -> dict[str, object]:
    """Return what SOURCE keeps about a file: its SHA-256, and what tells without reading it that it is the same."""
    try:
        return {"format": FORMAT, "sha256": sha256_of(path), **_stamp(str(path))}
    except OSError as error:
        raise file_error(error, path, reading=True) from error


def remember_use(converted: ConvertedFile, stamp: Mapping[str, object] | None = None) -> None:
    """Record that a conversion was used, and which file it is of now."""
    table = {"name": converted.name, **(stamp or converted.source)}
    write_to_cache(converted.folder / SOURCE, json.dumps(table).encode())


def _stamp(path: str) -> dict[str, object]:
    with contextlib.suppress(OSError, ValueError):
        about = os.stat(path)
        return {"path": os.path.realpath(path), "size": about.st_size, "mtime_ns": about.st_mtime_ns}
    return {"path": ""}
