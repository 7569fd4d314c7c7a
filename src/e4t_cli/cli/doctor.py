"""``e4t doctor``: the state of the installation."""

from __future__ import annotations

import platform
from typing import Any

from e4t_cli import __version__
from e4t_cli.cli import console as terminal
from e4t_cli.cli.options import Json

PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "safetensors",
            "huggingface_hub", "pillow", "typer")  # fmt: skip


def doctor(json: Json = False) -> None:
    """Print versions, device, disk, caches, bases and domains.

    Nothing is downloaded, and no secret is shown.
    """
    console = terminal.start(json=json)
    from e4t_cli.devices import likely_accelerator
    from e4t_cli.files import free_bytes, shown_size
    from e4t_cli.hub.bases import EMBEDDED, PUBLISHED
    from e4t_cli.hub.image_tower import has_tower
    from e4t_cli.hub.paths import endpoint, folder_problems, hub_cache, is_offline, user_cache
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
        "has_token": has_token(),
        "hub_cache": str(hub_cache()),
        "hub_cache_free": free_bytes(hub_cache()),
        "user_cache": str(user_cache()),
        "user_cache_free": free_bytes(user_cache()),
        "bases": [name for name in (*EMBEDDED, *PUBLISHED) if is_cached(name, tower=False)],
        "image_tower": has_tower(),
        "domains": _domains(),
        "problems": folder_problems(),
    }
    if not json:
        about |= {key: shown_size(about[key]) for key in ("hub_cache_free", "user_cache_free")}
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
        from e4t_cli.system_memory import check_addresses

        check_addresses()
        import torch

        from e4t_cli.devices import choose_device
        from e4t_cli.nn.precision import PrecisionPolicy

        device = choose_device("auto")
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        matmul = str(PrecisionPolicy.resolve(device).matmul).removeprefix("torch.")
        return {"device": str(device), "device_name": name, "tuning_dtype": matmul}
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
