"""The files of tuned concepts in e4t's cache: their folder, how much they may take, and which are removed first.

A file of a tuning has the weights that it gave, so that the same tuning is not computed again (`formats.tuned_cache`).
They show the person or thing that was tuned on: only the user may read them.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from e4t_cli.errors import UsageError, printable
from e4t_cli.files import shown_size, write_atomically
from e4t_cli.hub.paths import matches, user_cache
from e4t_cli.temporary import leftovers, remove

VARIABLE = "E4T_TUNED_CACHE"  # gigabytes that all files may take; 0 keeps none
USUAL_GB, MOST_GB = 2.0, 1e6
SHARE = 4  # of which one file may take one


def tuned_folder() -> Path:
    """Return the folder, whether it exists or not."""
    return user_cache() / "tuned"


def tuned_files(pattern: str = "*") -> list[Path]:
    """Return the complete files, the one that was used last at the end."""
    dated = []
    for path in matches(tuned_folder(), f"{pattern}.safetensors"):
        with contextlib.suppress(OSError):  # another process removed it
            dated.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(dated)]


def allowed_bytes() -> int:
    """Return what all files may take; UsageError if the environment has no such number."""
    given = os.environ.get(VARIABLE) or USUAL_GB
    with contextlib.suppress(ValueError):
        if 0 <= (size := float(given)) <= MOST_GB and math.isfinite(size):
            return int(size * 1e9)
    reason = f"{VARIABLE} must be a number of gigabytes, not {printable(str(given), limit=40)!r}"
    raise UsageError(reason, hint=f"for example {VARIABLE}=2; 0 keeps no tuned concepts")


def refusal(size: int) -> str:
    """Return why no file of so many bytes is kept, "" if one is."""
    if size * SHARE <= (allowed := allowed_bytes()):
        return ""
    most = f"{shown_size(size)} of {shown_size(allowed)} are more than one in {SHARE}"
    return f"{VARIABLE} is 0" if not allowed else f"{most}; {VARIABLE}={math.ceil(size * SHARE / 1e9)} would do"


def write_tuned_file(path: Path, data: bytes | Callable[[BinaryIO], None]) -> str:
    """Write a file and remove the longest unused ones that are too many; returns why it was not written, or "".

    Not flushed to the disk: a file that a power failure leaves incomplete fails its checksum.
    """
    try:
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        for left in leftovers(path.parent):
            remove(left)
        write_atomically(path, data, private=True, flush=False)
    except OSError as error:
        return error.strerror or str(error)
    allowed, total = allowed_bytes(), 0
    for other in reversed(tuned_files()):
        with contextlib.suppress(OSError):
            total += other.stat().st_size
            if total > allowed and other != path:
                other.unlink()
    return ""


def remember_use(path: Path) -> None:
    """Record that a file was used, as its time of modification: times of access are often not kept."""
    with contextlib.suppress(OSError):
        os.utime(path)
