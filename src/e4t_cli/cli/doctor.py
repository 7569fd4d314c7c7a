"""``e4t doctor``: everything that one would ask somebody who says that it does not work."""

from __future__ import annotations

import platform
from typing import Any

from e4t_cli import __version__
from e4t_cli.cli import console as consoles
from e4t_cli.cli.options import Json

PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "safetensors",
            "huggingface_hub", "pillow", "typer")  # fmt: skip


def doctor(json: Json = False) -> None:
    """Say what e4t finds here: versions, device, disk, caches, bases and domains.

    Nothing is fetched, and no secret is shown.
    """
    console = consoles.start(json=json)
    from e4t_cli.bases import EMBEDDED, PUBLISHED
    from e4t_cli.hub.automatic import likely_accelerator
    from e4t_cli.hub.inventory import has_token
    from e4t_cli.hub.places import endpoint, free_bytes, hub_cache, is_offline, own_cache
    from e4t_cli.hub.presence import is_here
    from e4t_cli.hub.towers import has_tower

    names = [*EMBEDDED, *PUBLISHED]
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
        "own cache": str(own_cache()),
        "free in own": free_bytes(own_cache()),
        "bases here": [name for name in names if is_here(name, tower=False)],
        "image tower": has_tower(),
        "domains": _domains(),
    }
    if not json:
        from e4t_cli.hub.places import shown_size

        about["free there"] = shown_size(about["free there"])
        about["free in own"] = shown_size(about["free in own"])
        about["bases here"] = ", ".join(about["bases here"])
    console.details("doctor", about)


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version  # `--help` does not wait for it

    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _device() -> dict[str, str]:
    """What torch says, which is the part that breaks."""
    try:
        import torch

        from e4t_cli.devices import choose_device
        from e4t_cli.nn.precision import half_format

        device = choose_device("auto")
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        products = str(half_format(device, scaled=True) or torch.float32).removeprefix("torch.")
        return {"device": str(device), "device name": name, "tunes in": products}
    except Exception as error:  # a doctor listens to every complaint
        return {"device": f"torch cannot be used: {type(error).__name__}: {error}"}


def _domains() -> dict[str, str]:
    from e4t_cli.registry import installed_domains

    said = {}
    for listing in installed_domains():
        if listing.domain is None:
            said[listing.name] = f"broken ({listing.reason})"
        else:
            said[listing.name] = "for " + (" and ".join(listing.domain.weights) or "no base")
    return said
