"""Files of encoded pictures: whole or absent, checked when found, mapped when read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from e4t_cli.errors import IntegrityError, ResourceError
from e4t_cli.files import write_atomically
from e4t_cli.sources.lookalikes import SIGNATURE

from .encoding import EncodedRows

FORMAT = "1"
_ROWS = ("means", "logvars", "image_features", "masks")


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """What is known of a chunk without holding its rows.

    Args:
        path: of its file.
        good: which of its pictures can be used (pictures,), bool.
        bad: position → reason, of the others.
        digests: of each picture's bytes (pictures, 32).
        signatures: of each picture's looks (pictures, SIGNATURE).
    """

    path: Path
    good: Tensor
    bad: dict[int, str]
    digests: Tensor
    signatures: Tensor


def write_chunk(
    path: Path,
    rows: EncodedRows,
    *,
    bad: dict[int, str],
    digests: list[bytes],
    looks: list[bytes],
) -> None:
    """Write a chunk with its checksum, unless another process was first.

    Args:
        rows: of all its pictures; what stands for a bad one is never read.
        bad: position → reason, of those that cannot be used.

    Raises:
        ResourceError: the disk is full, or not ours to write to.
    """
    found = {name: getattr(rows, name) for name in _ROWS}
    tensors = {name: value.contiguous() for name, value in found.items() if value is not None}
    tensors["good"] = torch.tensor([place not in bad for place in range(len(digests))]).byte()
    tensors["digests"] = _bytes(digests, 32)
    tensors["signatures"] = _bytes(looks, SIGNATURE)
    plain = save(tensors)
    data = memoryview(plain)[8 + int.from_bytes(plain[:8], "little") :]
    about = {"format": FORMAT, "bad": json.dumps(bad), "sha256": hashlib.sha256(data).hexdigest()}
    write_file(path, save(tensors, about), overwrite=False)


def read_chunk(path: Path, count: int) -> Chunk:
    """Return a chunk of `count` pictures, every byte of it checked.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or another one.
    """
    try:
        with open(path, "rb") as file:
            metadata = _checked(file)
        with safe_open(path, framework="pt") as tensors:
            good = tensors.get_tensor("good").bool()
            digests, looks = tensors.get_tensor("digests"), tensors.get_tensor("signatures")
        bad = {int(place): str(why) for place, why in json.loads(metadata["bad"]).items()}
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error
    if len(good) != count or metadata.get("format") != FORMAT:
        raise ValueError("it is another chunk")
    return Chunk(path=path, good=good, bad=bad, digests=digests, signatures=looks)


def mapped_rows(path: Path) -> dict[str, Any]:
    """Return the rows of a chunk by name, read from the disk where they are indexed.

    Raises:
        IntegrityError: it has gone since the run began.
    """
    try:
        file = safe_open(path, framework="pt").__enter__()
        return {name: file.get_slice(name) for name in file.keys() if name in _ROWS}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise IntegrityError(
            f"the cache of encoded pictures in {path.parent} changed during the run",
            hint="the same command makes it again and goes on from the last checkpoint",
        ) from error


def joined(parts: Iterable[dict[str, Tensor]]) -> EncodedRows:
    """Return rows of one picture each as one value."""
    columns: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, row in part.items():
            columns.setdefault(name, []).append(row)
    return EncodedRows(**{name: torch.cat(rows) for name, rows in columns.items()})


def write_file(path: Path, data: bytes, *, overwrite: bool = True) -> None:
    """Write a file of the cache.

    Raises:
        ResourceError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data, overwrite=overwrite)
    except FileExistsError:  # another process was first, with the same content
        pass
    except OSError as error:
        raise ResourceError(
            f"the cache in {path.parent} cannot be written: {error.strerror}",
            hint="E4T_CACHE_DIR moves it, --cache off trains without it",
        ) from error


def _checked(file: BinaryIO) -> dict[str, str]:
    """Return a safetensors file's metadata.

    Raises:
        ValueError: the data is not what its checksum says.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > 2**24:
        raise ValueError("its header is too long")
    metadata = json.loads(file.read(length))["__metadata__"]
    if hashlib.file_digest(file, "sha256").hexdigest() != metadata["sha256"]:
        raise ValueError("its checksum is another")
    return dict(metadata)


def _bytes(rows: list[bytes], width: int) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(-1, width)
