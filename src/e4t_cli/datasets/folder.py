"""One picture of a source, not opened yet.

A folder of pictures: listed once, in one order, whatever is linked where.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from e4t_cli.errors import InputError, printable
from e4t_cli.images.loading import MAX_BYTES, ImageSource, image_sha256, open_image, prepare_image
from e4t_cli.registry.domain import Domain, PreparationTarget, PreparedImage


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageItem:
    """A name for messages, and the way to a picture.

    Args:
        name: unique in its source; for a file its path below the source's folder.
        picture: a path, bytes, a PIL image, or a picture that is prepared already.
        fault: why there is none, if that is known already.
    """

    name: str
    picture: ImageSource | PreparedImage
    fault: str = ""

    def digest(self) -> bytes:
        """Return a hash of the content, whatever its name: 32 bytes.

        Raises:
            InputError: it cannot be read.
        """
        picture = self.picture
        if self.fault:
            raise InputError(self.fault)
        if isinstance(picture, PreparedImage):
            parts = [image_sha256(one) for one in (picture.image, picture.mask) if one is not None]
            return hashlib.sha256(" ".join(parts).encode()).digest()
        try:
            if isinstance(picture, Image.Image):
                turned = picture.getexif().tobytes()
                return hashlib.sha256(image_sha256(picture).encode() + turned).digest()
            if isinstance(picture, bytes):
                return hashlib.sha256(picture).digest()
            if isinstance(picture, str | os.PathLike):
                return _file_digest(Path(picture))
            picture.seek(0)
            found = hashlib.sha256(picture.read(MAX_BYTES + 1)).digest()
            picture.seek(0)
            return found
        except InputError:
            raise
        except OSError as error:
            raise InputError(f"it cannot be read: {error.strerror or error}") from error
        except Exception as error:  # a lazily opened PIL image decodes here, hostile bytes and all
            raise InputError(f"it is damaged: {error}") from error

    def stamp(self) -> str | None:
        """Return what changes whenever a file is changed, without reading it; None if unknown."""
        if not isinstance(self.picture, str | os.PathLike):
            return None
        path = os.path.abspath(self.picture)
        try:
            about = os.stat(path)
        except OSError:
            return None
        return f"{path}\0{about.st_size}\0{about.st_mtime_ns}\0{about.st_ctime_ns}"

    def prepare(self, domain: Domain, target: PreparationTarget) -> PreparedImage:
        """Open the picture as `personalize` opens a photo, and run the domain's preparation.

        Raises:
            InputError, UsageError: it cannot be used as a picture.
            E4TError: the domain's function failed.
        """
        if self.fault:
            raise InputError(self.fault)
        if isinstance(self.picture, PreparedImage):
            return self.picture
        return prepare_image(domain, open_image(self.picture).image, target)


def _file_digest(path: Path) -> bytes:
    # Without O_NONBLOCK, opening a FIFO that nobody writes to would wait for ever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise InputError("it is not a plain file")
        if about.st_size > MAX_BYTES:
            raise InputError(f"it is larger than {MAX_BYTES >> 20} MiB")
        return hashlib.file_digest(file, "sha256").digest()


_BESIDE_PICTURES = {
    *(".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".toml"),
    *(".md", ".html", ".npy", ".npz", ".safetensors", ".parquet", ".db", ".ini", ".log", ".py"),
}
"""What data sets keep beside their pictures; passed over without a word about damage."""


class Folder:
    """The files of a folder and its sub-folders, sorted; hidden ones are left out.

    Links to folders are followed, each real folder once, so a loop of links is none. One pass
    over the disk; after that only the names are kept, about a hundred bytes a picture.

    Args:
        root: the folder.

    Raises:
        InputError: it cannot be read, or there is no file in it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.beside = 0
        self.notes: list[str] = []
        self._unreadable: list[str] = []
        self._seen: set[tuple[int, int]] = set()
        self._names: list[str] = list(self._walk(str(root), ""))
        if self._unreadable:
            count = len(self._unreadable)
            folders = "1 folder" if count == 1 else f"{count} folders"
            self.notes.append(f"{folders} could not be read, as {printable(self._unreadable[0])}")
        if not self._names:
            raise InputError(f"there is no picture in {printable(str(root))}")

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> ImageItem:
        name = self._names[index]
        return ImageItem(name=name, picture=self.root / name)

    def __iter__(self) -> Iterator[ImageItem]:
        return (self[index] for index in range(len(self)))

    @property
    def title(self) -> str:
        return str(self.root)

    @property
    def fingerprint(self) -> str:
        """Identify the list of names; the content is known only to who reads it."""
        digest = hashlib.sha256()
        for name in self._names:
            digest.update(os.fsencode(name) + b"\0")
        return digest.hexdigest()[:32]

    def _walk(self, folder: str, inside: str) -> Iterator[str]:
        try:
            about = os.stat(folder)
            place = about.st_dev, about.st_ino
            if place in self._seen:
                return
            self._seen.add(place)
            with os.scandir(folder) as entries:
                found = sorted(
                    (entry for entry in entries if not entry.name.startswith(".")),
                    key=lambda entry: entry.name,
                )
        except OSError as error:
            if not inside:
                raise InputError(f"{printable(folder)} cannot be read: {error.strerror}") from error
            self._unreadable.append(inside)
            return
        for entry in found:
            name = f"{inside}{entry.name}"
            if entry.is_dir():
                yield from self._walk(entry.path, f"{name}/")
            elif not entry.is_file() or _suffix(name) in _BESIDE_PICTURES:
                self.beside += 1  # also a dangling link, a FIFO, a socket
            else:
                yield name


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()
