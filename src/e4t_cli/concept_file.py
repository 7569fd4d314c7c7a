"""A concept's file: tensors, and a JSON card in the header of a safetensors file.

The prepared picture and its mask, the picture's image features (so that no image tower is needed
again), on wish the tuned weights; in the header domain, base, recipe, seed and hashes. Reading is
strict: nothing missing, nothing unknown, every number finite.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .domain import PreparedImage
from .errors import IntegrityError, UsageError, printable
from .files import write_atomically
from .names import check_name
from .recipes import TuningRecipe

SCHEMA = 1

_PLAIN = (
    "domain", "descriptor", "base_name", "base_fingerprint", "pack_digest", "seed",
    "image_sha256", "placeholder",
)  # fmt: skip
"""Entries of the card that every concept has; their values are text, but for the seed."""


def write_concept(fields: Mapping[str, Any], path: str | Path, *, overwrite: bool = True) -> None:
    """Write the fields of a concept to one file.

    Raises:
        FileExistsError: it exists and may not be overwritten.
    """
    tensors = {
        "image": torch.from_numpy(numpy.array(fields["prepared"].image)),
        "image_features": _smallest(fields["image_features"].float().cpu()),
    }
    if fields["prepared"].mask is not None:
        tensors["mask"] = torch.from_numpy(numpy.array(fields["prepared"].mask))
    tensors |= {f"weights.{key}": value for key, value in fields["weights"].items()}
    card = {
        "schema": SCHEMA,
        **{name: fields[name] for name in _PLAIN},
        **({"package": fields["package"]} if fields["package"] else {}),
        **({"photo": fields["photo"]} if fields["photo"] else {}),
        "recipe": fields["recipe"].as_dict(),
    }
    data = save({k: v.contiguous() for k, v in tensors.items()}, {"e4t": json.dumps(card)})
    write_atomically(path, data, overwrite=overwrite)


def read_concept(path: str | Path) -> dict[str, Any]:
    """Return the fields of a concept.

    Raises:
        UsageError: there is no such file.
        IntegrityError: it is not a concept, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(
            f"there is no concept {printable(str(path))}",
            hint="make one: e4t personalize … --save",
        )
    try:
        with safe_open(path, framework="pt") as file:
            card = json.loads((file.metadata() or {})["e4t"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if card.pop("schema", None) != SCHEMA:
            raise ValueError("its schema is unknown; a newer e4t may read it")
        recipe = TuningRecipe.from_dict(card.pop("recipe"))
        if set(card) - {"package", "photo"} != set(_PLAIN):
            raise ValueError("its card has other entries than a concept's")
        check_name(card["domain"])
        for key in card:
            if not isinstance(card[key], int if key == "seed" else str):
                raise ValueError(f"its {key} is of the wrong kind")
        for key, value in tensors.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise ValueError(f"{key} has numbers that are not finite")
        mask = tensors.pop("mask", None)
        prepared = PreparedImage(
            image=Image.fromarray(tensors.pop("image").numpy()),
            mask=None if mask is None else Image.fromarray(mask.numpy()),
        )
        features = tensors.pop("image_features").float()
        prefix = "weights."
        if features.dim() != 2 or any(not key.startswith(prefix) for key in tensors):
            raise ValueError("it holds other tensors than a concept")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"{printable(str(path))} is not a usable concept: {printable(str(error))}"
        ) from error
    weights = {key[len(prefix) :]: value for key, value in tensors.items()}
    return {
        "prepared": prepared, "image_features": features, "recipe": recipe, "weights": weights,
        **card,
    }  # fmt: skip


def _smallest(values: Tensor) -> Tensor:
    """Return them in half precision if that loses nothing."""
    half = values.half()
    return half if torch.equal(half.float(), values) else values
