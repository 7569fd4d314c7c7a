"""What the caches hold for this program, and whether it is still what it was.

The hub's cache belongs to every program: of it, only repositories that were fetched from here are
touched. What this program derived lies in a cache of its own and can go at any time.

Making room: what can go without a loss, and what the user wants to be rid of.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from e4t_cli.errors import UsageError, WeightsUnavailable, printable
from e4t_cli.hub.bases import PUBLISHED
from e4t_cli.hub.download import ProgressMeter
from e4t_cli.hub.image_tower import VIT_H_14, has_tower, tower_folder
from e4t_cli.hub.inventory import all_remembered, blob_name, digest_of, forget, forget_gone
from e4t_cli.hub.locations import PROGRAM, converted_packs, hub_location
from e4t_cli.hub.paths import hub_cache, repository_folder, snapshot_folder, user_cache
from e4t_cli.progress import ProgressCallback


@dataclass(frozen=True, kw_only=True)
class CacheItem:
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


def items() -> list[CacheItem]:
    """Return what this program has in the hub's cache and in its own."""
    named = {(row.repository, row.revision): row.name for row in PUBLISHED.values()}
    found = []
    for repository, commit in _snapshots():
        folder = snapshot_folder(repository, commit)
        found.append(
            CacheItem(
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
            CacheItem(name=VIT_H_14.name, kind="image tower", path=folder, size=size_of(folder))
        )
    for pack in converted_packs():
        found.append(
            CacheItem(
                name=f"{PROGRAM}:{pack.repository}",
                kind="converted pack",
                path=pack.folder,
                size=size_of(pack.folder),
                revision=pack.commit,
            )
        )
    for folder in sorted((user_cache() / "pretraining").glob("*/")):
        found.append(
            CacheItem(
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
    meter = ProgressMeter(
        sum(path.stat().st_size for _, _, path, _ in files), on_progress, "verify"
    )
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


_STILL_WRITTEN = 3600.0  # seconds: a partial file younger than this may be another process's


def prunable() -> list[CacheItem]:
    """Return what can go without a loss: partial downloads, and what a slim copy has replaced."""
    found = []
    for repository in {repository for repository, _ in our_repositories()}:
        for path in repository_folder(repository).glob("blobs/*.incomplete"):
            with contextlib.suppress(OSError):
                about = path.stat()
                if time.time() - about.st_mtime > _STILL_WRITTEN:
                    found.append(
                        CacheItem(
                            name=repository,
                            kind="partial download",
                            path=path,
                            size=about.st_size,
                        )
                    )
    published = snapshot_folder(VIT_H_14.repository, VIT_H_14.revision) / VIT_H_14.file
    if has_tower() and published.is_file():
        found.append(
            CacheItem(
                name=VIT_H_14.repository,
                kind="published tower",
                path=published,
                size=published.stat().st_size,
            )
        )
    for pack in converted_packs():
        for path in pack.originals:
            size = path.stat().st_size
            found.append(
                CacheItem(name=pack.repository, kind="published checkpoint", path=path, size=size)
            )
    for path in (user_cache() / "towers").glob(".*~"):
        if time.time() - path.stat().st_mtime > _STILL_WRITTEN:
            found.append(
                CacheItem(
                    name="image tower", kind="partial download", path=path, size=size_of(path)
                )
            )
    return found


def prune(chosen: list[CacheItem] | None = None) -> list[CacheItem]:
    """Remove what can go without a loss; returns what went."""
    gone = []
    for item in prunable() if chosen is None else chosen:
        with contextlib.suppress(OSError):
            if item.path.is_symlink():
                item.path.resolve().unlink(missing_ok=True)
            if item.path.is_dir():
                shutil.rmtree(item.path)
            else:
                item.path.unlink(missing_ok=True)
            gone.append(item)
    forget_gone()
    return gone


def find_items(name: str) -> list[CacheItem]:
    """Return what a name on the command line means.

    Raises:
        UsageError: there is nothing of that name here.
    """
    address = hub_location(name)
    repository = address.repository if address is not None else name
    found = [
        item
        for item in items()
        if item.name in (name, repository)
        or item.path.parent.parent == repository_folder(repository)
    ]
    if not found:
        raise UsageError(
            f"there is nothing called {printable(name)!r} in the caches", hint="e4t cache ls"
        )
    return found


def remove(item: CacheItem) -> None:
    """Delete a repository from the hub's cache, or something derived from our own.

    Raises:
        WeightsUnavailable: the user has no right to.
    """
    if item.kind == "repository":
        folder = item.path.parent.parent
        repository = folder.name.removeprefix("models--").replace("--", "/", 1)
        others = [path for path in folder.glob("snapshots/*") if path != item.path]
        path = item.path if others else folder
        forget(repository)
    else:
        path = item.path
    blobs = [link.resolve() for link in item.path.rglob("*") if link.is_symlink()]
    try:
        shutil.rmtree(path)
        if path == item.path and item.kind == "repository":
            kept = {link.resolve() for link in item.path.parent.rglob("*") if link.is_symlink()}
            for blob in set(blobs) - kept:
                blob.unlink(missing_ok=True)
    except OSError as error:
        raise WeightsUnavailable(
            f"{printable(str(path))} cannot be removed: {error.strerror}"
        ) from error
    forget_gone()
