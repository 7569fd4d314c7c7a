"""Writes files and folders atomically: every file that this program leaves is old, complete, or absent."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from e4t_cli.errors import E4TError, InputError, ResourceError, UsageError, printable

SPARE_BYTES = 50_000_000
_DISK_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quota code
_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}
_BINARY = getattr(os, "O_BINARY", 0)  # Windows translates line ends without it


def write_atomically(
    path: str | os.PathLike[str], data: bytes | Callable[[BinaryIO], None], *, overwrite: bool = True
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
    if not overwrite and os.path.exists(path):
        raise FileExistsError(f"{path} exists")
    # Not tempfile: its files are private, and the result should be as readable as any other.
    temporary = _temporary_path(path)
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
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def file_error(error: OSError | ValueError, path: str | os.PathLike[str], *, reading: bool = False) -> E4TError:
    """Return the error, with its exit code and sentence, for a failed read or write of a path that the user named.

    Args:
        error: from the operating system; a ValueError for a name that cannot be one.
        path: the file or folder.
        reading: whether it was to be read; the default is that it was to be written.

    Returns:
        ResourceError for a full disk or exhausted memory, UsageError for a missing permission, a name or a kind of
        path that cannot be used when writing and for a missing file, InputError for other failures to read.
    """
    shown, number = printable(str(path)), error.errno if isinstance(error, OSError) else None
    if number in _DISK_FULL:
        return ResourceError(f"the disk is full: {shown} was not written", hint="make room, or choose another disk")
    if number == errno.ENOMEM:
        return ResourceError(f"memory ran out at {shown}")
    if number == errno.ENOENT and reading:
        return UsageError(f"there is no file {shown}")
    if number in (errno.EEXIST, errno.ENOTDIR) and not reading:
        return UsageError(f"{shown} is not a folder", hint="choose another place")
    reason = error.strerror or str(error) if isinstance(error, OSError) else "that cannot be a name"
    verb, kind = ("read", InputError) if reading else ("written", UsageError)
    hint = "its permissions do not allow it" if number in _PERMISSION else "choose another place"
    return kind(
        f"{shown} cannot be {verb}: {printable(reason)}", hint=hint if number in _PERMISSION or not reading else None
    )


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's content, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_tree(folder: str | os.PathLike[str]) -> None:
    """Flush every file and folder below a folder to the disk, before it gets its final name."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(Path(parent, name), "rb+") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(parent))


def rename_to_free_name(temporary: Path, path: Path) -> None:
    """Rename a complete file; raises FileExistsError if the name is taken, whose file stays as it is."""
    try:
        # A hard link, unlike a rename, fails when the name is taken, even by another process.
        os.link(temporary, path)
    except FileExistsError:
        raise FileExistsError(f"{path} exists") from None
    except OSError:
        # A file system without hard links: reserve the name, then fill it.
        path.touch(exist_ok=False)
        os.replace(temporary, path)
    else:
        os.unlink(temporary)


def _temporary_path(path: Path) -> Path:
    return path.parent / f".{path.name[:48]}.{secrets.token_hex(8)}~"


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_absent(path: Path) -> None:
    """Raise UsageError if a path exists."""
    if os.path.exists(path):
        raise UsageError(f"{printable(str(path))} exists already", hint="choose a name that is free")


@contextmanager
def staging_directory(path: Path, needed: int) -> Iterator[Path]:
    """Yield a new empty folder beside `path`, removed at the end with whatever is left in it.

    Args:
        path: the file or folder that is put together there, and renamed when it is complete.
        needed: its expected size in bytes.

    Raises:
        ResourceError: the disk has no room, or something could not be written.
    """
    from safetensors import SafetensorError

    free, disk = free_bytes(path.parent), printable(str(path.parent))
    if needed + SPARE_BYTES > free:
        message = f"the model needs {shown_size(needed)}, and {shown_size(free)} are free on the disk of {disk}"
        raise ResourceError(message, hint="make room, or choose a place on another disk")
    staging = _temporary_path(path)
    try:
        staging.mkdir(parents=True)
        yield staging
    except (OSError, SafetensorError) as error:
        message = f"{printable(str(path))} could not be written: {printable(str(error))}"
        raise ResourceError(message, hint="choose a place on another disk") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, which need not exist yet."""
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def shown_size(count: float) -> str:
    """Return a number of bytes in decimal units for display: "1 kB", "2.5 GB"."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
