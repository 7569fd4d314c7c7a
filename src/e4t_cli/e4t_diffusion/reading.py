"""The single place in this program that touches a pickle.

A file of `torch.save` is a zip of raw numbers and one pickle that says how they are laid out. It is
hashed, its zip is looked at, and torch's weights-only loader runs the pickle: tensors, dictionaries
and nothing that could be called. This module is imported only by `__main__`, in a process that
`isolation.py` has cut off.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from e4t_cli.errors import IntegrityError, printable
from e4t_cli.files import sha256_of

MOST_ENTRIES = 20_000
MOST_PICKLE_BYTES = 16_000_000
"""The layout of 2,000 tensors takes 0.3 MB."""


def read_tensors_of(path: Path, sha256: str = "") -> tuple[dict[str, Tensor], str]:
    """Read a state dict, with its numbers left on disk until they are used.

    Args:
        path: a file that torch.save wrote.
        sha256: what it has to be; "" where nobody declared it.

    Returns:
        Its tensors by name, and its SHA-256.

    Raises:
        IntegrityError: it is anything but that.
    """
    found = sha256_of(path)
    if sha256 and found != sha256:
        raise IntegrityError(f"{path.name} is damaged: its SHA-256 is {found}, not {sha256}")
    _check_zip(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        # Never torch's own sentence: it explains how to read the file without the restriction.
        unwanted = re.search(r"GLOBAL ([\w.]{1,100})", str(error))
        asks = f": it asks for {unwanted[1]}" if unwanted else ""
        raise IntegrityError(
            f"{path.name} holds more than tensors, or is damaged, and was not opened{asks}",
            hint="get the file again from where it was published",
        ) from error
    if not isinstance(content, dict) or not content:
        raise IntegrityError(f"{path.name} is not a table of tensors")
    for key, value in content.items():
        _check_entry(path, key, value)
    return {key: value.detach() for key, value in content.items()}, found


def _check_zip(path: Path) -> None:
    """Look at the container before anything reads it.

    Raises:
        IntegrityError: it is not one that torch.save writes, or it would grow in memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise IntegrityError(
            f"{path.name} is not a file of torch.save, or only a part of one",
            hint="get the file again from where it was published",
        ) from error
    pickles = [one for one in entries if one.filename.endswith(".pkl")]
    stored = all(one.compress_type == zipfile.ZIP_STORED for one in entries)
    if len(entries) > MOST_ENTRIES or not stored or len(pickles) != 1:
        raise IntegrityError(f"{path.name} is a zip file, but not one of torch.save")
    if pickles[0].file_size > MOST_PICKLE_BYTES:
        raise IntegrityError(f"{path.name} has a layout of {pickles[0].file_size:,} bytes")


def _check_entry(path: Path, key: object, value: object) -> None:
    if not isinstance(key, str) or not isinstance(value, Tensor):
        raise IntegrityError(f"{path.name} holds {printable(repr(key), limit=80)}, not a tensor")
    shown = f"{path.name}: {printable(key, limit=200)}"
    if value.layout != torch.strided or not value.is_floating_point() or value.is_meta:
        raise IntegrityError(f"{shown} is not a tensor of plain numbers")
    # A tensor can claim any size over a few bytes by repeating them.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise IntegrityError(f"{shown} claims more numbers than the file has")
