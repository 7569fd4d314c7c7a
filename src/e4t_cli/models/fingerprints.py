"""Tells whether a base is the one that domain weights or a concept were made for.

What is recorded is the commit of a base of the hub, and otherwise a hash: of the files of a base that comes with e4t,
as every file records that was made before, and of the tensors of any other folder. Tensors stay the same where a
folder is saved again: in shards, in float16, under the names of another version, with another sampler.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from e4t_cli.errors import E4TError, IntegrityError
from e4t_cli.hub.architecture import read_config
from e4t_cli.hub.bases import Base, installed_bases
from e4t_cli.hub.paths import snapshot_folder
from e4t_cli.hub.repo_info import cached_repo_infos
from e4t_cli.models.loading import SCHEDULE, canonical_key, weight_paths
from e4t_cli.system_memory import memory_ran_out

_WHOLE = 1 << 16  # values of a tensor that is read whole; of a larger one, as many rows as follows
_ROWS = 16


def folder_fingerprint(folder: Path) -> str:
    """Return a hash of the files of a base's folder, 32 hexadecimal digits.

    Files of up to 64 MiB are read whole; of larger ones the size, the header and 64 blocks, which
    is fast and tells one training from another (integrity is checked elsewhere).
    """
    digest = hashlib.sha256()
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "image_tower")
    paths = sorted(path for part in parts for path in (folder / part).glob("*"))
    for path in paths:
        if path.suffix not in (".safetensors", ".json", ".txt"):
            continue
        if path.with_name(path.name.replace(".fp16.", ".")) in paths and ".fp16." in path.name:
            continue  # a second copy of the same weights makes no other base
        size, block = path.stat().st_size, 1 << 20
        digest.update(f"{path.parent.name}/{path.name}:{size}\n".encode())
        starts = range(0, size, block)
        if len(starts) > 64:
            starts = range(0, size, size // 64)
        with path.open("rb") as file:
            for start in starts:
                file.seek(start)
                digest.update(file.read(block))
    return digest.hexdigest()[:32]


def part_fingerprints(folder: Path) -> dict[str, str]:
    """Return a hash of each part of a base: of its tensors, its vocabulary, its noise schedule.

    Floating-point tensors count by name, shape and values in float16, of large ones 16 rows: one training differs from
    another in all of them. Tensors of integers are positions, which not every version stores.

    Raises:
        OSError, ValueError, SafetensorError, IntegrityError: a part cannot be read.
    """
    stamps = (path.stat() for path in sorted(folder.glob("*/*")))
    return dict(
        _part_fingerprints(folder, tuple((about.st_ino, about.st_size, about.st_mtime_ns) for about in stamps))
    )


@lru_cache(maxsize=4)  # a command asks several times
def _part_fingerprints(folder: Path, stamps: object) -> dict[str, str]:
    schedule = read_config(folder / "scheduler" / "scheduler_config.json")
    found = {
        "scheduler": _hash_of({key: schedule.get(key, usual) for key, usual in SCHEDULE.items()}),
        "tokenizer": _hash_of(_vocabulary(folder / "tokenizer")),
    }
    for part in ("unet", "vae", "text_encoder", "image_tower"):
        if part != "image_tower" or os.path.isdir(folder / part):
            found[part] = _hash_of(dict(_tensor_hashes(folder / part)))
    return found


def weights_fingerprint(folder: Path) -> str:
    """Return one hash of `part_fingerprints`, 32 hexadecimal digits; errors as there."""
    return _hash_of(part_fingerprints(folder))


def recorded_fingerprint(base: Base) -> str:
    """Return what is recorded of a base in domain weights and concepts."""
    if base.identity:  # a commit of the hub, in float32 and float16 alike; each file was verified against it
        return _identity_hash(base.identity)
    if any(base.folder == installed.folder for installed in installed_bases()):
        return folder_fingerprint(base.folder)
    try:
        return weights_fingerprint(base.folder)
    except (OSError, ValueError, SafetensorError, IntegrityError) as error:  # as of a base put together in Python
        if memory_ran_out(error):
            raise  # else another base would be blamed
        return folder_fingerprint(base.folder)


def is_recorded(base: Base, recorded: str) -> bool:
    """Whether a base is the recorded one, or has the same weights."""
    if recorded == recorded_fingerprint(base) or recorded == folder_fingerprint(base.folder):
        return True
    return differing_parts(base, recorded) == []


def differing_parts(base: Base, recorded: str) -> list[str] | None:
    """Return the parts in which a base differs from the recorded one; None if that one is not on this machine."""
    try:
        own = part_fingerprints(base.folder)
        if recorded == _hash_of(own):
            return []
        for folder in _folders_of(recorded):
            other = part_fingerprints(folder)
            return sorted(part for part in own.keys() | other.keys() if own.get(part) != other.get(part))
    except (OSError, ValueError, SafetensorError, IntegrityError) as error:
        if memory_ran_out(error):
            raise
    return None


def _folders_of(recorded: str) -> Iterator[Path]:
    """Yield the folders of the recorded base: one that comes with e4t, or a snapshot of the hub's."""
    for base in installed_bases():
        if folder_fingerprint(base.folder) == recorded:
            yield base.folder
    for info in cached_repo_infos():
        if _identity_hash(f"{info.repository}@{info.commit}") == recorded:
            with contextlib.suppress(E4TError):
                yield snapshot_folder(info.repository, info.commit)


def _identity_hash(identity: str) -> str:
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


def _hash_of(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def _tensor_hashes(folder: Path) -> Iterator[tuple[str, str]]:
    for path in weight_paths(folder, half=False):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                shape = part.get_shape()
                count = torch.Size(shape).numel()
                whole = count <= _WHOLE or len(shape) < 2
                rows = range(shape[0])[:: -(-shape[0] // _ROWS)] if not whole else range(0)
                values = file.get_tensor(key) if whole else torch.cat([part[row : row + 1] for row in rows])
                if values.is_floating_point():
                    yield canonical_key(key), _hash_of_values(shape, values)


def _hash_of_values(shape: list[int], values: Tensor) -> str:
    digest = hashlib.sha256(str(shape).encode())
    digest.update(values.half().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _vocabulary(folder: Path) -> Any:
    """Return what each token's number is; only some versions write vocab.json."""
    with contextlib.suppress(FileNotFoundError):
        return read_config(folder / "vocab.json")
    model = read_config(folder / "tokenizer.json").get("model")
    return model.get("vocab") if isinstance(model, dict) else None
