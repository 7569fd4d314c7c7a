"""Whether a domain can be used on a base, and what it would cost to make it so: only looking."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from e4t_cli.bases import installed_bases
from e4t_cli.domain import Domain
from e4t_cli.errors import E4TError, IntegrityError, WeightsUnavailable
from e4t_cli.manifest import Manifest, read_manifest
from e4t_cli.names import is_remote
from e4t_cli.registry import user_domain, user_domains_folder, weights_folder

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
    from e4t_cli.hub.inventory import remembered

    repository, _, commit = location.partition(":")[2].partition("@")
    inventory = remembered(repository, commit or None)
    return sum(file.size for file in inventory.files) if inventory else 0
