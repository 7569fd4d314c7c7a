"""Writing files so that nothing is ever torn: the old content, the new content, or no file.

Standard library only; every file that this program leaves behind is written through here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_BINARY = getattr(os, "O_BINARY", 0)  # Windows translates line ends without it


def write_atomically(
    path: str | os.PathLike[str],
    data: bytes | Callable[[BinaryIO], None],
    *,
    overwrite: bool = True,
) -> None:
    """Write a file so that a crash at any moment leaves it absent, old, or complete.

    Args:
        path: the final name; its folder must exist.
        data: the content, or a function that writes it to an open binary file.
        overwrite: if False, an existing file stays as it is, also one that appears meanwhile.

    Raises:
        FileExistsError: the file exists and may not be overwritten.
        OSError: the disk is full, the folder cannot be written to, and the like.
    """
    path = Path(path)
    if not overwrite and path.exists():
        raise FileExistsError(f"{path} exists")
    # Not tempfile: its files are private, and the result should be as readable as any other.
    temporary = path.parent / f".{path.name[:48]}.{secrets.token_hex(8)}~"
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _BINARY, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            if callable(data):
                data(file)
            else:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(temporary, path)
        else:
            rename_to_free_name(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's content, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_tree(folder: str | os.PathLike[str]) -> None:
    """Have everything below a folder on the disk, whoever wrote it: before it gets its name."""
    for place, _, names in os.walk(folder):
        for name in names:
            with open(Path(place, name), "rb+") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(place))


def rename_to_free_name(temporary: Path, path: Path) -> None:
    """Give a file that is complete its name.

    Raises:
        FileExistsError: the name is taken; that file stays as it is.
    """
    try:
        # A hard link, unlike a rename, fails when the name is taken, even by another process.
        os.link(temporary, path)
    except FileExistsError:
        raise FileExistsError(f"{path} exists") from None
    except OSError:
        # A file system without hard links: reserve the name, then fill it.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(temporary, path)
    else:
        os.unlink(temporary)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
