"""What was asked for, as values: prompts, seeds, recipes. Everything here is light.

Names that were asked for, as what they name: bases, domains, packs. Everything here is light.

A saved concept and what it needs, at hand again: for whoever draws or exports it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from e4t_cli.api.session import Session
from e4t_cli.errors import E4TError, UsageError, WeightsUnavailable, printable
from e4t_cli.hub.bases import (
    Base,
    converted_weights_folder,
    e4t_diffusion_repository,
    hub_location,
    hub_weights_folder,
)
from e4t_cli.hub.paths import HubAccess
from e4t_cli.hub.resolve import (
    default_base_name,
    fetch_base,
    fetch_domain_weights,
    likely_accelerator,
)
from e4t_cli.prompts import Prompt, parse_prompt
from e4t_cli.registry.config import TUNING_METHODS, PretrainingConfig, TuningConfig
from e4t_cli.registry.discovery import USER, find_domain, find_listing, installed_packages
from e4t_cli.registry.domain import Domain
from e4t_cli.registry.weights import weights_folder

if TYPE_CHECKING:
    from e4t_cli.formats.concept import Concept
    from e4t_cli.models.text_to_image import TextToImageModel

_R = TypeVar("_R", TuningConfig, PretrainingConfig)

MAX_SEED = 2**32 - 1
"""The largest seed that other programs' metadata readers take."""


def parse_prompts(prompts: str | Sequence[str], placeholder: str) -> list[Prompt]:
    """Parse one prompt or several; the first that does not name the concept is refused."""
    wanted = [prompts] if isinstance(prompts, str) else prompts
    return [parse_prompt(prompt, placeholder) for prompt in wanted]


def resolve_seed(seed: int | None, count: int) -> int:
    """Return the seed of the first picture; a random one if none was asked for.

    Raises:
        UsageError: one of `count` seeds is out of range.
    """
    if not isinstance(count, int) or count < 1:
        raise UsageError(f"the number of pictures per prompt must be 1 or more, not {count!r}")
    if seed is None:
        return secrets.randbelow(2**31)  # short enough to type, far from the end
    if not 0 <= seed <= MAX_SEED + 1 - count:
        raise UsageError(f"seeds must be 0 to {MAX_SEED}, not {seed} to {seed + count - 1}")
    return seed


def with_steps(config: _R, steps: int) -> _R:
    """Return the recipe with another number of steps."""
    try:
        return config.replace(steps=steps)
    except ValueError as error:
        raise UsageError(str(error)) from error


def with_tuning_method(config: TuningConfig, method: str) -> TuningConfig:
    """Return the recipe with another way of tuning."""
    try:
        return config.replace(method=method)
    except ValueError as error:
        raise UsageError(
            f"there is no way of tuning {printable(method)!r}",
            hint=f"--tuning {' or '.join(TUNING_METHODS)}",
        ) from error


def resolve_base(
    base: str | os.PathLike[str] | TextToImageModel,
    access: HubAccess | None = None,
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
    access = access or HubAccess()
    wanted = resolve_base_name(base, access, domain=domain, device=device)
    tower = tower and needs_image_tower(domain, wanted)
    return fetch_base(wanted, access, half=prefers_half(device, dtype), tower=tower, safety=safety)


def needs_image_tower(domain: Domain | None, base: str) -> bool:
    """Whether a domain's encoder looks through the base's image tower, or has brought its own.

    Args:
        base: a name, or an address of the hub; not "auto".
    """
    if domain is None:
        return True
    address = hub_location(base)
    name = base if address is None else address.name
    try:
        return not (weights_folder(domain, name) / "tower.safetensors").is_file()
    except E4TError:
        return e4t_diffusion_repository(domain.weights.get(name, "")) is None


def resolve_base_name(
    base: str | os.PathLike[str],
    access: HubAccess,
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

    name, why = default_base_name(
        access,
        device=device,
        has_weights=has_weights,
        confirm=works,
        what=domain.name if domain is not None else "the domain",
    )
    access.remark(why)
    return name


def prefers_half(device: str, dtype: str) -> bool:
    """Whether float16 files are enough: they are half as large, and accelerators compute so."""
    return likely_accelerator(device) if dtype == "auto" else dtype != "fp32"


def base_name(base: Base | TextToImageModel) -> str:
    """Return the key of `Domain.weights`."""
    return base.name if isinstance(base, Base) else base.base.name


def resolve_domain(domain: str | os.PathLike[str] | Domain) -> tuple[Domain, str]:
    """Return the domain of that name or folder, and the package it came with; "" of a value."""
    if isinstance(domain, Domain):
        return domain, ""
    listing = find_listing(os.fspath(domain))
    assert listing.domain is not None
    return listing.domain, listing.package


def find_concept_domain(name: str, package: str) -> Domain:
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


def resolve_domain_weights(
    domain: Domain,
    base: Base | TextToImageModel,
    access: HubAccess | None = None,
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
        if hub_weights_folder(location) is None:
            with contextlib.suppress(WeightsUnavailable):  # the user may have made some
                return weights_folder(domain, name)
        return fetch_domain_weights(location, access, repair=repair)
    if access is not None and e4t_diffusion_repository(location):
        if converted_weights_folder(location) is None:
            with contextlib.suppress(WeightsUnavailable):
                return weights_folder(domain, name)
        from e4t_cli.api.importing import fetch_converted

        return fetch_converted(domain, name, location, access, repair=repair)
    return weights_folder(domain, name)


def load_concept(concept: Concept | str | os.PathLike[str]) -> Concept:
    """Return a concept, read from its file if it is not one already."""
    from e4t_cli.formats.concept import Concept

    return concept if isinstance(concept, Concept) else Concept.load(concept)


def load_concept_models(
    concept: Concept,
    session: Session,
    access: HubAccess,
    *,
    base: str | os.PathLike[str] | TextToImageModel,
    device: str,
    dtype: str,
    safety: bool,
) -> None:
    """Load the base and the pack that a concept was made with.

    Args:
        base: "auto" is the one that it names.
        safety: whether the base's safety checker is wanted too.

    Raises:
        IntegrityError: this machine's base or pack is not the one it was made with.
        E4TError: another of its children.
    """
    value = find_concept_domain(concept.domain, concept.package)
    wanted = concept.base_name if base == "auto" else base
    place = resolve_base(wanted, access, device=device, dtype=dtype, tower=False, safety=safety)
    session.load(place, resolve_domain_weights(value, place, access))
    concept.check(session.model, session.pretrained)
