"""Whether files of the hub's cache are what the hub declared, and remembering that they were.

huggingface_hub compares lengths only: a body of the right length and the wrong content stays for
ever. Here every file is read once, its checksum compared with the hub's, and the result remembered
with the file's length and time; when either changes, it is read again. The hub's cache names a blob
after its checksum, so even files that another program fetched can be checked without a network.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from e4t_cli.files import write_atomically

from .places import own_cache

_BLOCK = 1 << 22
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def is_intact(
    path: Path, declared: str = "", on_bytes: Callable[[int], None] | None = None
) -> str | None:
    """Compare a file with its declared checksum, unless that was done and it has not changed.

    Args:
        path: in a snapshot folder of the hub's cache.
        declared: SHA-256, or git's SHA-1; "" takes the name of the blob.
        on_bytes: called with the number of bytes of each block read, and of files not read again.

    Returns:
        None if it is as declared, otherwise the checksum it has. A file that nobody declared
        anything about is taken as it is.
    """
    expected = declared or blob_name(path)
    if not expected:
        return None
    stamp = _stamp(path)
    if _recall(path) == {**stamp, "digest": expected}:
        if on_bytes is not None:
            on_bytes(int(str(stamp["size"])))
        return None
    found = digest_of(path, expected, on_bytes)
    if found != expected:
        return found
    _memorise(path, {**stamp, "digest": expected})
    return None


def blob_name(path: Path) -> str:
    """Return the checksum in the name of the blob that a snapshot's link points to, or ""."""
    with contextlib.suppress(OSError):
        name = os.path.basename(os.readlink(path))
        if _DIGEST.fullmatch(name):
            return name
    return ""


def digest_of(path: Path, like: str, on_bytes: Callable[[int], None] | None = None) -> str:
    """Return the checksum of a file, of the kind of another checksum.

    Args:
        like: 64 digits for SHA-256, 40 for git's SHA-1 of a blob.
    """
    if len(like) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            if on_bytes is not None:
                on_bytes(len(block))
    return digest.hexdigest()


def discard(path: Path) -> None:
    """Delete a file of a snapshot and the blob behind it, so that it will be fetched again."""
    blob = path.parent / os.readlink(path) if path.is_symlink() else None
    path.unlink(missing_ok=True)
    if blob is not None:
        blob.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        _note(path).unlink(missing_ok=True)


def forget_gone() -> int:
    """Forget what is remembered of files that exist no more; returns how many."""
    gone = 0
    for note in (own_cache() / "verified").glob("*.json"):
        try:
            path = json.loads(note.read_text(encoding="utf-8")).get("path", "")
        except (OSError, ValueError):
            path = ""
        if not path or not os.path.exists(path):
            note.unlink(missing_ok=True)
            gone += 1
    return gone


def _stamp(path: Path) -> dict[str, object]:
    about = path.stat()
    return {"path": str(path), "size": about.st_size, "mtime_ns": about.st_mtime_ns}


def _note(path: Path) -> Path:
    name = hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return own_cache() / "verified" / f"{name}.json"


def _recall(path: Path) -> object:
    try:
        return json.loads(_note(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _memorise(path: Path, stamp: dict[str, object]) -> None:
    note = _note(path)
    with contextlib.suppress(OSError):  # read-only: the file is read again the next time
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(note, json.dumps(stamp).encode())
