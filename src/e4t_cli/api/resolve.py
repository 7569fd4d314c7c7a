"""Resolves what was asked for (prompts, seeds, bases, domains, weights, concepts) into values.

Nothing here imports torch before a model is loaded.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from e4t_cli.api.options import RunOptions
from e4t_cli.api.session import Session
from e4t_cli.devices import choose_device, likely_accelerator
from e4t_cli.errors import E4TError, InputError, IntegrityError, UsageError, WeightsUnavailable, printable
from e4t_cli.hub.addons import Addon, check_same
from e4t_cli.hub.bases import (
    ACCELERATED,
    EMBEDDED,
    PUBLISHED,
    Base,
    converted_weights_folder,
    e4t_diffusion_repository,
    find_base,
    hub_location,
    hub_weights_folder,
)
from e4t_cli.hub.paths import HubAccess, Terms, is_accepted
from e4t_cli.hub.repo_info import get_repo_info
from e4t_cli.hub.resolve import fetch_base, fetch_domain_weights, is_cached, is_reachable
from e4t_cli.hub.single_file import is_file_name, recognize_file
from e4t_cli.progress import Progress
from e4t_cli.registry.discovery import USER, find_domain, find_listing, installed_packages, weights_folder
from e4t_cli.registry.domain import Domain

if TYPE_CHECKING:
    from e4t_cli.formats.concept import Concept
    from e4t_cli.images.png_metadata import GenerationRecord
    from e4t_cli.models.text_to_image import TextToImageModel


def resolve_base(
    options: RunOptions,
    access: HubAccess,
    *,
    domain: Domain | None = None,
    tower: bool = True,
    safety: bool = True,
    domain_base: str = "",
) -> Base | TextToImageModel:
    """Return the base that was asked for, fetched if need be; a loaded model is returned as it is.

    Args:
        domain: "auto" takes a base that this domain has weights for; `WeightsUnavailable` for another published one.
        tower: whether a photo will be encoded.
        safety: whether the base's safety checker will be used.
        domain_base: the base whose domain weights are used; "" is this base.

    Raises:
        WeightsUnavailable: the domain has no weights for it; nothing was downloaded.
        E4TError: another of its children.
    """
    if not isinstance(options.base, str | os.PathLike):
        return options.base
    wanted = resolve_base_name(options.base, access, domain=domain, device=options.device)
    if domain is not None:
        check_weights(domain, domain_base or wanted)
    if wanted in EMBEDDED:
        return find_base(wanted)
    if domain is not None and (name := domain_base or name_before_fetching(wanted, access)):
        find_weights(domain, name)  # before gigabytes are fetched for nothing
    tower = tower and needs_image_tower(domain, domain_base or wanted)
    half = prefers_half(options.device, options.dtype)
    return fetch_named_base(wanted, access, half=half, tower=tower, safety=safety)


def name_before_fetching(wanted: str, access: HubAccess) -> str:
    """Return the name of a base of the hub, the key of `Domain.weights`; "" if that is not known before it is here."""
    location = hub_location(wanted)
    if location is None or location.name in PUBLISHED:
        return "" if location is None else location.name
    if is_cached(wanted, tower=False):
        return ""
    info = None
    with contextlib.suppress(WeightsUnavailable):  # whoever fetches it says why
        info = get_repo_info(location.repository, location.revision or None, access)
    named = info is None or any(file.path == "base.toml" for file in info.files)  # it says its name itself
    return "" if named else location.name


def fetch_named_base(
    wanted: str, access: HubAccess, *, half: bool, tower: bool, safety: bool = True, repair: bool = False
) -> Base:
    """Return a base as `fetch_base` does, or the one in a single file, which is converted the first time.

    Raises:
        E4TError: as `fetch_base` and `recognize_file`.
    """
    if not is_file_name(wanted):
        return fetch_base(wanted, access, half=half, tower=tower, safety=safety, repair=repair)
    file = recognize_file(wanted)
    shown = printable(file.path.name)
    if file.has_ema:
        access.note(f"{shown} has averaged weights (EMA) beside the plain ones, which are used, as elsewhere")
    if safety:
        access.note(f"{shown} has no safety checker: no image is checked")
    from e4t_cli.models.single_file import convert_file

    converted = convert_file(file, access.on_progress)
    return fetch_base(converted.folder, access, half=half, tower=tower, safety=safety)


def needs_image_tower(domain: Domain | None, base: str) -> bool:
    """Whether a domain's encoder reads the image tower of a base (a name or address), or brings its own."""
    if domain is None:
        return True
    address = hub_location(base)
    name = base if address is None else address.name
    try:
        return not os.path.isfile(weights_folder(domain, name) / "tower.safetensors")
    except E4TError:
        return e4t_diffusion_repository(domain.weights.get(name, "")) is None


def resolve_base_name(
    base: str | os.PathLike[str], access: HubAccess, *, domain: Domain | None = None, device: str = "auto",
    confirm: bool = True,
) -> str:  # fmt: skip
    """Return the base's name; for "auto" the default on this machine, with a remark about why.

    Args:
        confirm: whether torch may be imported to check that the accelerator works.
    """
    wanted = os.fspath(base)
    if wanted != "auto":
        return wanted
    name, why = default_base_name(access, domain=domain, device=device, confirm=confirm)
    if access.on_progress is not None:
        access.on_progress(Progress(stage="fetch", remark=why))
    return name


def default_base_name(
    access: HubAccess, *, domain: Domain | None = None, device: str = "auto", confirm: bool = True
) -> tuple[str, str]:
    """Return the base that "auto" means here, and a sentence with the reason; see `resolve_base_name`.

    The checks are ordered by cost. Without an accelerator no library is imported and no socket opened.
    """
    mini, large = EMBEDDED[0], ACCELERATED
    drawings = f"base: {mini} knows drawings only"
    if not likely_accelerator(device):
        photographs = domain is None or has_weights(domain, large)
        other = f"; --base {large} makes photographs (slow on CPU)" if photographs else ""
        return mini, f"{drawings}; no accelerator{other}"
    if domain is not None and not has_weights(domain, large):
        return mini, f"{drawings}; {domain.name} has no weights for {large} yet (e4t pretrain makes them)"
    row = PUBLISHED[large]
    if not is_cached(large):
        if access.cut_off:
            return mini, f"{drawings}; offline, and {large} is not on this machine"
        terms = Terms(repository=row.repository, licence=row.licence)
        if terms.asks and not access.accept_license and not is_accepted(terms):
            return mini, f"{drawings}; for photographs: e4t fetch {large}, which asks about its licence"
        if not is_reachable():
            return mini, f"{drawings}; {large} is not on this machine and the hub does not answer"
    if confirm and choose_device(device).type == "cpu":  # imports torch, which is needed by now
        return mini, f"{drawings}; the accelerator of this machine does not work with this torch"
    return large, f"base {large}: this machine has an accelerator; --base {mini} needs none"


def resolve_domain_base(wanted: str | None) -> str:
    """Return the name of the base whose domain weights were asked for, "" if none was named."""
    if wanted is None:
        return ""
    return location.name if (location := hub_location(wanted)) is not None else wanted


def has_weights(domain: Domain, base: str) -> bool:
    """Whether a domain has weights for a base, here or on the hub."""
    with contextlib.suppress(E4TError):
        return base in domain.weights or os.path.isdir(weights_folder(domain, base))
    return False


def check_weights(domain: Domain, base: str) -> None:
    """Raise `WeightsUnavailable` if a domain has no weights for a base of a known name (or its address)."""
    address = hub_location(base)
    name = base if address is None else address.name
    if name in (*EMBEDDED, *PUBLISHED) and name not in domain.weights:
        weights_folder(domain, name)


def prefers_half(device: str, dtype: str) -> bool:
    """Whether float16 files suffice: half as large, and what accelerators compute in."""
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
    """Return the domain that a concept was made with, from the package it came with then ("" if not recorded).

    Raises:
        UsageError: it is not installed any more; the hint is what brings it back.
    """
    if package and package in installed_packages(name):
        return find_domain(f"{package}:{name}")  # another package may have the name too by now
    try:
        return find_domain(name)
    except UsageError as error:
        hint = f"it came with the package {printable(package)}: pip install {package}" if package else error.hint
        if package == USER:
            hint = f"it was a user domain: e4t domains add FOLDER brings {name} back"
        raise UsageError(f"this concept needs the domain {name!r}: {error.message}", hint=hint) from error


def find_weights(domain: Domain, base: str) -> Path | None:
    """Return the folder of a domain's weights for a base, None if they can be fetched; `WeightsUnavailable` if not."""
    try:
        return weights_folder(domain, base)
    except WeightsUnavailable:
        location = domain.weights.get(base, "")
        if not location.startswith("hub:") and e4t_diffusion_repository(location) is None:
            raise
        return None


def resolve_domain_weights(
    domain: Domain,
    base: Base | TextToImageModel | str,
    access: HubAccess,
    *,
    repair: bool = False,
    domain_base: str = "",
) -> Path:
    """Return the folder with the domain's weights for a base, fetched if they are on the hub (`repair`: or damaged).

    Args:
        domain_base: another base, whose weights are taken.

    Raises:
        WeightsUnavailable: there are none; the hint is the command that makes them.
    """
    name = domain_base or (base if isinstance(base, str) else base_name(base))
    location = domain.weights.get(name, "")
    published = location.startswith("hub:")
    if not published and not location.startswith("e4t-diffusion:"):
        return weights_folder(domain, name)
    if (hub_weights_folder(location) if published else converted_weights_folder(location)) is None:
        with contextlib.suppress(WeightsUnavailable):  # the user may have made some
            return weights_folder(domain, name)
    if published:
        return fetch_domain_weights(location, access, repair=repair)
    from e4t_cli.api.importing import fetch_converted

    return fetch_converted(domain, name, location, access, repair=repair)


def load_concept(concept: Concept | str | os.PathLike[str]) -> Concept:
    """Return a concept, read from its file if it is not one already."""
    from e4t_cli.formats.concept import Concept

    return concept if isinstance(concept, Concept) else Concept.load(Path(concept))


def check_concept_base(concept: Concept, wanted: str | os.PathLike[str] | TextToImageModel) -> None:
    """Raise `IntegrityError` if another base is asked for than a concept was made with, as far as names tell."""
    known = (*EMBEDDED, *PUBLISHED)
    name = os.fspath(wanted) if isinstance(wanted, str | os.PathLike) else wanted.base.name
    name = (location := hub_location(name)) and location.name or name
    if name != concept.base_name and name in known and concept.base_name in known:
        message = f"this concept lives on the base {concept.base_name}, not on {name}"
        raise IntegrityError(message, hint=f"leave --base out, or personalize the picture again on {name}")


def refuse_addons(options: RunOptions) -> None:
    """Raise UsageError if something was added to the base: weights of a domain belong to the base as it is."""
    if options.addons or (not isinstance(options.base, str | os.PathLike) and options.base.addons):
        hint = "leave the add-ons out; personalize and generate take them"
        raise UsageError(
            "the weights of a domain are made for a base without LoRAs, embeddings or another VAE", hint=hint
        )


def check_addons(concept: Concept, options: RunOptions, records: Sequence[GenerationRecord] = ()) -> None:
    """Check what is to be added to the base, before it is loaded, against a concept and a picture to draw again.

    Raises:
        IntegrityError: the concept was made with other LoRAs or another VAE.
        UsageError: the picture was drawn with an embedding that is not given.
        E4TError: a file is no add-on.
    """
    loaded = options.base if not isinstance(options.base, str | os.PathLike) else None
    given = options.addons.check() if loaded is None else loaded.addons
    check_same(concept.addons, given, "this concept")
    for record in records:
        try:
            used = [Addon.from_dict(one) for one in record.addons]
        except ValueError as error:
            raise InputError(f"the record in this picture is damaged: {error}") from error
        words = [one for one in used if one.kind == "embedding"]
        if missing := [one for one in words if one.identity not in {other.identity for other in given}]:
            message = f"the picture was drawn with {' and '.join(map(str, missing))}, which is not given"
            raise UsageError(message, hint=f"add {' '.join(one.option for one in missing)}")


def load_concept_models(concept: Concept, session: Session) -> None:
    """Load the base and the domain weights that a concept was made with.

    Raises:
        IntegrityError: this machine's base or weights are not the ones it was made with.
        E4TError: another of its children.
    """
    session.find_addons(concept.addons)
    options = session.options
    check_addons(concept, options)
    check_concept_base(concept, options.base)
    domain = find_concept_domain(concept.domain, concept.package)
    if options.base == "auto":
        options = replace(options, base=concept.base_name)
    base, other = resolve_base(options, session.access, tower=False, safety=session.safety), concept.domain_base
    session.load(base, resolve_domain_weights(domain, base, session.access, domain_base=other), domain_base=other)
    concept.check(session.model, session.pretrained)
