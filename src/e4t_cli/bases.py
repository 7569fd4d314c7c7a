"""The bases: text-to-image models that concepts are built on, each a folder in diffusers' layout.

`mini` comes with the package. Any other base is a folder given by its path:
model_index.json, unet/, vae/, text_encoder/, tokenizer/, scheduler/, image_tower/ and, if it
wants a name of its own, base.toml (schema, name, licence, revision, resolution, guidance).
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from .domain import check_name
from .errors import IntegrityError, UsageError, WeightsUnavailable, printable

EMBEDDED = ("mini",)
"""Bases that travel inside the package, the default first."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """One base on this machine.

    Args:
        name: the key of `Domain.weights`.
        folder: where it is, in diffusers' layout.
        licence, revision: as its base.toml states them; "" and "local" when it has none.
        resolution: side in pixels of the pictures it makes.
        guidance: weight of classifier-free guidance that suits it when none is asked for.
    """

    name: str
    folder: Path
    licence: str = ""
    revision: str = "local"
    resolution: int
    guidance: float = 7.5  # Stable Diffusion's


def installed_bases() -> list[Base]:
    """Return the bases that came with the package."""
    places = {name: _embedded(name) for name in EMBEDDED}
    return [read_base(place) for place in places.values() if (place / "base.toml").is_file()]


def find_base(name_or_path: str | os.PathLike[str] = "auto") -> Base:
    """Return a base by name, or from a folder in diffusers' layout; "auto" is the embedded one.

    Raises:
        UsageError: it looks like a path, and there is no such folder.
        WeightsUnavailable: no base of that name is on this machine.
        IntegrityError: the folder is not a base.
    """
    wanted = os.fspath(name_or_path)
    name = EMBEDDED[0] if wanted == "auto" else wanted
    if name in EMBEDDED:
        folder = _embedded(name)
        if not (folder / "base.toml").is_file():
            raise WeightsUnavailable(
                f"this installation of e4t has no weights of the base {name!r}",
                hint="reinstall e4t, or make them in a clone of its repository: make mini",
            )
        return read_base(folder)
    shown = printable(wanted)
    if "\0" in wanted:
        raise UsageError(f"{shown} cannot be the name of a folder")
    if Path(wanted).is_dir():
        return read_base(Path(wanted))
    if wanted.startswith((".", "/", "~")) or wanted.count("/") > 1 or "\\" in wanted:
        raise UsageError(f"there is no folder {shown}")
    raise WeightsUnavailable(
        f"the base {shown!r} is not on this machine, and this version of e4t does not fetch bases",
        hint=f"--base {EMBEDDED[0]}, or --base FOLDER for a model in diffusers' layout",
    )


def read_base(folder: Path) -> Base:
    """Return what a folder says about itself.

    Raises:
        IntegrityError: it lacks a part, or its base.toml is not one.
    """
    if not (folder / "model_index.json").is_file():
        raise IntegrityError(
            f"{printable(str(folder))} is not a base: it has no model_index.json",
            hint="--base takes a folder in diffusers' layout",
        )
    card_path = folder / "base.toml"
    try:
        if not card_path.is_file():
            plain = re.sub(r"[^a-z0-9_-]+", "-", folder.resolve().name.lower()).strip("-_")
            return Base(name=plain or "base", folder=folder, resolution=_resolution(folder))
        card = tomllib.loads(card_path.read_text(encoding="utf-8"))
        if card.pop("schema", None) != 1:
            raise ValueError("its schema is not 1; a newer e4t may read it")
        base = Base(folder=folder, **card)
        check_name(base.name, "base name")
        if not isinstance(base.resolution, int) or base.resolution < 8:
            raise ValueError(f"resolution is {base.resolution!r}")
        if not isinstance(base.guidance, int | float) or not 0 <= base.guidance <= 100:
            raise ValueError(f"guidance is {base.guidance!r}")
        return base
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise IntegrityError(
            f"{printable(str(card_path))} cannot be used: {printable(str(error))}"
        ) from error


def _embedded(name: str) -> Path:
    return Path(str(files("e4t_cli"))) / "data" / name


def _resolution(folder: Path) -> int:
    """Return the side of the pictures: latents of the U-Net × the VAE's down-sampling."""
    unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    return int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
