"""``e4t info`` and ``e4t doctor``: the record in a file, and the state of the installation."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated, Any

import typer

from e4t_cli import __version__
from e4t_cli.cli import console as terminal
from e4t_cli.cli.options import Json
from e4t_cli.errors import E4TError, InputError, UsageError, printable

File = Annotated[Path, typer.Argument(help="A PNG made here, a saved concept, or the name of a base: mini.")]


def info(file: File, json: Json = False) -> None:
    """Show how an image was made, what is in a concept, or what a base such as mini knows."""
    console = terminal.start(json=json)
    from e4t_cli.api.base_details import as_text, base_details

    shown = printable(str(file))
    if (base := base_details(str(file))) is not None:
        console.details(shown, base if json else as_text(base))
        return
    try:
        with file.open("rb") as opened:
            begin = opened.read(8)
    except FileNotFoundError:
        raise UsageError(f"there is no file {shown}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{shown} cannot be read: {error}") from None
    about = _image(file) if begin == b"\x89PNG\r\n\x1a\n" else _concept(file)
    console.details(shown, about)


def _image(file: Path) -> dict[str, Any]:
    from e4t_cli.images.png_metadata import read_metadata

    found = read_metadata(file.read_bytes())
    if found.details is None and found.parameters is None and not found.ai_generated:
        raise InputError("this image has no record of how it was made")
    marked = {"type": "image", "marked as generated": found.ai_generated}
    if found.details is None:
        return {**marked, "parameters": found.parameters}
    return {**marked, **found.details}


def _concept(file: Path) -> dict[str, Any]:
    from e4t_cli.formats.concept import Concept

    try:
        concept = Concept.load(file)
    except E4TError as error:
        raise type(error)(error.message, hint="e4t info reads PNG images and concepts (me.e4t)") from error
    width, height = concept.prepared.image.size
    return {
        "type": "concept",
        "domain": concept.domain,
        "package": concept.package,
        "descriptor": concept.descriptor,
        "placeholder": concept.placeholder,
        "base": concept.base_name,
        "base_fingerprint": concept.base_fingerprint,
        "pack": concept.weights_digest,
        "photo_sha256": concept.image_sha256,
        "picture": f"{width}×{height}{', masked' if concept.prepared.mask else ''}",
        "photo": concept.photo,
        "tuning": {**concept.config.as_dict(), "seed": concept.seed},
        "weights": "kept" if concept.weights else "made again by tuning",
    }


PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "safetensors",
            "huggingface_hub", "pillow", "typer")  # fmt: skip


def doctor(json: Json = False) -> None:
    """Print the state of the installation: versions, device, disk, caches, bases and domains.

    Nothing is fetched, and no secret is shown.
    """
    console = terminal.start(json=json)
    from e4t_cli.devices import likely_accelerator
    from e4t_cli.files import free_bytes, shown_size
    from e4t_cli.hub.bases import EMBEDDED, PUBLISHED
    from e4t_cli.hub.image_tower import has_tower
    from e4t_cli.hub.paths import endpoint, hub_cache, is_offline, user_cache
    from e4t_cli.hub.repo_info import has_token
    from e4t_cli.hub.resolve import is_cached

    about: dict[str, Any] = {
        "e4t": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **{package: _version(package) for package in PACKAGES},
        "accelerator": likely_accelerator(),
        **_device(),
        "hub": endpoint(),
        "offline": is_offline(),
        "token of the hub": has_token(),
        "cache of the hub": str(hub_cache()),
        "free there": free_bytes(hub_cache()),
        "own cache": str(user_cache()),
        "free in own": free_bytes(user_cache()),
        "bases here": [name for name in (*EMBEDDED, *PUBLISHED) if is_cached(name, tower=False)],
        "image tower": has_tower(),
        "domains": _domains(),
    }
    if not json:
        about |= {key: shown_size(about[key]) for key in ("free there", "free in own")}
        about["bases here"] = ", ".join(about["bases here"])
    console.details("doctor", about)


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version  # `--help` does not wait for it

    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _device() -> dict[str, str]:
    """Return what torch reports."""
    try:
        import torch

        from e4t_cli.devices import choose_device
        from e4t_cli.nn.precision import PrecisionPolicy

        device = choose_device("auto")
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        matmul = str(PrecisionPolicy.resolve(device).matmul).removeprefix("torch.")
        return {"device": str(device), "device name": name, "tunes in": matmul}
    except Exception as error:  # any failure is part of the report
        return {"device": f"torch cannot be used: {type(error).__name__}: {error}"}


def _domains() -> dict[str, str]:
    from e4t_cli.registry.discovery import installed_domains

    return {
        listing.name: f"broken ({listing.reason})"
        if listing.domain is None
        else "for " + (" and ".join(listing.domain.weights) or "no base")
        for listing in installed_domains()
    }
