"""Writes files and folders atomically: every file that this program leaves is old, complete, or absent."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from e4t_cli.errors import E4TError, InputError, ResourceError, UsageError, printable
from e4t_cli.temporary import REPLACED, final_path, remove, sweep, temporary_path

SPARE_BYTES = 50_000_000
Recognise = Callable[[Path], bool]  # whether this program wrote a file or folder, by its content
_DISK_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quota code
_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_BINARY = getattr(os, "O_BINARY", 0)  # Windows translates line ends without it


def write_atomically(
    path: str | os.PathLike[str], data: bytes | Callable[[BinaryIO], None], *, overwrite: bool = True,
    private: bool = False, flush: bool = True,
) -> None:  # fmt: skip
    """Write a file so that a crash at any moment leaves it absent, old, or complete.

    Args:
        path: the final name; its folder must exist.
        data: the content, or a function that writes it to an open binary file.
        overwrite: if False, an existing file stays as it is, also one that appears meanwhile.
        private: only the user may read it.
        flush: wait for the disk; False for a file with a checksum that can be made again: after a power failure it may
            be incomplete.

    Raises:
        FileExistsError: the file exists and may not be overwritten.
        OSError: the disk is full, the folder cannot be written to, and the like.
    """
    path = Path(path)
    if not overwrite and os.path.exists(path):
        raise FileExistsError(errno.EEXIST, "File exists", str(path))
    # Not tempfile: its files are private, and the result should be as readable as any other.
    temporary = temporary_path(path)
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _BINARY, 0o600 if private else 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            if callable(data):
                data(file)
            else:
                file.write(data)
            file.flush()
            if flush:
                os.fsync(file.fileno())
        if overwrite:
            os.replace(temporary, path)
        else:
            rename_to_free_name(temporary, path)
    except BaseException:
        with suppress(OSError):  # the first error counts
            temporary.unlink()
        raise
    if flush:
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
    shown, number = printable(str(final_path(Path(path)))), error.errno if isinstance(error, OSError) else None
    if number in _DISK_FULL:
        return ResourceError(f"the disk is full: {shown} was not written", hint="make room, or choose another disk")
    if number == errno.ENOMEM:
        return ResourceError(f"memory ran out at {shown}")
    if number == errno.ENOENT and reading:
        return UsageError(f"there is no file {shown}")
    if number == errno.EEXIST and not reading:
        return UsageError(f"{shown} is not a folder", hint="choose another place")
    reason = error.strerror or str(error) if isinstance(error, OSError) else "that cannot be a name"
    verb, kind = ("read", InputError) if reading else ("written", UsageError)
    hint = "its permissions do not allow it" if number in _PERMISSION else "choose another place"
    return kind(
        f"{shown} cannot be {verb}: {printable(reason)}", hint=hint if number in _PERMISSION or not reading else None
    )


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what the operating system refuses while a path is written into the error of `file_error`.

    Raises:
        UsageError, ResourceError: see `file_error`; UsageError too if the name was taken meanwhile.
    """
    try:
        yield
    except FileExistsError as error:
        raise taken(path) from error
    except (OSError, UnicodeEncodeError) as error:  # safetensors takes no name that is not UTF-8
        raise file_error(error, path) from error
    except Exception as error:
        # safetensors (0.8.0) has an exception of its own, with the number at the end of its text.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, E4TError) or number is None:
            raise
        raise file_error(OSError(int(number[1]), os.strerror(int(number[1]))), path) from error


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, as far as they do not exist; raises UsageError or ResourceError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise file_error(error, folder) from error


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


def put_in_place(temporary: Path, path: Path, *, ours: Recognise | None = None) -> None:
    """Give a complete file or folder its final name; a crash leaves there what was there before, or the new one.

    Args:
        ours: if given, what is there and passes is replaced; None replaces nothing.

    Raises:
        FileExistsError: the name is taken; what is there stays as it is.
        UsageError: what is there is not ours.
    """
    is_folder = os.path.isdir(temporary)
    if ours is None or not os.path.lexists(path):
        (rename_folder_to_free_name if is_folder else rename_to_free_name)(temporary, path)
    else:
        check_absent(path, ours=ours)
        if not is_folder and not os.path.isdir(path):
            os.replace(temporary, path)
        elif not rename_with_flags(temporary, path, exchange=True):
            aside = temporary_path(path)
            (aside / REPLACED).mkdir(parents=True)
            os.rename(path, aside / REPLACED / path.name)
            os.rename(temporary, path)  # `sweep` repairs a crash before this
            remove(aside)
        remove(temporary)  # the old one, if they were exchanged
    _sync_folder(path.parent)


def rename_to_free_name(temporary: Path, path: Path) -> None:
    """Rename a complete file; raises FileExistsError if the name is taken, whose file stays as it is."""
    if rename_with_flags(temporary, path):
        return
    try:
        # A hard link, unlike a rename, fails when the name is taken, even by another process.
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        # A file system without hard links: reserve the name, then fill it.
        path.touch(exist_ok=False)
        os.replace(temporary, path)
    else:
        os.unlink(temporary)


def rename_folder_to_free_name(temporary: Path, path: Path) -> None:
    """Rename a complete folder; raises FileExistsError if the name is taken, also by an empty folder."""
    if not rename_with_flags(temporary, path):
        if os.name == "posix":
            path.mkdir()  # reserves the name: a plain rename replaces an empty folder, whosever it is
        os.rename(temporary, path)


def rename_with_flags(source: Path, target: Path, *, exchange: bool = False) -> bool:
    """Rename to a free name, or exchange two names, in one step; False where the file system cannot.

    Raises:
        FileExistsError: the name is taken.
        OSError: another reason.
    """
    one, other = os.fsencode(source), os.fsencode(target)
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            failed = library.renamex_np(one, other, 2 if exchange else 4)  # RENAME_SWAP, RENAME_EXCL
        else:
            failed = library.renameat2(-100, one, -100, other, 2 if exchange else 1)  # RENAME_EXCHANGE, _NOREPLACE
    except (AttributeError, TypeError, OSError):  # another system, or an old C library
        return False
    number = ctypes.get_errno()
    if failed and number not in _UNSUPPORTED:
        raise OSError(number, os.strerror(number), str(target))
    return not failed


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    # What is in it is complete and has its name by now. Some file systems cannot sync folders, and of a folder without
    # the right to list it nothing can be opened.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_absent(path: Path, *, ours: Recognise | None = None) -> None:
    """Raise UsageError if a path exists, unless `ours` recognises it; leftovers of killed processes are removed."""
    sweep(path)
    if os.path.lexists(path):
        if ours is None:
            raise taken(path)
        if not ours(path):
            message = f"{printable(str(path))} was not written by e4t, or holds more: it is not replaced"
            raise UsageError(message, hint="choose a name that is free, or move it away")


def taken(path: str | os.PathLike[str]) -> UsageError:
    """Return the error for an output whose name is taken."""
    shown = printable(str(final_path(Path(path))))
    return UsageError(f"{shown} exists already", hint="choose a name that is free, or replace it with --force")


@contextmanager
def staging_directory(path: Path, needed: int = 0) -> Iterator[Path]:
    """Yield a new empty folder beside `path`, removed at the end with whatever is left in it.

    Args:
        path: the file or folder that is put together there, and renamed when it is complete.
        needed: its expected size in bytes.

    Raises:
        UsageError, ResourceError: the disk has no room, or something could not be written (`writing`).
    """
    free, disk = free_bytes(path.parent), printable(str(final_path(path).parent))
    if needed + SPARE_BYTES > free:
        message = f"the model needs {shown_size(needed)}, and {shown_size(free)} are free on the disk of {disk}"
        raise ResourceError(message, hint="make room, or choose a place on another disk")
    make_folder(path.parent)
    staging = temporary_path(path)
    try:
        with writing(path):
            staging.mkdir()
            yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def holds_only(folder: Path, names: Collection[str]) -> bool:
    """Whether a path is a folder, not a link to one, with no other entries than these and what file managers add."""
    try:
        found = set(os.listdir(folder)) - {".DS_Store", "Thumbs.db", "desktop.ini"}
    except OSError:
        return False
    return not os.path.islink(folder) and found <= set(names)


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
