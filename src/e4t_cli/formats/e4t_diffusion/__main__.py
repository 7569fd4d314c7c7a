"""The single place in this program that touches a pickle.

A file of `torch.save` is a zip of raw numbers and one pickle that says how they are laid out. It is
hashed, its zip is looked at, and torch's weights-only loader runs the pickle: tensors, dictionaries
and nothing that could be called. This module is imported only by `__main__`, in a process that
`isolation.py` has cut off.

The process that reads a checkpoint: a wish on stdin, lines of JSON on stdout, files in a folder.

    python -m e4t_cli.formats.e4t_diffusion TARGET < wish.json

Cut off first, imports second: by the time a byte of the checkpoint is read, there is no network.
"""

from __future__ import annotations

import json
import os
import re
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e4t_cli.errors import IntegrityError, printable
from e4t_cli.files import sha256_of
from e4t_cli.formats.e4t_diffusion.runner import forbid, leave_the_network

if TYPE_CHECKING:
    from torch import Tensor

MAX_ENTRIES = 20_000
MAX_PICKLE_BYTES = 16_000_000
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
    import torch

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
    if len(entries) > MAX_ENTRIES or not stored or len(pickles) != 1:
        raise IntegrityError(f"{path.name} is a zip file, but not one of torch.save")
    if pickles[0].file_size > MAX_PICKLE_BYTES:
        raise IntegrityError(f"{path.name} has a layout of {pickles[0].file_size:,} bytes")


def _check_entry(path: Path, key: object, value: object) -> None:
    import torch

    if not isinstance(key, str) or not isinstance(value, torch.Tensor):
        raise IntegrityError(f"{path.name} holds {printable(repr(key), limit=80)}, not a tensor")
    shown = f"{path.name}: {printable(key, limit=200)}"
    if value.layout != torch.strided or not value.is_floating_point() or value.is_meta:
        raise IntegrityError(f"{shown} is not a tensor of plain numbers")
    # A tensor can claim any size over a few bytes by repeating them.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise IntegrityError(f"{shown} claims more numbers than the file has")


def main() -> int:
    leave_the_network()  # before a library starts threads, after which the kernel refuses
    from e4t_cli.errors import E4TError
    from e4t_cli.formats.e4t_diffusion.checkpoint import ConversionRequest
    from e4t_cli.formats.e4t_diffusion.conversion import write_domain_folder

    wish, target = ConversionRequest.from_json(sys.stdin.read()), Path(sys.argv[1])
    # Whatever a library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    forbid()
    try:
        report = write_domain_folder(
            wish, target, read_tensors_of, lambda percent: answer(done=percent, total=100)
        )
    except E4TError as error:
        answer(error={"message": error.message, "hint": error.hint, "exit": error.exit_code})
        return error.exit_code
    except MemoryError:
        answer(error={"message": "memory ran out", "hint": None, "exit": 6})
        return 6
    except OSError as error:
        answer(error={"message": f"{error.strerror or error}", "hint": None, "exit": 6})
        return 6
    answer(report=asdict(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
