"""Making room: what can go without a loss, and what the user wants to be rid of."""

from __future__ import annotations

import contextlib
import shutil
import time

from e4t_cli.errors import UsageError, WeightsUnavailable, printable

from .addresses import address_of
from .converted import converted_packs
from .housekeeping import Item, items, our_repositories, size_of
from .integrity import forget_gone
from .inventory import forget
from .places import own_cache, repository_folder, snapshot_folder
from .towers import VIT_H_14, has_tower

_STILL_WRITTEN = 3600.0  # seconds: a partial file younger than this may be another process's


def prunable() -> list[Item]:
    """Return what can go without a loss: partial downloads, and what a slim copy has replaced."""
    found = []
    for repository in {repository for repository, _ in our_repositories()}:
        for path in repository_folder(repository).glob("blobs/*.incomplete"):
            with contextlib.suppress(OSError):
                about = path.stat()
                if time.time() - about.st_mtime > _STILL_WRITTEN:
                    found.append(
                        Item(
                            name=repository,
                            kind="partial download",
                            path=path,
                            size=about.st_size,
                        )
                    )
    published = snapshot_folder(VIT_H_14.repository, VIT_H_14.revision) / VIT_H_14.file
    if has_tower() and published.is_file():
        found.append(
            Item(
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
                Item(name=pack.repository, kind="published checkpoint", path=path, size=size)
            )
    for path in (own_cache() / "towers").glob(".*~"):
        if time.time() - path.stat().st_mtime > _STILL_WRITTEN:
            found.append(
                Item(name="image tower", kind="partial download", path=path, size=size_of(path))
            )
    return found


def prune(chosen: list[Item] | None = None) -> list[Item]:
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


def find_items(name: str) -> list[Item]:
    """Return what a name on the command line means.

    Raises:
        UsageError: there is nothing of that name here.
    """
    address = address_of(name)
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


def remove(item: Item) -> None:
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
