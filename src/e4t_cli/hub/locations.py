"""What the spellings of a base or of a pack mean on the hub; nothing is asked.

Where packs lie that were converted from another program's weights on the hub.

A domain names such weights by "PROGRAM:owner/name", without a commit: nobody has published one to
rely on, so the branch is resolved once and then remembered. What is converted is derived, and lies
in our own cache, under the commit it was made from.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from e4t_cli.errors import IntegrityError, printable
from e4t_cli.files import write_atomically
from e4t_cli.hub.bases import EMBEDDED, PUBLISHED
from e4t_cli.hub.paths import COMMIT, REPOSITORY, snapshot_folder, user_cache


@dataclass(frozen=True, kw_only=True)
class HubLocation:
    """One base of the hub: where it is, and what it is called here."""

    name: str
    repository: str
    revision: str | None = None
    licence: str | None = None  # None: as the repository states it

    @property
    def advice(self) -> str:
        """The command that fetches it."""
        if self.name in PUBLISHED:
            return f"e4t fetch {self.name}"
        return f"e4t fetch {self.repository}" + (f"@{self.revision}" if self.revision else "")


def hub_location(wanted: str) -> HubLocation | None:
    """Return where on the hub a base is, None if the name does not mean the hub."""
    if wanted in PUBLISHED:
        row = PUBLISHED[wanted]
        return HubLocation(
            name=row.name, repository=row.repository, revision=row.revision, licence=row.licence
        )
    if wanted in ("auto", *EMBEDDED) or wanted.startswith((".", "/", "~")) or "\\" in wanted:
        return None
    repository, _, revision = wanted.partition("@")
    if not REPOSITORY.fullmatch(repository):
        return _remembered_address(wanted)
    if Path(wanted).is_dir():  # a folder beside us comes first, as it always did
        return None
    for row in PUBLISHED.values():
        if repository.lower() == row.repository.lower() and revision in ("", row.revision):
            return hub_location(row.name)
    return HubLocation(name=_plain(repository), repository=repository, revision=revision or None)


def domain_weights_location(location: str) -> tuple[str, str]:
    """Return repository and commit of "hub:owner/name@commit".

    Raises:
        IntegrityError: it is none; a branch would be another pack tomorrow.
    """
    repository, _, revision = location.removeprefix("hub:").partition("@")
    if not REPOSITORY.fullmatch(repository) or not COMMIT.fullmatch(revision):
        raise IntegrityError(
            f"{printable(location)!r} is no address of a pack",
            hint="hub:OWNER/NAME@COMMIT, with all 40 digits of the commit",
        )
    return repository, revision


def pack_folder(location: str) -> Path | None:
    """Return the folder of a hub's pack if it is on this machine; nothing is asked."""
    try:
        folder = snapshot_folder(*domain_weights_location(location))
    except IntegrityError:
        return None
    return folder if (folder / "domain.toml").is_file() else None


def _plain(repository: str) -> str:
    """Return a name of our own kind for a repository: "owner-name", in small letters."""
    return re.sub(r"[^a-z0-9_-]+", "-", repository.lower()).strip("-_")[:64]


def remember_location(name: str, address: HubLocation, commit: str) -> None:
    """Remember what a name meant, so that a saved concept finds its base again."""
    if name in PUBLISHED:
        return
    path = user_cache() / "bases" / f"{name}.json"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"repository": address.repository, "revision": commit})
        write_atomically(path, text.encode())


def _remembered_address(name: str) -> HubLocation | None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name):
        return None
    try:
        table = json.loads((user_cache() / "bases" / f"{name}.json").read_text(encoding="utf-8"))
        repository, revision = str(table["repository"]), str(table["revision"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not REPOSITORY.fullmatch(repository) or not COMMIT.fullmatch(revision):
        return None
    return HubLocation(name=name, repository=repository, revision=revision)


PROGRAM = "e4t-diffusion"
FORMAT = 1
"""Of what a conversion writes; a higher one makes every pack again."""


def foreign_repository(location: str) -> str | None:
    """Return "owner/name" of a location of another program's weights, None for other places."""
    program, _, repository = location.partition(":")
    return repository if program == PROGRAM and REPOSITORY.fullmatch(repository) else None


def place_of_converted(repository: str, commit: str) -> Path:
    """Return where the pack made from that state of a repository belongs, there or not."""
    return user_cache() / "converted" / repository.replace("/", "--") / f"{commit}-{FORMAT}"


def converted_folder(location: str) -> Path | None:
    """Return the pack that was made from a location, None if none is here; nothing is asked."""
    repository = foreign_repository(location)
    if repository is None:
        return None
    from e4t_cli.hub.inventory import known_commit  # which knows how to ask the hub, too

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
    for card in sorted((user_cache() / "converted").glob("*/*/domain.toml")):
        commit, _, version = card.parent.name.partition("-")
        repository = card.parent.parent.name.replace("--", "/", 1)
        if COMMIT.fullmatch(commit) and version == str(FORMAT):
            found.append(Converted(repository=repository, commit=commit, folder=card.parent))
    return found
