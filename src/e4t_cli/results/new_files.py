"""Files under names that nobody has: no existing one is ever touched."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from e4t_cli.errors import InputError, ResourceError, UsageError, printable
from e4t_cli.files import write_atomically

_DISK_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quota code


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """Make the folder for results, before the work rather than after it.

    Raises:
        UsageError: it cannot be made, or may not be written to.
        ResourceError: the disk is full.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise _explained(error, path) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UsageError(f"the folder {printable(str(path))} cannot be written to")
    return path


def write_new(folder: str | os.PathLike[str], stem: str, data: bytes, suffix: str = ".png") -> Path:
    """Write a file under the first free name of `stem.png`, `stem-2.png`, …

    Names are claimed by the file system, so that many processes can share a folder.
    """
    path = check_folder(folder)
    number = 1
    while True:
        target = path / f"{stem}{'' if number == 1 else f'-{number}'}{suffix}"
        try:
            write_atomically(target, data, overwrite=False)
            return target
        except FileExistsError:
            number += 1
        except OSError as error:
            raise _explained(error, target) from error


def _explained(error: OSError | ValueError, path: Path) -> UsageError | ResourceError | InputError:
    shown = printable(str(path))
    if isinstance(error, FileExistsError | NotADirectoryError):
        return UsageError(f"{shown} is not a folder", hint="choose another one with -o")
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return ResourceError(f"the disk is full: {shown} was not written")
    reason = error.strerror if isinstance(error, OSError) else "that cannot be a name"
    return UsageError(f"{shown} cannot be written: {reason}", hint="choose another one with -o")
