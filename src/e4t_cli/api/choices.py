"""Names that were asked for, as what they name: bases, domains, packs. Everything here is light."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from e4t_cli.api.public_weights import provide_converted
from e4t_cli.bases import Base
from e4t_cli.domain import Domain
from e4t_cli.errors import E4TError, UsageError, WeightsUnavailable, printable
from e4t_cli.hub.access import Access
from e4t_cli.hub.addresses import address_of, pack_folder
from e4t_cli.hub.automatic import choose_automatically, likely_accelerator
from e4t_cli.hub.converted import converted_folder, foreign_repository
from e4t_cli.hub.provision import provide_base, provide_pack
from e4t_cli.registry import (
    USER,
    find_domain,
    find_listing,
    installed_packages,
    weights_folder,
)

if TYPE_CHECKING:
    from e4t_cli.base_model import TextToImageModel


def choose_base(
    base: str | os.PathLike[str] | TextToImageModel,
    access: Access | None = None,
    *,
    domain: Domain | None = None,
    device: str = "auto",
    dtype: str = "auto",
    tower: bool = True,
    safety: bool = True,
) -> Base | TextToImageModel:
    """Return the base of that name, hub id or folder, fetched if need be; a model is one already.

    Args:
        access: how the hub may be used; None fetches nothing whose licence was not accepted.
        domain: what it is for; "auto" takes a base that the domain has weights for.
        device, dtype: as the user wrote them; they decide which precision is fetched.
        tower: whether a photo will be looked at.
        safety: whether pictures will be shown to the base's safety checker.
    """
    if not isinstance(base, str | os.PathLike):
        return base
    access = access or Access()
    wanted = name_base(base, access, domain=domain, device=device)
    tower = tower and reads_tower(domain, wanted)
    return provide_base(wanted, access, half=wants_half(device, dtype), tower=tower, safety=safety)


def reads_tower(domain: Domain | None, base: str) -> bool:
    """Whether a domain's encoder looks through the base's image tower, or has brought its own.

    Args:
        base: a name, or an address of the hub; not "auto".
    """
    if domain is None:
        return True
    address = address_of(base)
    name = base if address is None else address.name
    try:
        return not (weights_folder(domain, name) / "tower.safetensors").is_file()
    except E4TError:
        return foreign_repository(domain.weights.get(name, "")) is None


def name_base(
    base: str | os.PathLike[str],
    access: Access,
    *,
    domain: Domain | None = None,
    device: str = "auto",
    confirm: bool = True,
) -> str:
    """Return what "auto" means here, with a remark that says why; other names as they are.

    Args:
        confirm: whether torch may be asked if the accelerator works.
    """
    wanted = os.fspath(base)
    if wanted != "auto":
        return wanted

    def has_weights(name: str) -> bool:
        if domain is None or name in domain.weights:
            return True
        with contextlib.suppress(E4TError):
            return weights_folder(domain, name).is_dir()
        return False

    def works() -> bool:
        from e4t_cli.devices import choose_device  # brings torch, which is needed anyway now

        return not confirm or choose_device(device).type != "cpu"

    name, why = choose_automatically(
        access,
        device=device,
        has_weights=has_weights,
        confirm=works,
        what=domain.name if domain is not None else "the domain",
    )
    access.remark(why)
    return name


def wants_half(device: str, dtype: str) -> bool:
    """Whether float16 files are enough: they are half as large, and accelerators compute so."""
    return likely_accelerator(device) if dtype == "auto" else dtype != "fp32"


def base_name(base: Base | TextToImageModel) -> str:
    """Return the key of `Domain.weights`."""
    return base.name if isinstance(base, Base) else base.base.name


def choose_domain(domain: str | os.PathLike[str] | Domain) -> tuple[Domain, str]:
    """Return the domain of that name or folder, and the package it came with; "" of a value."""
    if isinstance(domain, Domain):
        return domain, ""
    listing = find_listing(os.fspath(domain))
    assert listing.domain is not None
    return listing.domain, listing.package


def find_domain_again(name: str, package: str) -> Domain:
    """Return the domain that a concept was made with.

    Args:
        name: of the domain.
        package: the distribution it came with then, "" if nobody wrote it down.

    Raises:
        UsageError: it is not here any more; the hint says what brings it back.
    """
    if package and package in installed_packages(name):
        return find_domain(f"{package}:{name}")  # whoever else claims the name by now
    try:
        return find_domain(name)
    except UsageError as error:
        hint = error.hint
        if package == USER:
            hint = f"it was one of your own: e4t domains add FOLDER brings {name} back"
        elif package:
            hint = f"it came with the package {printable(package)}: pip install {package}"
        message = f"this concept needs the domain {name!r}: {error.message}"
        raise UsageError(message, hint=hint) from error


def find_pack(
    domain: Domain,
    base: Base | TextToImageModel,
    access: Access | None = None,
    *,
    repair: bool = False,
) -> Path:
    """Return the folder with the domain's weights for a base, fetched if they are on the hub.

    Args:
        access: how the hub may be used; None fetches nothing.
        repair: fetch again what is here and damaged.

    Raises:
        WeightsUnavailable: there are none; the hint is the command that makes them.
    """
    name = base_name(base)
    location = domain.weights.get(name, "")
    if access is not None and location.startswith("hub:"):
        if pack_folder(location) is None:
            with contextlib.suppress(WeightsUnavailable):  # the user may have made some
                return weights_folder(domain, name)
        return provide_pack(location, access, repair=repair)
    if access is not None and foreign_repository(location):
        if converted_folder(location) is None:
            with contextlib.suppress(WeightsUnavailable):
                return weights_folder(domain, name)
        return provide_converted(domain, name, location, access, repair=repair)
    return weights_folder(domain, name)
