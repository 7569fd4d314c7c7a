"""What the caches hold for this program, and whether it is still what it was.

The hub's cache belongs to every program: of it, only repositories that were fetched from here are
touched. What this program derived lies in a cache of its own and can go at any time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from e4t_cli.bases import PUBLISHED
from e4t_cli.progress import ProgressCallback

from .converted import PROGRAM, converted_packs
from .integrity import blob_name, digest_of
from .inventory import all_remembered
from .listening import Meter
from .places import hub_cache, own_cache, snapshot_folder
from .towers import VIT_H_14, has_tower, tower_folder


@dataclass(frozen=True, kw_only=True)
class Item:
    """Something in a cache.

    Args:
        name: what it is called on the command line.
        kind: "repository", "image tower", "converted pack", "pictures looked at",
            "partial download", "published tower", "published checkpoint".
        path: where it is.
        size: in bytes, on the disk.
        revision: of a repository.
    """

    name: str
    kind: str
    path: Path
    size: int
    revision: str = ""

    def as_dict(self) -> dict[str, object]:
        """Return it for ``--json``."""
        return {
            "name": self.name,
            "kind": self.kind,
            "revision": self.revision,
            "size": self.size,
            "path": str(self.path),
        }


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A file that is not what it was fetched as."""

    repository: str
    file: str
    expected: str
    got: str


def items() -> list[Item]:
    """Return what this program has in the hub's cache and in its own."""
    named = {(row.repository, row.revision): row.name for row in PUBLISHED.values()}
    found = []
    for repository, commit in _snapshots():
        folder = snapshot_folder(repository, commit)
        found.append(
            Item(
                name=named.get((repository, commit), repository),
                kind="repository",
                path=folder,
                size=size_of(folder),
                revision=commit,
            )
        )
    if has_tower():
        folder = tower_folder()
        found.append(
            Item(name=VIT_H_14.name, kind="image tower", path=folder, size=size_of(folder))
        )
    for pack in converted_packs():
        found.append(
            Item(
                name=f"{PROGRAM}:{pack.repository}",
                kind="converted pack",
                path=pack.folder,
                size=size_of(pack.folder),
                revision=pack.commit,
            )
        )
    for folder in sorted((own_cache() / "pretraining").glob("*/")):
        found.append(
            Item(
                name=f"pretraining/{folder.name}",
                kind="pictures looked at",
                path=folder,
                size=size_of(folder),
            )
        )
    return found


def verify(on_progress: ProgressCallback | None = None) -> tuple[int, list[Damage]]:
    """Read every file again, whatever was remembered, and compare it with its checksum.

    Returns:
        How many files were compared, and those that differ.
    """
    declared = {
        (one.repository, one.commit, file.path): file.digest
        for one in all_remembered()
        for file in one.files
    }
    files = []
    for repository, commit in _snapshots():
        folder = snapshot_folder(repository, commit)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            expected = declared.get((repository, commit, name)) or blob_name(path)
            if expected:
                files.append((repository, name, path, expected))
    meter = Meter(sum(path.stat().st_size for _, _, path, _ in files), on_progress, "verify")
    damaged = []
    for repository, name, path, expected in files:
        got = digest_of(path, expected, meter.add)
        if got != expected:
            damaged.append(Damage(repository=repository, file=name, expected=expected, got=got))
    meter.settle()
    return len(files), damaged


def our_repositories() -> list[tuple[str, str]]:
    """Return repositories and commits that this program fetched or has a name for."""
    known = [(row.repository, row.revision) for row in PUBLISHED.values()]
    known += [(VIT_H_14.repository, VIT_H_14.revision)]
    known += [(one.repository, one.commit) for one in all_remembered()]
    return list(dict.fromkeys(known))


def _snapshots() -> Iterator[tuple[str, str]]:
    for repository, commit in our_repositories():
        if hub_cache().is_dir() and snapshot_folder(repository, commit).is_dir():
            yield repository, commit


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
