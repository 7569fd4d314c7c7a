"""Adding a domain that somebody else made: a folder, a zip, or a repository of the hub.

Everything is checked on the way in: the card, every file that it lists by length and SHA-256 (of
the very bytes that are kept), and the header of each. It is gathered in a folder beside the others
and renamed, so that a domain is on the shelf whole or not at all.

Removing one of the user's own domains; what a package brought, its package manager removes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from e4t_cli.errors import ResourceError, UsageError, printable
from e4t_cli.progress import ProgressCallback
from e4t_cli.registry.archives import CARD, DomainArchive, copy_pack, open_archive, open_folder
from e4t_cli.registry.discovery import USER, installed_packages, user_domain, user_domains_folder
from e4t_cli.registry.domain import Domain, check_name
from e4t_cli.registry.manifest import Manifest, read_manifest

_HUB = re.compile(r"(?:hub:|hf://)?([\w.-]{1,96}/[\w.-]{1,96})@([\w./-]{1,200})")
_A_DAY = 86_400
_GATHERING = ".adding-"


@dataclass(frozen=True, kw_only=True)
class Added:
    """A domain that is now on the shelf.

    Args:
        domain: the value, as `find_domain` will give it.
        folder: where it is.
        card: what it says about itself.
    """

    domain: Domain
    folder: Path
    card: Manifest


def add_domain(
    source: str | os.PathLike[str],
    *,
    offline: bool = False,
    on_progress: ProgressCallback | None = None,
) -> Added:
    """Put a domain on the user's shelf, where `find_domain` finds it.

    Args:
        source: a folder with a domain.toml, a zip of one, or "owner/repository@revision" of the
            hub; a revision is a branch, a tag, or best a commit, which never changes.
        offline: of the hub, take only what is on this machine already.
        on_progress: called while files are copied.

    Raises:
        UsageError: there is no such thing, or a domain of its name is on the shelf.
        InputError: it is a file of another kind.
        IntegrityError: anything in it is not as its card says; the shelf is as it was.
        WeightsUnavailable: the hub cannot be reached, or does not have it.
        ResourceError: the disk is full.
    """
    shelf = user_domains_folder()
    with _disk_explained(shelf):
        shelf.mkdir(parents=True, exist_ok=True)
        _sweep(shelf)
        # Two levels down, where nobody who lists the shelf looks for cards.
        gathering = shelf / f"{_GATHERING}{secrets.token_hex(6)}"
        gathering.mkdir()
        try:
            with _open_source(source, offline, on_progress) as parcel:
                card = copy_pack(parcel, gathering / "pack", on_progress)
            target = shelf / card.name
            if target.exists():
                raise _taken(card.name, target)
            user_domain(gathering / "pack")  # a card can be well-formed and still make no Domain
            try:
                (gathering / "pack").rename(target)
            except OSError as error:  # another process was faster
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    raise _taken(card.name, target) from error
                raise
        finally:
            shutil.rmtree(gathering, ignore_errors=True)
    return Added(domain=user_domain(target), folder=target, card=card)


def _open_source(
    source: str | os.PathLike[str], offline: bool, on_progress: ProgressCallback | None
) -> AbstractContextManager[DomainArchive]:
    wanted = os.fspath(source)
    shown = printable(wanted)
    if not wanted or "\0" in wanted:
        raise UsageError(f"{shown!r} is neither a folder nor a zip nor a hub repository")
    path = Path(wanted)
    if path.is_dir():
        if not (path / CARD).is_file():
            hint = "e4t pretrain makes such a folder"
            raise UsageError(f"{shown} is no domain: it has no {CARD}", hint=hint)
        return open_folder(path)
    if path.is_file():
        return open_archive(path)
    if found := _HUB.fullmatch(wanted):
        return _open_repository(found[1], found[2], offline, on_progress)
    if re.fullmatch(r"(?:hub:|hf://)?[\w.-]+/[\w.-]+", wanted):
        raise UsageError(
            f"there is no folder {shown}; a repository of the hub needs a revision",
            hint=f"e4t domains add {shown}@COMMIT",
        )
    raise UsageError(
        f"there is no folder or zip {shown}",
        hint="e4t domains add takes a folder, a zip, or owner/repository@revision",
    )


@contextmanager
def _open_repository(
    repository: str, revision: str, offline: bool, on_progress: ProgressCallback | None
) -> Iterator[DomainArchive]:
    from e4t_cli.hub.download import fetch_files
    from e4t_cli.hub.paths import HubAccess

    access = HubAccess(offline=offline, on_progress=on_progress)

    def fetch(commit: str, names: list[str]) -> Path:
        return fetch_files(
            repository,
            commit,
            names,
            access,
            command=f"e4t domains add {repository}@{revision}",
        )

    folder = fetch(revision, [CARD])
    card = read_manifest(folder / CARD)
    # The commit that the card came from; and nothing but what the card lists.
    folder = fetch(folder.name, [CARD, *card.files])
    # A snapshot links to its repository's blobs: repository/snapshots/COMMIT -> repository/blobs.
    with open_folder(folder, links_into=folder.parent.parent) as parcel:
        yield parcel


def _sweep(shelf: Path) -> None:
    """Remove what a crash left half added or half removed; what still runs is younger."""
    for left in (*shelf.glob(f"{_GATHERING}*"), *shelf.glob(f"{REMOVING}*")):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > _A_DAY:
                shutil.rmtree(left, ignore_errors=True)


def _taken(name: str, target: Path) -> UsageError:
    return UsageError(
        f"there is a domain in {printable(str(target))} already",
        hint=f"e4t domains rm {name} removes it",
    )


@contextmanager
def _disk_explained(shelf: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        shown = printable(str(error.filename or shelf))
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError("the disk is full; nothing was added") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise UsageError(f"{shown} cannot be used: {error.strerror}") from error
        raise


REMOVING = ".removing-"
"""Begins the names of folders that are on their way out."""


def find_own_folder(name: str) -> Path:
    """Return the folder of one of the user's own domains, sound or broken.

    Args:
        name: "my_dogs" or "user:my_dogs".

    Raises:
        UsageError: there is none of that name; the hint says who does have it.
    """
    shown, bare = printable(name), name.removeprefix(f"{USER}:")
    try:
        folder = user_domains_folder() / check_name(bare)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if os.path.lexists(folder):
        return folder
    packages = installed_packages(bare)
    if packages:
        raise UsageError(
            f"the domain {shown!r} is not your own: it comes with {' and '.join(packages)}",
            hint=f"pip uninstall {packages[0]}",
        )
    raise UsageError(
        f"there is no domain {shown!r} among your own", hint="e4t domains list shows them all"
    )


def remove_domain(name: str) -> Path:
    """Remove one of the user's own domains.

    Returns:
        The folder that is gone.

    Raises:
        UsageError: there is none of that name, or it may not be removed.
    """
    folder = find_own_folder(name)
    try:
        if folder.is_symlink():
            folder.unlink()  # the folder it leads to is somebody's, but not the shelf's
            return folder
        # First the name goes, in one step: an interrupt leaves no half domain in the list.
        leaving = folder.with_name(f"{REMOVING}{secrets.token_hex(6)}")
        leaving.mkdir()
        folder.rename(leaving / "pack")
        shutil.rmtree(leaving)
    except OSError as error:
        raise UsageError(f"{printable(str(folder))} cannot be removed: {error.strerror}") from error
    return folder
