"""The state of a domain's weights for each base.

Nothing is fetched here, and of the weights only the manifest is read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from e4t_cli.errors import E4TError, IntegrityError, WeightsUnavailable
from e4t_cli.hub.bases import installed_bases
from e4t_cli.hub.repo_info import cached_repo_info
from e4t_cli.registry.discovery import user_domain, user_domains_folder, weights_folder
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
