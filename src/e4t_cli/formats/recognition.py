"""Says what a file or folder is: any that e4t writes, by its content.

Only headers are read: no tensor, no pickle, and torch is not imported. What is found out here (`Recognized.facts`) is
kept apart from what a file says of itself (`Recognized.recorded`), which anybody can write. Recorded keys are given
under today's names; files have the names of version 0.1.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from e4t_cli.errors import InputError, IntegrityError, printable
from e4t_cli.files import file_error
from e4t_cli.hub.single_file import name_of_tensors
from e4t_cli.images import png_metadata
from e4t_cli.registry import config

HINT = "e4t info reads pictures, concepts, exports, domains and checkpoints that e4t wrote"
MAX_HEADER = 25_000_000  # bytes of a safetensors header; those of a full Stable Diffusion have 0.2 MB
MAX_TEXT = 10_000_000  # bytes of a JSON file beside weights
MAX_PICTURE = 500_000_000  # bytes
MAX_DEPTH = 12  # of recorded JSON
_PNG = b"\x89PNG\r\n\x1a\n"
# The first bytes of what is often mistaken for it.
_OTHERS = {
    b"\xff\xd8\xff": "a JPEG picture", b"GIF8": "a GIF picture", b"RIFF": "a WebP or another RIFF file",
    b"II*\0": "a TIFF picture", b"MM\0*": "a TIFF picture", b"%PDF": "a PDF", b"\x1f\x8b": "a gzip archive",
    b"PK\x03\x04": "a zip archive, or a checkpoint of pickles, which e4t does not open",
    b"\x80\x02": "a pickle, which e4t does not open", b"\x80\x04": "a pickle, which e4t does not open",
}  # fmt: skip
_RENAMED = {
    **config.KEYS_IN_FILES,
    **png_metadata.KEYS_IN_FILES,
    "weights_digest": "pack_digest",
    "images": "pictures",
}
_FIELD_OF = {stored: name for name, stored in _RENAMED.items()}
_METHOD_OF = {stored: method for method, stored in config.METHODS_IN_FILES.items()}


@dataclass(frozen=True, kw_only=True)
class Recognized:
    """What a file or folder is.

    Args:
        type: "image", "grid", "prepared", "concept", "lora", "word", "checkpoint" (a single file), "model" (a folder),
            "domain", "training_checkpoint", "training_checkpoints" (a folder).
        facts: found in its structure.
        recorded: what it says of itself, under today's names.
    """

    type: str
    facts: Mapping[str, Any]
    recorded: Mapping[str, Any] = field(default_factory=dict)


def recognize(path: str | os.PathLike[str]) -> Recognized:
    """Return what a path is.

    Raises:
        UsageError: there is none.
        InputError: it cannot be read, or is nothing that e4t writes.
        IntegrityError: it is, and it is damaged.
    """
    path = Path(path)
    shown = printable(str(path))
    try:
        # Before it is opened: opening a pipe waits for its writer.
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            return _folder(path, shown)
        if not stat.S_ISREG(mode):
            raise InputError(f"{shown} is a pipe or a device, not a file", hint="save it to a file first")
        return _file(path, shown)
    except (OSError, ValueError) as error:
        raise file_error(error, path, reading=True) from error


def check_concept(path: str | os.PathLike[str]) -> None:
    """Raise InputError if a path is anything but a concept, another error if it is none or damaged."""
    hint = "make a concept: e4t personalize … --save"
    try:
        found = recognize(path)
    except InputError as error:
        raise InputError(
            f"{error.message}, and is no concept", hint=hint if error.hint == HINT else error.hint
        ) from error
    if found.type != "concept":
        raise InputError(f"{printable(str(path))} is no concept, its type is {found.type!r}", hint=hint)


def _file(path: Path, shown: str) -> Recognized:
    if path.name == "domain.toml":
        return _domain(path.parent, shown)
    size = path.stat().st_size
    with path.open("rb") as opened:
        begin = opened.read(512)
        if begin.startswith(_PNG):
            return _png(begin + opened.read(MAX_PICTURE), shown)
    if not begin:
        raise InputError(f"{shown} is empty", hint=HINT)
    is_safetensors = begin[8:9] == b"{"  # before it the header's length: any bytes, also those of another format
    for magic, what in _OTHERS.items():
        if begin.startswith(magic) and not is_safetensors:
            raise InputError(f"{shown} is {what}", hint=HINT)
    header = int.from_bytes(begin[:8], "little")
    if is_safetensors or path.suffix in (".e4t", ".safetensors"):
        if header > min(MAX_HEADER, size - 8):
            raise IntegrityError(f"{shown} is damaged: the length of its header does not fit a file of {size:,} bytes")
        return _tensors(path, shown, {"bytes": size})
    raise InputError(f"{shown} is {'a text' if _is_text(begin) else 'a file'} that e4t does not know", hint=HINT)


def _is_text(begin: bytes) -> bool:
    try:
        return "\0" not in codecs.getincrementaldecoder("utf-8")().decode(begin)  # the last letter may be cut
    except UnicodeDecodeError:
        return False


def _png(data: bytes, shown: str) -> Recognized:
    try:
        found = png_metadata.read_metadata(data)
    except InputError as error:
        raise InputError(f"{shown}: {error.message}", hint=error.hint) from error
    if found.details is None and found.parameters is None and not (found.ai_generated or found.by_e4t):
        raise InputError(f"{shown} is a PNG that has no record of how it was made", hint=HINT)
    width, height = (int.from_bytes(data[at : at + 4]) for at in (16, 20))
    facts = {"width": width, "height": height, "marked_as_generated": found.ai_generated}
    if found.details is None and found.by_e4t and not found.ai_generated:
        return Recognized(type="prepared", facts=facts)
    recorded = todays_names(found.details or {"parameters": found.parameters}, shown)
    return Recognized(type="grid" if "images" in recorded else "image", facts=facts, recorded=recorded)


# ── safetensors ──


def _tensors(path: Path, shown: str, facts: dict[str, Any]) -> Recognized:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata: dict[str, str] = file.metadata() or {}
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            shapes = {key: tuple(one.get_shape()) for key, one in slices.items()}
            facts["tensors"] = len(slices)
            facts["dtypes"] = sorted({str(one.get_dtype()) for one in slices.values()})
    except SafetensorError as error:
        raise IntegrityError(f"{shown} is damaged: it is not a complete safetensors file") from error
    if "e4t" in metadata:
        return _concept(metadata["e4t"], shapes, shown, facts)
    if {"step", "run"} <= metadata.keys():
        run = _object(metadata["run"], shown)
        step = int(metadata["step"]) if re.fullmatch(r"\d{1,18}", metadata["step"]) else metadata["step"]
        return Recognized(type="training_checkpoint", facts=facts, recorded={"step": step, "run": run})
    if any(key.startswith("lora_unet_") for key in shapes):
        ranks = sorted({shape[0] for key, shape in shapes.items() if key.endswith(".lora_down.weight") and shape})
        facts |= {"layers": sum(key.endswith(".alpha") for key in shapes), "ranks": ranks}
        return Recognized(type="lora", facts=facts, recorded=metadata)
    if set(shapes) == {"emb_params"}:
        vectors = shapes["emb_params"]
        facts |= {"vectors": vectors[0], "width": vectors[-1]} if len(vectors) == 2 else {}
        return Recognized(type="word", facts=facts, recorded=metadata)
    other = name_of_tensors(shapes, metadata)
    if any(key.startswith("model.diffusion_model.") for key in shapes):
        facts["model"] = other[0] if other else "a Stable Diffusion 1 or 2"
        return Recognized(type="checkpoint", facts=facts, recorded=metadata)
    folder = Path(os.path.realpath(path)).parent
    for name, whole in (("domain.toml", folder), ("model_index.json", folder.parent)):
        if os.path.isfile(whole / name):
            raise InputError(f"{shown} is a part of a folder", hint=f"e4t info {printable(str(whole))}")
    if other:
        raise InputError(f"{shown} is {other[0]}", hint=HINT)
    keys = ", ".join(printable(key, limit=40) for key in sorted(shapes)[:3]) or "none"
    raise InputError(f"{shown} has tensors that e4t does not know: {keys}", hint=HINT)


def _concept(header: str, shapes: Mapping[str, tuple[int, ...]], shown: str, facts: dict[str, Any]) -> Recognized:
    recorded = _object(header, shown)
    schema = recorded.get("schema")
    if isinstance(schema, int) and schema > 2:  # 1 has one photo, 2 several
        newer = f"{shown} was written by a newer e4t (schema {schema})"
        raise IntegrityError(newer, hint="pip install --upgrade e4t")
    whole = "recipe" in recorded and (schema != 2 or "image.1" in shapes)
    if len(shapes.get("image", ())) != 3 or not whole:
        raise IntegrityError(f"{shown} is a damaged concept: it has no image, or not how it was tuned")
    height, width, _ = shapes["image"]
    kept = any(key.startswith("weights.") for key in shapes)
    facts |= {"image": {"width": width, "height": height, "masked": "mask" in shapes}}
    if others := [key for key in shapes if re.fullmatch(r"image\.\d+", key)]:
        facts["photos"] = 1 + len(others)
        facts["masked_photos"] = sum(bool(re.fullmatch(r"mask(\.\d+)?", key)) for key in shapes)
    facts["weights"] = "kept" if kept else "made again by tuning"
    tuning = recorded.pop("recipe")
    return Recognized(type="concept", facts=facts, recorded={**recorded, "tuning": tuning})


def _object(text: str, shown: str) -> dict[str, Any]:
    """Return a JSON object under today's names; IntegrityError if it is none."""
    try:
        return todays_names(json.loads(text), shown)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{shown} is damaged: its JSON cannot be read") from error


def todays_names(record: Any, shown: str = "") -> dict[str, Any]:
    """Return a file's record under today's names, fit for JSON; IntegrityError if it is none or nested too deeply."""

    def walk(value: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise IntegrityError(f"{shown} is damaged: its JSON is nested too deeply")
        if isinstance(value, dict):
            pairs = ((_FIELD_OF.get(key, key), key, one) for key, one in value.items())
            return {
                name: _METHOD_OF[one] if key == "method" and one in list(_METHOD_OF) else walk(one, depth + 1)
                for name, key, one in pairs
            }
        if isinstance(value, list):
            return [walk(one, depth + 1) for one in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    if not isinstance(record, dict):
        raise IntegrityError(f"{shown} is damaged: its record is not an object")
    found: dict[str, Any] = walk(record, 0)
    return found


# ── folders ──


def _folder(path: Path, shown: str) -> Recognized:
    names = sorted(os.listdir(path))
    if "domain.toml" in names:
        return _domain(path, shown)
    if "model_index.json" in names:
        return _model(path, shown)
    steps = [name for name in names if re.fullmatch(r"step-\d{8,}\.safetensors", name)]
    if steps:
        last = recognize(path / steps[-1])
        return Recognized(type="training_checkpoints", facts={"checkpoints": steps}, recorded=last.recorded)
    hint = f"name its files: e4t info {shown.rstrip(os.sep)}/*" if names else None
    raise InputError(f"{shown} is a folder, and nothing that e4t writes", hint=hint)


def _domain(folder: Path, shown: str) -> Recognized:
    from e4t_cli.registry.manifest import read_manifest  # imports pydantic: too slow for --help

    _check_regular(folder / "domain.toml")
    manifest = read_manifest(folder / "domain.toml")
    sizes = {name: os.path.getsize(folder / name) for name in manifest.files if os.path.isfile(folder / name)}
    facts = {"bytes": sum(sizes.values()), "files": sizes, "missing": sorted(set(manifest.files) - set(sizes))}
    recorded = {**manifest.model_dump(exclude={"tuning", "pretraining", "sizes"}), "files": dict(manifest.files)}
    for name in ("tuning", "pretraining"):
        recorded[name] = dict(vars(getattr(manifest, name)))
    return Recognized(type="domain", facts=facts, recorded=todays_names(recorded, shown))


def _model(folder: Path, shown: str) -> Recognized:
    """Return an export, or a base, which has the same layout."""
    index = _object(_text(folder / "model_index.json"), shown)
    files = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
    parts = sorted(name for name in index if os.path.isdir(folder / name))
    exported = os.path.isfile(folder / "learned_word.safetensors")
    facts: dict[str, Any] = {"bytes": sum(os.path.getsize(file) for file in files if os.path.isfile(file))}
    facts |= {"parts": parts, "exported": exported}
    recorded: dict[str, Any] = {"class": index.get("_class_name", "")}
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    if exported and os.path.isfile(tokenizer):
        added = _object(_text(tokenizer), shown).get("added_tokens")
        tokens = [one for one in added if isinstance(one, dict)] if isinstance(added, list) else []
        recorded["tokens"] = [str(one.get("content")) for one in tokens if not one.get("special")]
    return Recognized(type="model", facts=facts, recorded=recorded)


def _text(path: Path) -> str:
    _check_regular(path)
    with path.open("rb") as file:
        data = file.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise IntegrityError(f"{printable(str(path))} is longer than such a file can be")
    return data.decode("utf-8", errors="replace")


def _check_regular(path: Path) -> None:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise InputError(f"{printable(str(path))} is not a file")
