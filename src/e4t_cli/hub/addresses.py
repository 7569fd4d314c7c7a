"""What the spellings of a base or of a pack mean on the hub; nothing is asked."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from e4t_cli.bases import EMBEDDED, PUBLISHED
from e4t_cli.errors import IntegrityError, printable
from e4t_cli.files import write_atomically

from .places import COMMIT, REPOSITORY, own_cache, snapshot_folder


@dataclass(frozen=True, kw_only=True)
class Address:
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


def address_of(wanted: str) -> Address | None:
    """Return where on the hub a base is, None if the name does not mean the hub."""
    if wanted in PUBLISHED:
        row = PUBLISHED[wanted]
        return Address(
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
            return address_of(row.name)
    return Address(name=_plain(repository), repository=repository, revision=revision or None)


def pack_address(location: str) -> tuple[str, str]:
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
        folder = snapshot_folder(*pack_address(location))
    except IntegrityError:
        return None
    return folder if (folder / "domain.toml").is_file() else None


def _plain(repository: str) -> str:
    """Return a name of our own kind for a repository: "owner-name", in small letters."""
    return re.sub(r"[^a-z0-9_-]+", "-", repository.lower()).strip("-_")[:64]


def remember_address(name: str, address: Address, commit: str) -> None:
    """Remember what a name meant, so that a saved concept finds its base again."""
    if name in PUBLISHED:
        return
    path = own_cache() / "bases" / f"{name}.json"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"repository": address.repository, "revision": commit})
        write_atomically(path, text.encode())


def _remembered_address(name: str) -> Address | None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name):
        return None
    try:
        table = json.loads((own_cache() / "bases" / f"{name}.json").read_text(encoding="utf-8"))
        repository, revision = str(table["repository"]), str(table["revision"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not REPOSITORY.fullmatch(repository) or not COMMIT.fullmatch(revision):
        return None
    return Address(name=name, repository=repository, revision=revision)
