"""Copying a pack while checking it: what is kept is what was checked."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from e4t_cli.errors import IntegrityError, ResourceError, printable
from e4t_cli.files import write_atomically
from e4t_cli.manifest import MOST_BYTES, Manifest, parse_manifest
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.shelf.parcels import CARD, Parcel

_BLOCK = 1 << 20


def copy_pack(
    parcel: Parcel, folder: Path, on_progress: ProgressCallback | None = None
) -> Manifest:
    """Copy a parcel into a new folder, the card first, and believe nothing.

    The SHA-256 is that of the very bytes that are written, so nothing can change in between.

    Raises:
        IntegrityError: a file is missing, or not as the card says, or no safetensors or JSON.
        ResourceError: there is no room for it.
    """
    with parcel.open(CARD) as file:
        text = file.read(MOST_BYTES + 1)
    card = parse_manifest(text, f"the {CARD} of {parcel.source}")
    if not card.files:
        raise IntegrityError(f"the {CARD} of {parcel.source} lists no files: there are no weights")
    folder.mkdir()
    write_atomically(folder / CARD, text)
    lengths = {name: parcel.size(name) for name in card.files}
    for name, length in lengths.items():
        if card.sizes.get(name, length) != length:
            raise IntegrityError(
                f"{name} in {parcel.source} has {length:,} bytes, its card says "
                f"{card.sizes[name]:,}"
            )
    total, free = sum(lengths.values()), shutil.disk_usage(folder).free
    if total > free:
        raise ResourceError(f"{card.name} needs {total:,} bytes on disk, {free:,} are free")
    done = 0
    for name, sha256 in card.files.items():
        with parcel.open(name) as file:
            write_atomically(folder / name, _Checked(file, sha256, f"{name} in {parcel.source}"))
        _check_header(folder / name)
        done += lengths[name]
        if on_progress:
            on_progress(Progress(stage="copy", done=done, total=total, unit="bytes"))
    return card


@dataclass(frozen=True)
class _Checked:
    """Copies a file and compares the hash of what it copied, before the copy gets its name."""

    file: BinaryIO
    sha256: str
    about: str

    def __call__(self, target: BinaryIO) -> None:
        digest = hashlib.sha256()
        while block := self.file.read(_BLOCK):
            digest.update(block)
            target.write(block)
        if digest.hexdigest() != self.sha256:
            raise IntegrityError(
                f"{self.about} is damaged: its SHA-256 is {digest.hexdigest()}, "
                f"its card says {self.sha256}"
            )


def _check_header(path: Path) -> None:
    """Refuse what is no safetensors or no JSON, whatever its name and its hash say."""
    if path.suffix == ".json":
        try:
            json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise IntegrityError(f"{path.name} is not JSON: {printable(str(error))}") from error
        return
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path.name} is not a usable safetensors file: {error}") from error
