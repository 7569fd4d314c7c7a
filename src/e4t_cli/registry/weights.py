"""Finds a domain's weights for a base on this machine, or explains how to get them.

Nothing is fetched here, and of the weights only the manifest is read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from e4t_cli.errors import E4TError, IntegrityError, WeightsUnavailable, printable
from e4t_cli.hub.bases import PUBLISHED, converted_weights_folder, hub_weights_folder, installed_bases
from e4t_cli.hub.repo_info import cached_repo_info
from e4t_cli.registry.config import PretrainingConfig, format_hours
from e4t_cli.registry.discovery import user_domain, user_domains_folder
from e4t_cli.registry.domain import Domain, is_remote
from e4t_cli.registry.manifest import MANIFEST_NAME, Manifest, read_manifest

READY = "ready"


@dataclass(frozen=True, kw_only=True)
class WeightsState:
    """The state of a domain's weights for one base."""

    base: str
    state: str  # "ready", "to fetch", "none published", "not on this machine", or "broken"
    size: int = 0  # bytes on this machine, or to fetch; 0 if unknown
    location: str = ""  # where the domain states that its weights are
    folder: Path | None = None  # where they are on this machine
    manifest: Manifest | None = None
    reason: str = ""  # why they cannot be used
    hint: str = ""  # the next command


def weights_folder(domain: Domain, base: str) -> Path:
    """Return the folder of the domain's weights for a base; WeightsUnavailable if there is none on this machine.

    A folder of the user with the domain's name serves a base for which the domain itself has no weights on this
    machine: `e4t pretrain` adds weights to an installed domain that way. IntegrityError if it cannot be read.
    """
    location = domain.weights.get(base)
    for folder in _folders(location) if location else ():
        if (folder / MANIFEST_NAME).is_file():
            return folder
    folder = user_domains_folder() / domain.name
    if (folder / MANIFEST_NAME).is_file() and base in user_domain(folder).weights:
        return folder
    command = f"e4t pretrain --domain {domain.name} --base {base} --data FOLDER"
    if location is None:
        nobody = time = ""
        if published := PUBLISHED.get(base):
            config = domain.pretraining or PretrainingConfig(steps=60_000)
            nobody = ": nobody has published any"
            time = f" ({config.steps:,} steps, {format_hours(config, published.resolution)})"
        message = f"domain {domain.name!r} has no weights for the base {printable(base)!r}{nobody}"
        raise WeightsUnavailable(message, hint=f"make them: {command}{time}")
    about = f"the weights of domain {domain.name!r} for {base} are"
    if is_remote(location):
        message = f"{about} on the hub ({printable(location.partition(':')[2])}) and not on this machine"
        raise WeightsUnavailable(message, hint=f"e4t fetch {domain.name} --base {base}")
    message = f"{about} not in this installation ({printable(location)})"
    raise WeightsUnavailable(message, hint=f"reinstall the package they come with, or make them: {command}")


def _folders(location: str) -> list[Path]:
    """Return the folders on this machine that a location can mean."""
    kind, _, rest = location.partition(":")
    if is_remote(location):
        folder = hub_weights_folder(location) if kind == "hub" else converted_weights_folder(location)
        return [folder] if folder is not None else []
    if kind != "package":
        return [Path(location)]
    package, *parts = rest.split("/")
    with contextlib.suppress(ImportError):
        if spec := find_spec(package):
            return [Path(root, *parts) for root in spec.submodule_search_locations or ()]
    return []


def weights_states(domain: Domain) -> list[WeightsState]:
    """Return the state for each base on this machine and each that the domain has weights for."""
    bases = [base.name for base in installed_bases()]
    users: Iterable[str] = ()
    with contextlib.suppress(E4TError):  # no such folder, or broken: the list shows the reason
        users = user_domain(user_domains_folder() / domain.name).weights
    names = dict.fromkeys([*bases, *domain.weights, *users])
    return [weights_state(domain, base) for base in names]


def weights_state(domain: Domain, base: str) -> WeightsState:
    """Return the state of a domain's weights for a base.

    The files themselves are checked when they are loaded, and by `e4t domains check`.
    """
    location = domain.weights.get(base, "")
    try:
        folder = weights_folder(domain, base)
        manifest = read_manifest(folder / MANIFEST_NAME)
        size = sum((folder / name).stat().st_size for name in manifest.files)
        return WeightsState(base=base, state=READY, size=size, location=location, folder=folder, manifest=manifest)
    except WeightsUnavailable as error:
        state = "not on this machine" if location else "none published"
        reason, hint = error.message, error.hint or ""
    except IntegrityError as error:
        return WeightsState(base=base, state="broken", location=location, reason=error.message)
    except OSError as error:
        state, reason, hint = "broken", f"a file that the manifest lists is missing ({error.filename})", ""
    size = 0
    if is_remote(location):
        repository, _, commit = location.partition(":")[2].partition("@")
        info = cached_repo_info(repository, commit or None)  # no request is made
        size = domain.download_sizes.get(base, 0) or (sum(file.size for file in info.files) if info else 0)
        state = "to fetch"
    return WeightsState(base=base, state=state, size=size, location=location, reason=reason, hint=hint)
