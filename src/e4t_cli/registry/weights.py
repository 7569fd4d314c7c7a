"""Where a domain's weights for a base are on this machine, or how to get them in one sentence.

Whether a domain can be used on a base, and what it would cost to make it so: only looking.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from e4t_cli.errors import E4TError, IntegrityError, WeightsUnavailable, printable
from e4t_cli.hub.bases import (
    PUBLISHED,
    converted_weights_folder,
    e4t_diffusion_repository,
    hub_weights_folder,
    installed_bases,
)
from e4t_cli.registry.config import PretrainingConfig, shown_hours
from e4t_cli.registry.discovery import user_domain, user_domains_folder
from e4t_cli.registry.domain import Domain, is_remote
from e4t_cli.registry.manifest import Manifest, read_manifest


def weights_folder(domain: Domain, base: str) -> Path:
    """Return the folder of the domain's pack for a base.

    A folder of the user's with the domain's name serves a base for which the domain itself has
    no weights here: what `e4t pretrain` made stands beside what was installed.

    Raises:
        WeightsUnavailable: there is none on this machine.
        IntegrityError: the user's folder cannot be read.
    """
    location = domain.weights.get(base)
    for folder in () if location is None else _places(location):
        if (folder / "domain.toml").is_file():
            return folder
    own = user_domains_folder() / domain.name
    if (own / "domain.toml").is_file() and base in user_domain(own).weights:
        return own
    command = f"e4t pretrain --domain {domain.name} --base {base} --data FOLDER"
    if location is None:
        published = PUBLISHED.get(base)
        nobody = ": nobody has published any" if published else ""
        config = domain.pretraining or PretrainingConfig(steps=60_000)
        time = ""
        if published:
            time = f" ({config.steps:,} steps, {shown_hours(config, published.resolution)})"
        raise WeightsUnavailable(
            f"domain {domain.name!r} has no weights for the base {printable(base)!r}{nobody}",
            hint=f"make them: {command}{time}",
        )
    if location.startswith("hub:") or e4t_diffusion_repository(location):
        raise WeightsUnavailable(
            f"the weights of domain {domain.name!r} for {base} are on the hub "
            f"({printable(location.partition(':')[2])}) and not on this machine",
            hint=f"e4t fetch {domain.name} --base {base}",
        )
    raise WeightsUnavailable(
        f"the weights of domain {domain.name!r} for {base} are not in this installation "
        f"({printable(location)})",
        hint=f"reinstall the package they come with, or make them: {command}",
    )


def _places(location: str) -> list[Path]:
    """Return the folders on this machine that a location can mean; nothing is fetched."""
    kind, _, rest = location.partition(":")
    if kind == "hub":
        folder = hub_weights_folder(location)
        return [folder] if folder is not None else []
    if e4t_diffusion_repository(location):
        folder = converted_weights_folder(location)
        return [folder] if folder is not None else []
    if kind != "package":
        return [Path(location)]
    package, *parts = rest.split("/")
    with contextlib.suppress(ImportError):
        spec = find_spec(package)
        if spec is not None:
            return [Path(root, *parts) for root in spec.submodule_search_locations or ()]
    return []


READY, TO_FETCH, NONE, MISSING, BROKEN = (
    "ready", "to fetch", "none published", "not on this machine", "broken"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WeightsState:
    """What there is of a domain's weights for one base.

    Args:
        base: its name.
        state: one of the five words above.
        size: bytes on this machine, or to fetch; 0 if unknown.
        location: where the domain says its weights are, "" if it says nothing.
        folder: where they are on this machine, if they are.
        card: what they say about themselves.
        reason, hint: why they cannot be used, and what to do.
    """

    base: str
    state: str
    size: int = 0
    location: str = ""
    folder: Path | None = None
    card: Manifest | None = None
    reason: str = ""
    hint: str = ""


def weights_states(domain: Domain) -> list[WeightsState]:
    """Return the state for each base that is here, and each that the domain has weights for."""
    bases = [base.name for base in installed_bases()]
    own: Iterable[str] = ()
    with contextlib.suppress(E4TError):  # there is no such folder, or the list says what is wrong
        own = user_domain(user_domains_folder() / domain.name).weights
    return [weights_state(domain, base) for base in dict.fromkeys([*bases, *domain.weights, *own])]


def weights_state(domain: Domain, base: str) -> WeightsState:
    """Look for a domain's weights for a base; of them, only the card is read, nothing is fetched.

    The files themselves are checked when they are loaded, and by `e4t domains check`.
    """
    location = domain.weights.get(base, "")
    try:
        folder = weights_folder(domain, base)
        card = read_manifest(folder / "domain.toml")
        size = sum((folder / name).stat().st_size for name in card.files)
    except WeightsUnavailable as error:
        reason, hint = error.message, error.hint or ""
    except IntegrityError as error:
        return WeightsState(base=base, state=BROKEN, location=location, reason=error.message)
    except OSError as error:
        reason, hint = f"the pack lacks a file that its card lists ({error.filename})", ""
        if not is_remote(location):
            return WeightsState(base=base, state=BROKEN, location=location, reason=reason)
    else:
        return WeightsState(
            base=base, state=READY, size=size, location=location, folder=folder, card=card
        )
    state, size = (MISSING if location else NONE), 0
    if is_remote(location):
        state = TO_FETCH
        size = domain.download_sizes.get(base, 0) or _remembered_size(location)
    return WeightsState(
        base=base, state=state, size=size, location=location, reason=reason, hint=hint
    )


def _remembered_size(location: str) -> int:
    """Return the bytes of a hub repository that was looked at before; nothing is asked."""
    from e4t_cli.hub.download import cached_repo_info

    repository, _, commit = location.partition(":")[2].partition("@")
    info = cached_repo_info(repository, commit or None)
    return sum(file.size for file in info.files) if info is not None else 0
