"""The files of a pack, read with suspicion: hashes, headers, shapes, and finite numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import IntegrityError, WeightsUnavailable, printable
from .files import sha256_of
from .nn.weight_offsets import RANK, Factors


def read_tensors(
    path: Path, expected: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Tensor]:
    """Read a safetensors file in float32, after a look at its header.

    Args:
        path: the file.
        expected: key -> shape, compared before anything is allocated; None takes what is there.

    Raises:
        IntegrityError: another format, other keys or shapes, or numbers that are not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            if expected is not None:
                for key in sorted(set(shapes) ^ set(expected)):
                    state = "lacks" if key in expected else "has an unexpected"
                    raise IntegrityError(f"{path.name} {state} tensor {printable(key)}")
                for key, shape in expected.items():
                    if shapes[key] != shape:
                        raise IntegrityError(
                            f"{path.name}: {printable(key)} has shape {shapes[key]}, not {shape}"
                        )
            tensors = {key: file.get_tensor(key) for key in shapes}
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path.name} is not a usable safetensors file: {error}") from error
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise IntegrityError(f"{path.name}: {printable(key)} has numbers that are not finite")
    return {
        key: value.float() if value.is_floating_point() else value for key, value in tensors.items()
    }


def check_file(folder: Path, name: str, expected: str) -> None:
    """Compare a file of a pack with its card.

    Raises:
        WeightsUnavailable: it is not there.
        IntegrityError: its SHA-256 is another.
    """
    path = folder / name
    if not path.is_file():
        raise WeightsUnavailable(f"the pack in {printable(str(folder))} lacks {name}")
    found = sha256_of(path)
    if found != expected:
        raise IntegrityError(
            f"{name} in {printable(str(folder))} is damaged: "
            f"its SHA-256 is {found}, its card says {expected}"
        )


def pair_factors(tensors: Mapping[str, Tensor], shown: str) -> dict[str, Factors]:
    """Return path -> factors of ΔW from "path.left" and "path.right".

    Args:
        shown: the file, for messages.

    Raises:
        IntegrityError: they are no such pairs.
    """
    offsets: dict[str, Factors] = {}
    for key, left in tensors.items():
        path, _, side = key.rpartition(".")
        if side != "left":
            continue
        right = tensors.get(f"{path}.right")
        if right is None or left.dim() != 2 or right.dim() != 2:
            break
        if left.shape[1] != RANK or right.shape[0] != RANK:
            break
        offsets[path] = left, right
    if len(tensors) != 2 * len(offsets):
        raise IntegrityError(f"{shown} holds no pairs of factors")
    return offsets
