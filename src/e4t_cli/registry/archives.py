"""What is handed in to be added: the card and files of one pack, from a folder or a zip.

A parcel gives out exactly the files that its card lists, by plain names, and nothing outside of
itself: no link that leads out of the folder, no member of an archive that names another place.

Copying a pack while checking it: what is kept is what was checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from e4t_cli.errors import InputError, IntegrityError, ResourceError, printable
from e4t_cli.files import write_atomically
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.registry.manifest import MAX_BYTES, Manifest, parse_manifest

CARD = "domain.toml"
MAX_MEMBERS = 1000
MAX_ARCHIVE_BYTES = 32 << 30
"""Larger than any pack: an encoder for Stable Diffusion takes 0.2 GB."""
MAX_RATIO = 100
"""Random numbers hardly compress; what unpacks to a hundred times its size is a bomb."""


@dataclass(frozen=True, kw_only=True)
class DomainArchive:
    """One pack on its way in.

    Args:
        source: where it comes from, for messages.
        size: of a file, in bytes.
        open: gives the content of a file; raises IntegrityError if there is no such file.
    """

    source: str
    size: Callable[[str], int]
    open: Callable[[str], AbstractContextManager[BinaryIO]]


@contextmanager
def open_folder(folder: Path, *, links_into: Path | None = None) -> Iterator[DomainArchive]:
    """Take a folder as a parcel.

    Args:
        folder: has a domain.toml.
        links_into: links may lead anywhere below this folder; by default below `folder`. The
            hub's cache is made of links between its own folders.
    """
    shown = printable(str(folder))
    root = (links_into or folder).resolve()

    def find(name: str) -> Path:
        path = folder / name
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError):
            raise IntegrityError(f"{shown} has no file {printable(name)}") from None
        if not target.is_relative_to(root):
            raise IntegrityError(f"{printable(name)} in {shown} is a link to another place")
        if not stat.S_ISREG(target.stat().st_mode):  # a device or a pipe would never end
            raise IntegrityError(f"{printable(name)} in {shown} is not a plain file")
        return target

    yield DomainArchive(
        source=shown,
        size=lambda name: find(name).stat().st_size,
        open=lambda name: find(name).open("rb"),
    )


@contextmanager
def open_archive(path: Path) -> Iterator[DomainArchive]:
    """Take a zip as a parcel: its pack is at the top, or in the one folder at the top.

    Raises:
        InputError: it is not a zip.
        IntegrityError: a member names a place outside, is a link, is encrypted, or unpacks to
            absurd sizes. One such member is enough to refuse all.
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
        cards = [name for name in members if name.rpartition("/")[2] == CARD]
        tops = [name for name in cards if name.count("/") <= 1]
        if len(tops) != 1:
            held = "no pack: it has no" if not tops else "more than one"
            raise IntegrityError(f"{shown} holds {held} {CARD} at its top")
        prefix = tops[0][: -len(CARD)]

        def find(name: str) -> zipfile.ZipInfo:
            try:
                return members[prefix + name]
            except KeyError:
                raise IntegrityError(f"{shown} has no file {printable(name)}") from None

        @contextmanager
        def open_member(name: str) -> Iterator[BinaryIO]:
            with _damage_explained(shown, name), archive.open(find(name)) as member:
                yield member  # type: ignore[misc]  # zipfile types it as IO[bytes]

        yield DomainArchive(source=shown, size=lambda name: find(name).file_size, open=open_member)


def _safe_members(archive: zipfile.ZipFile, shown: str) -> dict[str, zipfile.ZipInfo]:
    """Return the files of an archive by name; its folders go without saying."""
    found = archive.infolist()
    if len(found) > MAX_MEMBERS:
        raise IntegrityError(f"{shown} has {len(found):,} members: that is no pack")
    unpacked = sum(member.file_size for member in found)
    packed = sum(member.compress_size for member in found)
    if unpacked > MAX_ARCHIVE_BYTES or unpacked > MAX_RATIO * (packed + (1 << 20)):
        raise IntegrityError(f"{shown} unpacks to {unpacked:,} bytes: that is no pack")
    members: dict[str, zipfile.ZipInfo] = {}
    for member in found:
        # ZipInfo cuts names at a NUL and turns the system's separators; judge what was written.
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


@contextmanager
def _damage_explained(shown: str, name: str) -> Iterator[None]:
    import zlib

    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        with contextlib.suppress(AttributeError):
            error.add_note(shown)
        raise IntegrityError(f"{printable(name)} in {shown} is damaged: {error}") from error


_BLOCK = 1 << 20


def copy_pack(
    parcel: DomainArchive, folder: Path, on_progress: ProgressCallback | None = None
) -> Manifest:
    """Copy a parcel into a new folder, the card first, and believe nothing.

    The SHA-256 is that of the very bytes that are written, so nothing can change in between.

    Raises:
        IntegrityError: a file is missing, or not as the card says, or no safetensors or JSON.
        ResourceError: there is no room for it.
    """
    with parcel.open(CARD) as file:
        text = file.read(MAX_BYTES + 1)
    card = parse_manifest(text, f"the {CARD} of {parcel.source}")
    if not card.files:
        raise IntegrityError(f"the {CARD} of {parcel.source} lists no files: there are no weights")
    folder.mkdir()
    write_atomically(folder / CARD, text)
    lengths = {name: parcel.size(name) for name in card.files}
    for name, length in lengths.items():
        if card.sizes.get(name, length) != length:
            raise IntegrityError(
                f"{name} in {parcel.source} has {length:,} bytes, its card says "
                f"{card.sizes[name]:,}"
            )
    total, free = sum(lengths.values()), shutil.disk_usage(folder).free
    if total > free:
        raise ResourceError(f"{card.name} needs {total:,} bytes on disk, {free:,} are free")
    done = 0
    for name, sha256 in card.files.items():
        with parcel.open(name) as file:
            write_atomically(folder / name, _Checked(file, sha256, f"{name} in {parcel.source}"))
        _check_header(folder / name)
        done += lengths[name]
        if on_progress:
            on_progress(Progress(stage="copy", done=done, total=total, unit="bytes"))
    return card


@dataclass(frozen=True)
class _Checked:
    """Copies a file and compares the hash of what it copied, before the copy gets its name."""

    file: BinaryIO
    sha256: str
    about: str

    def __call__(self, target: BinaryIO) -> None:
        digest = hashlib.sha256()
        while block := self.file.read(_BLOCK):
            digest.update(block)
            target.write(block)
        if digest.hexdigest() != self.sha256:
            raise IntegrityError(
                f"{self.about} is damaged: its SHA-256 is {digest.hexdigest()}, "
                f"its card says {self.sha256}"
            )


def _check_header(path: Path) -> None:
    """Refuse what is no safetensors or no JSON, whatever its name and its hash say."""
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
