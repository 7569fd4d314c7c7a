"""The user's domain store: adds domains from a folder, a zip or the hub, and removes them.

Everything is checked while it is copied: the manifest, the length and SHA-256 of every file it lists (of the very
bytes that are written), and the header of each. Copies are made in a temporary folder and renamed, so that a domain is
in the store completely or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from e4t_cli.errors import E4TError, InputError, IntegrityError, ResourceError, UsageError, printable
from e4t_cli.files import check_absent, file_error, make_folder, put_in_place, write_atomically, writing
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.registry.discovery import OURS, USER, installed_packages, user_domain, user_domains_folder
from e4t_cli.registry.domain import Domain, check_name
from e4t_cli.registry.manifest import (
    MANIFEST_NAME,
    MAX_BYTES,
    Manifest,
    is_domain_folder,
    parse_manifest,
    read_manifest,
)
from e4t_cli.system_memory import check_addresses
from e4t_cli.temporary import sweep, temporary_path

MAX_MEMBERS = 1000
MAX_ARCHIVE_BYTES = 32 << 30  # larger than any domain folder: an encoder for Stable Diffusion takes 0.2 GB
MAX_RATIO = 100  # weights hardly compress; what unpacks to a hundred times its size is a zip bomb
ManifestCallback = Callable[[Manifest], None]
_REPOSITORY = re.compile(r"(?:hub:|hf://)?([\w.-]{1,96}/[\w.-]{1,96})(?:@([\w./-]{1,200}))?")


@dataclass(frozen=True, kw_only=True)
class AddedDomain:
    """A domain that is now in the store; `domain` is the value that `find_domain` returns."""

    domain: Domain
    folder: Path
    manifest: Manifest


def add_domain(
    source: str | os.PathLike[str],
    *,
    force: bool = False,
    offline: bool = False,
    on_progress: ProgressCallback | None = None,
) -> AddedDomain:
    """Copy a domain into the user's store, where `find_domain` finds it.

    Args:
        source: a folder with a domain.toml, a zip of one, or "owner/repository@revision" of the hub; a revision is a
            branch, a tag, or best a commit, which never changes.
        force: replace the domain of its name.
        offline: of the hub, use only what is on this machine already.
        on_progress: called while files are copied.

    Raises:
        UsageError: the source does not exist, or a domain of its name is in the store.
        InputError: it is a file of another kind.
        IntegrityError: a file does not match the manifest; the store is unchanged.
        WeightsUnavailable: the hub cannot be reached, or does not have it.
        ResourceError: the disk is full.
    """
    store = user_domains_folder()
    make_folder(store)
    sweep(store / "adding")
    sweep(store / "removing")
    temporary = temporary_path(store / "adding")

    def check_name_free(manifest: Manifest) -> None:  # before anything is unpacked, fetched or copied
        check_free_in_store(store / manifest.name, force=force)

    try:
        with writing(store):
            # Two levels below the store, where discovery does not look for manifests.
            temporary.mkdir()
            copy = temporary / "domain"
            folder, root = _resolve_source(source, temporary, offline, on_progress, check_name_free)
            shown = printable(os.fspath(source))
            manifest = copy_domain_folder(
                folder, copy, on_progress, links_into=root, shown=shown, on_manifest=check_name_free
            )
            user_domain(copy)  # a valid manifest can still make no valid Domain
            if manifest.encoder:  # the first manifests state no sizes
                check_addresses()
                from e4t_cli.models.domain_folder import check_headers  # loads torch

                check_headers(copy, manifest)
            target = store / manifest.name
            add_to_store(copy, target, force=force)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return AddedDomain(domain=user_domain(target), folder=target, manifest=manifest)


def check_free_in_store(target: Path, *, force: bool) -> None:
    """Raise UsageError if the store has a folder of that name, or with `force`, one that is no whole domain."""
    try:
        check_absent(target, ours=is_domain_folder if force else None)
    except UsageError as error:
        if force:
            raise UsageError(error.message, hint=f"e4t domains rm {target.name} removes it") from error
        message = f"there is a domain in {printable(str(target))} already"
        raise UsageError(message, hint=f"replace it with --force; e4t domains rm {target.name} removes it") from error


def add_to_store(folder: Path, target: Path, *, force: bool) -> None:
    """Rename a complete domain folder to its place in the store; UsageError if that is taken, also just now."""
    check_free_in_store(target, force=force)
    try:
        put_in_place(folder, target, ours=is_domain_folder if force else None)
    except FileExistsError:  # another process was faster
        check_free_in_store(target, force=force)
        raise


def find_user_folder(name: str) -> Path:
    """Return the folder of one of the user's domains, "my_dogs" or "user:my_dogs"; UsageError if there is none."""
    shown, bare = printable(name), name.removeprefix(f"{USER}:")
    try:
        folder = user_domains_folder() / check_name(bare)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if os.path.lexists(folder):
        return folder
    if packages := installed_packages(bare):
        message = f"the domain {shown!r} is not your own: it comes with {' and '.join(packages)}"
        hint = f"pip uninstall {packages[0]}"
        if packages[0] == OURS:
            hint = "it stays with e4t; E4T_DOMAINS=cat,my_dogs lists only the domains that it names"
        raise UsageError(message, hint=hint)
    raise UsageError(f"there is no domain {shown!r} among your own", hint="e4t domains list shows them all")


def remove_domain(name: str) -> Path:
    """Remove one of the user's domains and return the folder it had; UsageError if there is none, or no right to."""
    folder = find_user_folder(name)
    try:
        if os.path.islink(folder):
            folder.unlink()  # the folder it points to is not the store's
            return folder
        # Renamed in one step first: an interrupt leaves no half domain in the list.
        temporary = temporary_path(folder.with_name("removing"))
        with contextlib.suppress(OSError):  # a full disk has no room for a folder
            temporary.mkdir()
        if os.path.isdir(temporary):
            folder.rename(temporary / "domain")
            shutil.rmtree(temporary)
        else:
            (folder / MANIFEST_NAME).unlink(missing_ok=True)
            shutil.rmtree(folder)
    except OSError as error:
        raise UsageError(f"{printable(str(folder))} cannot be removed: {error.strerror}") from error
    return folder


def _resolve_source(
    source: str | os.PathLike[str],
    temporary: Path,
    offline: bool,
    on_progress: ProgressCallback | None,
    on_manifest: ManifestCallback,
) -> tuple[Path, Path]:
    """Return the folder of a source, unpacked below `temporary` or fetched, and the folder its links may lead into."""
    wanted = os.fspath(source)
    shown = printable(wanted)
    if not wanted or "\0" in wanted:
        raise UsageError(f"{shown!r} is neither a folder nor a zip nor a hub repository")
    path = Path(wanted)
    if os.path.isdir(path):
        if not os.path.isfile(path / MANIFEST_NAME):
            message = f"{shown} is no domain: it has no {MANIFEST_NAME}"
            raise UsageError(message, hint="e4t pretrain makes such a folder")
        return path, path
    if os.path.isfile(path):
        folder = _unpack(path, temporary / "unpacked", on_manifest)
        return folder, folder
    repository = _REPOSITORY.fullmatch(wanted)
    if repository and repository[2]:
        folder = _fetch(repository[1], repository[2], offline, on_progress, on_manifest)
        # A snapshot links to the blobs: repository/snapshots/COMMIT -> repository/blobs.
        return folder, folder.parent.parent
    if repository:
        message = f"there is no folder {shown}; a repository of the hub needs a revision"
        raise UsageError(message, hint=f"e4t domains add {shown}@COMMIT")
    hint = "e4t domains add takes a folder, a zip, or owner/repository@revision"
    raise UsageError(f"there is no folder or zip {shown}", hint=hint)


def _fetch(
    repository: str,
    revision: str,
    offline: bool,
    on_progress: ProgressCallback | None,
    on_manifest: ManifestCallback,
) -> Path:
    """Return the folder of a repository's snapshot, with the files of its manifest only."""
    from e4t_cli.hub.download import fetch_files
    from e4t_cli.hub.paths import HubAccess

    access = HubAccess(offline=offline, on_progress=on_progress)
    command = f"e4t domains add {repository}@{revision}"
    fetch = partial(fetch_files, repository, access=access, command=command)
    folder = fetch(revision, [MANIFEST_NAME])
    manifest = read_manifest(folder / MANIFEST_NAME)
    on_manifest(manifest)
    return fetch(folder.name, [MANIFEST_NAME, *manifest.files])  # of the manifest's commit


def _unpack(path: Path, folder: Path, on_manifest: ManifestCallback) -> Path:
    """Unpack what the manifest of a zip lists; it is at the top, or in the one folder there.

    One member with a path outside, a link, an encrypted one or absurd sizes are enough to refuse all.
    """
    shown = printable(str(path))
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise InputError(f"{shown} is not a zip: {printable(str(error))}") from error
    except OSError as error:
        raise InputError(f"{shown} cannot be read: {error.strerror}") from error
    with archive:
        members = _safe_members(archive, shown)
        tops = [name for name in members if name.rpartition("/")[2] == MANIFEST_NAME and name.count("/") <= 1]
        if len(tops) != 1:
            held = "more than one" if tops else "no domain: it has no"
            raise IntegrityError(f"{shown} holds {held} {MANIFEST_NAME} at its top")
        prefix, name = tops[0].removesuffix(MANIFEST_NAME), MANIFEST_NAME
        try:
            with archive.open(tops[0]) as file:
                manifest = parse_manifest(file.read(MAX_BYTES + 1), f"the {MANIFEST_NAME} of {shown}")
            on_manifest(manifest)
            for name in (MANIFEST_NAME, *manifest.files):
                if prefix + name in members:
                    archive.extract(prefix + name, folder)
        except (E4TError, MemoryError):
            raise
        except Exception as error:  # of zlib, bz2, lzma, or what Python 3.14 adds; each has its own kinds
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the disk, not of bz2
            raise IntegrityError(f"{name} in {shown} is damaged: {printable(str(error))}") from error
    return folder / prefix


def _safe_members(archive: zipfile.ZipFile, shown: str) -> dict[str, zipfile.ZipInfo]:
    """Return the files of a zip by name, without its folders."""
    found = archive.infolist()
    if len(found) > MAX_MEMBERS:
        raise IntegrityError(f"{shown} has {len(found):,} members: that is no domain folder")
    unpacked = sum(member.file_size for member in found)
    packed = sum(member.compress_size for member in found)
    if unpacked > MAX_ARCHIVE_BYTES or unpacked > MAX_RATIO * (packed + (1 << 20)):
        raise IntegrityError(f"{shown} unpacks to {unpacked:,} bytes: that is no domain folder")
    members: dict[str, zipfile.ZipInfo] = {}
    for member in found:
        # ZipInfo cuts names at a NUL and converts the system's separators; check what was written.
        name = member.orig_filename
        parts = name.removesuffix("/").split("/")
        mode = member.external_attr >> 16
        if "\\" in name or ":" in name or "\0" in name or {"", ".", "..", "~"} & set(parts):
            raise IntegrityError(f"{shown} holds a file for another place: {printable(name)}")
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise IntegrityError(f"{printable(name)} in {shown} is a link or a device")
        if member.flag_bits & 1:
            raise IntegrityError(f"{printable(name)} in {shown} is encrypted")
        if member.filename in members:
            raise IntegrityError(f"{shown} holds two files of the name {printable(name)}")
        if not member.is_dir():
            members[member.filename] = member
    return members


def copy_domain_folder(
    folder: Path,
    target: Path,
    on_progress: ProgressCallback | None = None,
    *,
    links_into: Path | None = None,
    shown: str = "",
    on_manifest: ManifestCallback | None = None,
) -> Manifest:
    """Copy a domain folder into a new one, the manifest first, and check every byte.

    Args:
        target: does not exist yet.
        on_progress: called after each file.
        links_into: links may point anywhere below this folder; by default below `folder`.
        shown: the folder's name in error messages.
        on_manifest: called with the manifest, before anything is copied.

    Raises:
        IntegrityError: a file is missing, differs from the manifest, or has an invalid header.
        ResourceError: there is not enough disk space.
    """
    shown, root = shown or printable(str(folder)), Path(os.path.realpath(links_into or folder))

    def find(name: str) -> Path:
        try:
            path = Path(os.path.realpath(folder / name, strict=True))
        except (OSError, RuntimeError):
            raise IntegrityError(f"{shown} has no file {printable(name)}") from None
        if not path.is_relative_to(root):
            raise IntegrityError(f"{printable(name)} in {shown} is a link to another place")
        if not stat.S_ISREG(path.stat().st_mode):  # a device or a pipe would never end
            raise IntegrityError(f"{printable(name)} in {shown} is not a plain file")
        return path

    def open_file(name: str) -> BinaryIO:
        try:
            return find(name).open("rb")
        except OSError as error:
            raise file_error(error, folder / name, reading=True) from error

    with open_file(MANIFEST_NAME) as file:
        text = file.read(MAX_BYTES + 1)
    manifest = parse_manifest(text, f"the {MANIFEST_NAME} of {shown}")
    if not manifest.files:
        raise IntegrityError(f"the {MANIFEST_NAME} of {shown} lists no files: there are no weights")
    if on_manifest is not None:
        on_manifest(manifest)
    target.mkdir()
    write_atomically(target / MANIFEST_NAME, text)
    lengths = {name: find(name).stat().st_size for name in manifest.files}
    for name, length in lengths.items():
        if manifest.sizes.get(name, length) != length:
            raise IntegrityError(f"{name} in {shown} has {length:,} bytes, its manifest says {manifest.sizes[name]:,}")
    total, free = sum(lengths.values()), shutil.disk_usage(target).free
    if total > free:
        raise ResourceError(f"{manifest.name} needs {total:,} bytes on disk, {free:,} are free")
    done = 0
    for name, sha256 in manifest.files.items():
        with open_file(name) as file:
            copy = partial(_copy_checked, file, sha256, f"{name} in {shown}")
            write_atomically(target / name, copy)
        _check_header(target / name)
        done += lengths[name]
        if on_progress:
            on_progress(Progress(stage="copy", done=done, total=total, unit="bytes"))
    return manifest


def _copy_checked(file: BinaryIO, sha256: str, about: str, target: BinaryIO) -> None:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
        target.write(block)
    if digest.hexdigest() != sha256:
        raise IntegrityError(f"{about} is damaged: its SHA-256 is {digest.hexdigest()}, its manifest says {sha256}")


def _check_header(path: Path) -> None:
    """Refuse a file that is not safetensors or JSON, whatever its name and its hash."""
    if path.suffix == ".json":
        try:
            json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise IntegrityError(f"{path.name} is not JSON: {printable(str(error))}") from error
        return
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path.name} is not a usable safetensors file: {error}") from error
