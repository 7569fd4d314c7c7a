"""Training states as safetensors: written atomically, and exported in small files that another machine resumes from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from e4t_cli.files import write_atomically

LIMIT = 16 * 2**20  # bytes of one exported file
_HEADER = 2**17  # bytes kept free for a file's header
# Tensors are named "OBJECTIVE/weights.NAME", "…/average.NAME", "…/optimizer.NUMBER.PARAMETER.NAME" and "…/sums.NAME".


def write_state(path: Path, tensors: dict[str, Tensor], facts: dict) -> None:
    """Write tensors and JSON facts; a crash at any moment leaves the old file or the new one."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(tensors, {"facts": json.dumps(facts)}))


def read_state(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Read what `write_state` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        safetensors.SafetensorError: the file is torn or something else.
    """
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["facts"])  # noqa: SIM118


def _weights_of(name: str, tensors: dict[str, Tensor]) -> Tensor | None:
    """The weights that a tensor is the moving average of, or None."""
    objective, _, rest = name.partition("/")
    return tensors.get(f"{objective}/weights.{rest.removeprefix('average.')}") if rest.startswith("average.") else None


def _shorten(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Halve what a resumed training can do with in bfloat16: moments, and the average's distance from the weights."""
    short = {}
    for name, tensor in tensors.items():
        weights = _weights_of(name, tensors)
        if weights is not None:
            short[name] = (tensor - weights).bfloat16()
        else:
            short[name] = tensor.bfloat16() if "/optimizer." in name and tensor.dim() > 0 else tensor
    return short


def _lengthen(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_shorten`, in float32."""
    long = {}
    for name, tensor in tensors.items():
        weights = _weights_of(name, tensors)
        if weights is not None:
            long[name] = weights + tensor.float()
        else:
            long[name] = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    return long


def state_files(path: Path, folder: Path, limit: int = LIMIT) -> list[Path]:
    """Export a state into `folder` as files of at most `limit` bytes: NAME-1-of-3.safetensors and so on.

    Weights stay exact; moments of the optimizer and the average's distance from the weights are rounded to bfloat16, so that a
    training goes on from them as well as before, but not to the same bits.

    Raises:
        ValueError: one tensor alone is larger than the limit.
    """
    tensors, facts = read_state(path)
    parts: list[dict[str, Tensor]] = [{}]
    room = limit - _HEADER
    for name, tensor in _shorten(tensors).items():
        if tensor.nbytes > limit - _HEADER:
            raise ValueError(f"{name} has {tensor.nbytes} bytes, more than one file of {limit} bytes can hold.")
        if tensor.nbytes > room:
            parts.append({})
            room = limit - _HEADER
        parts[-1][name] = tensor
        room -= tensor.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{path.stem}-*-of-*.safetensors"):
        old.unlink()
    files = [folder / f"{path.stem}-{number}-of-{len(parts)}.safetensors" for number in range(1, len(parts) + 1)]
    for file, part in zip(files, parts, strict=True):
        write_state(file, part, facts | {"files": len(parts)})
    return files


def join_state_files(files: Iterable[Path], path: Path) -> None:
    """Make the training state `path` from all files of one export.

    Raises:
        ValueError: a file is missing, or the files are of different exports.
    """
    tensors: dict[str, Tensor] = {}
    seen = []
    for file in files:
        part, facts = read_state(file)
        tensors |= part
        seen.append(facts)
    if not seen or any(facts != seen[0] for facts in seen) or len(seen) != seen[0]["files"]:
        raise ValueError(f"{len(seen)} files are not the whole export of one training state. Copy all files of one export.")
    facts = dict(seen[0])
    del facts["files"]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_state(path, _lengthen(tensors), facts)
