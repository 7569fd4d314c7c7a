"""Writing files so that nothing is ever torn: the old content, the new content, or no file.

Standard library only; every file that this program leaves behind is written through here.

Where a model is put together before it gets its name: beside it, and gone afterwards.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from e4t_cli.errors import ResourceError, UsageError, printable

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


SPARE_BYTES = 50_000_000


def check_free(path: Path) -> None:
    """Refuse a name that is taken.

    Raises:
        UsageError: it is.
    """
    if path.exists():
        raise UsageError(
            f"{printable(str(path))} exists already", hint="choose a name that is free"
        )


@contextmanager
def making(path: Path, needed: int) -> Iterator[Path]:
    """Yield an empty folder on the disk of `path`; whatever is left in it goes at the end.

    Args:
        path: what is to be made.
        needed: how many bytes it will have.

    Raises:
        ResourceError: the disk has no room, or something could not be written.
    """
    from safetensors import SafetensorError

    free = free_bytes(path.parent)
    if needed + SPARE_BYTES > free:
        raise ResourceError(
            f"the model needs {shown_size(needed)}, and {shown_size(free)} are free on the disk of "
            f"{printable(str(path.parent))}",
            hint="make room, or choose a place on another disk",
        )
    place = path.parent / f".{path.name[:48]}.{secrets.token_hex(8)}~"
    try:
        place.mkdir(parents=True)
        yield place
    except (OSError, SafetensorError) as error:
        raise ResourceError(
            f"{printable(str(path))} could not be written: {printable(str(error))}",
            hint="choose a place on another disk",
        ) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def free_bytes(folder: Path) -> int:
    """Return the room on the disk that a folder is on, or will be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def shown_size(count: float) -> str:
    """Return a number of bytes as people say it, in steps of a thousand."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
