"""What is handed in to be added: the card and files of one pack, from a folder or a zip.

A parcel gives out exactly the files that its card lists, by plain names, and nothing outside of
itself: no link that leads out of the folder, no member of an archive that names another place.
"""

from __future__ import annotations

import contextlib
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from e4t_cli.errors import InputError, IntegrityError, printable

CARD = "domain.toml"
MOST_MEMBERS = 1000
MOST_BYTES = 32 << 30
"""Larger than any pack: an encoder for Stable Diffusion takes 0.2 GB."""
MOST_RATIO = 100
"""Random numbers hardly compress; what unpacks to a hundred times its size is a bomb."""


@dataclass(frozen=True, kw_only=True)
class Parcel:
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
def open_folder(folder: Path, *, links_into: Path | None = None) -> Iterator[Parcel]:
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

    yield Parcel(
        source=shown,
        size=lambda name: find(name).stat().st_size,
        open=lambda name: find(name).open("rb"),
    )


@contextmanager
def open_archive(path: Path) -> Iterator[Parcel]:
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

        yield Parcel(source=shown, size=lambda name: find(name).file_size, open=open_member)


def _safe_members(archive: zipfile.ZipFile, shown: str) -> dict[str, zipfile.ZipInfo]:
    """Return the files of an archive by name; its folders go without saying."""
    found = archive.infolist()
    if len(found) > MOST_MEMBERS:
        raise IntegrityError(f"{shown} has {len(found):,} members: that is no pack")
    unpacked = sum(member.file_size for member in found)
    packed = sum(member.compress_size for member in found)
    if unpacked > MOST_BYTES or unpacked > MOST_RATIO * (packed + (1 << 20)):
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
