"""The files of an export: whether their names are free or an earlier export's, and how they get them.

A folder or a file appears whole. Of a file and its word, the word is first, and stays in the temporary folder: by that
copy the next run recognises, and removes, the word of a run that was killed before the second file.
"""

from __future__ import annotations

import contextlib
import os
import re
import unicodedata
from pathlib import Path

from e4t_cli.files import check_absent, holds_only, put_in_place, write_atomically, writing
from e4t_cli.temporary import leftovers, sweep

WRITER = "written_by"  # key in the metadata of files that may be written again
FOLDER = {
    *("model_index.json", "README.md", "unet", "vae", "text_encoder", "tokenizer"),
    *("scheduler", "safety_checker", "feature_extractor"),
}


def embedding_path(path: Path) -> Path:
    """Return the path of the embedding of a file of weights or of a folder; its stem is the concept's token.

    ComfyUI ends a token at a space or a comma, and stable-diffusion.cpp reads parentheses as a weight: the name has
    letters, digits, "-" and "_" only.
    """
    plain = unicodedata.normalize("NFKD", path.name.removesuffix(".safetensors")).encode("ascii", "ignore").decode()
    token = re.sub(r"[^A-Za-z0-9_-]+", "-", plain).strip("-") or "my"
    return path.with_name(f"{token}-word.safetensors")


def is_export(path: Path) -> bool:
    """Whether an export wrote a file, or a folder and everything in it."""
    if os.path.isdir(path):
        found = [entry.name for entry in path.glob("*.safetensors")]
        words = [name for name in found if name == "learned_word.safetensors" or name.endswith("-word.safetensors")]
        return len(words) == 1 and os.path.isfile(path / "model_index.json") and holds_only(path, {*FOLDER, *words})
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return WRITER in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _outputs(target: Path) -> list[Path]:
    """Return what an export writes: a folder, or the file of the word and then the one that needs it."""
    return [embedding_path(target), target] if target.suffix == ".safetensors" else [target]


def check_free(target: Path, *, force: bool) -> None:
    """Raise UsageError if what an export writes exists, or with `force`, if no export wrote it."""
    outputs = _outputs(target)
    for left in leftovers(target.parent, target.name):
        copy = left / outputs[0].name
        with contextlib.suppress(OSError):
            if not os.path.lexists(target) and copy.read_bytes() == outputs[0].read_bytes():
                outputs[0].unlink()
    sweep(target)
    for path in outputs:
        check_absent(path, ours=is_export if force else None)


def commit(made: Path, target: Path, *, force: bool) -> None:
    """Give everything in the temporary folder its final name."""
    check_free(target, force=force)
    *word, last = _outputs(target)
    for path in word:
        copy = made.with_name(path.name).read_bytes()  # the file stays, see `check_free`
        with writing(path):
            write_atomically(path, copy, overwrite=force)
    try:
        put_in_place(made, last, ours=is_export if force else None)
    except BaseException:
        for path in word if not force else ():
            path.unlink(missing_ok=True)
        raise
