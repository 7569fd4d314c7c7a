"""Where packs lie that were converted from another program's weights on the hub.

A domain names such weights by "PROGRAM:owner/name", without a commit: nobody has published one to
rely on, so the branch is resolved once and then remembered. What is converted is derived, and lies
in our own cache, under the commit it was made from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .places import COMMIT, REPOSITORY, own_cache, snapshot_folder

PROGRAM = "e4t-diffusion"
FORMAT = 1
"""Of what a conversion writes; a higher one makes every pack again."""


def foreign_repository(location: str) -> str | None:
    """Return "owner/name" of a location of another program's weights, None for other places."""
    program, _, repository = location.partition(":")
    return repository if program == PROGRAM and REPOSITORY.fullmatch(repository) else None


def place_of_converted(repository: str, commit: str) -> Path:
    """Return where the pack made from that state of a repository belongs, there or not."""
    return own_cache() / "converted" / repository.replace("/", "--") / f"{commit}-{FORMAT}"


def converted_folder(location: str) -> Path | None:
    """Return the pack that was made from a location, None if none is here; nothing is asked."""
    repository = foreign_repository(location)
    if repository is None:
        return None
    from .inventory import known_commit  # which knows how to ask the hub, too

    commit = known_commit(repository, None)
    # Where the hub's cache was cleared: that must not cost four gigabytes again.
    kept = [
        pack.folder
        for pack in converted_packs()
        if pack.repository == repository and commit in (None, pack.commit)
    ]
    return kept[-1] if kept else None


@dataclass(frozen=True, kw_only=True)
class Converted:
    """One pack that was converted."""

    repository: str
    commit: str
    folder: Path

    @property
    def originals(self) -> list[Path]:
        """The files it was made from that are still in the hub's cache; nothing needs them."""
        folder = snapshot_folder(self.repository, self.commit)
        return sorted(path for path in folder.glob("*.pt") if path.is_file())


def converted_packs() -> list[Converted]:
    """Return every pack that was converted."""
    found = []
    for card in sorted((own_cache() / "converted").glob("*/*/domain.toml")):
        commit, _, version = card.parent.name.partition("-")
        repository = card.parent.parent.name.replace("--", "/", 1)
        if COMMIT.fullmatch(commit) and version == str(FORMAT):
            found.append(Converted(repository=repository, commit=commit, folder=card.parent))
    return found
