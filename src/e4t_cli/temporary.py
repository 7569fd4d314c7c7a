"""Temporary files and folders: their names tell whose they are, so that the next run removes what a killed one left.

Beside NAME, until it is complete, lies `.NAME.MACHINE-PROCESS-RANDOM~`. A leftover is one of a process of this machine
that has ended, or one older than a day: of another machine, of one that was started anew, of an earlier version.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path

REPLACED = "replaced"  # folder inside a temporary one, for what is being replaced, under its own name
STALE_SECONDS = 24 * 3600
# The two last names are those of earlier versions.
_NAME = re.compile(r"\.(.+)\.(?:([0-9a-f]{8})-([0-9]+)-)?[0-9a-f]{8,16}~|\.(adding|removing)-[0-9a-f]{12}", re.DOTALL)


def temporary_path(path: Path) -> Path:
    """Return a new name beside `path`, hidden, for what is not complete yet."""
    return path.parent / f".{path.name[:48]}.{machine()}-{os.getpid()}-{secrets.token_hex(4)}~"


def final_path(path: Path) -> Path:
    """Return a path for messages: without temporary folders, and with its final name."""
    parts = [part for part in path.parts[:-1] if not _NAME.fullmatch(part)]
    found = _NAME.fullmatch(path.name)
    return Path(*parts, found[1] or found[4] if found else path.name)


@cache
def machine() -> str:
    """Return eight hexadecimal digits for this machine since its start, or a container of it: its process numbers."""
    about = os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")
    with suppress(OSError):
        about += Path("/proc/sys/kernel/random/boot_id").read_text() + str(os.stat("/proc/self/ns/pid").st_ino)
    return sha256(about.encode()).hexdigest()[:8]


def has_ended(machine_name: str, process: int) -> bool:
    """Whether a process has ended for certain; False where that cannot be known."""
    if machine_name != machine() or os.name != "posix":  # elsewhere os.kill ends the process
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def is_leftover(path: Path) -> bool:
    """Whether a path has a temporary name, and nobody is at it any more."""
    found = _NAME.fullmatch(path.name)
    if found is None:
        return False
    if found[2] and has_ended(found[2], int(found[3])):
        return True
    with suppress(OSError):
        return time.time() - path.lstat().st_mtime > STALE_SECONDS
    return False


def leftovers(folder: Path, name: str = "") -> Iterator[Path]:
    """Yield the leftovers in a folder, or those of one name in it."""
    with suppress(OSError):
        for entry in sorted(os.listdir(folder)):
            if entry.startswith(f".{name[:48]}.") if name else entry.startswith("."):
                path = folder / entry
                found = _NAME.fullmatch(entry)
                if found and name[:48] in ("", found[1]) and is_leftover(path):
                    yield path


def sweep(path: Path) -> None:
    """Remove the leftovers of a name; what one of them was about to replace gets its name back."""
    for left in leftovers(path.parent, path.name):
        old = left / REPLACED / path.name
        with suppress(OSError):
            if os.path.lexists(old) and not os.path.lexists(path):
                os.rename(old, path)
        remove(left)


def remove(path: Path) -> None:
    """Remove a file or a folder, as far as that is possible."""
    with suppress(OSError):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
