"""Image sources: what ``--data`` names, as items that are opened only when they are encoded."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image

from e4t_cli.errors import InputError, UsageError, printable
from e4t_cli.images.loading import MAX_BYTES, ImageInput, image_sha256, open_image, prepare_image
from e4t_cli.registry.domain import Domain, PreparationTarget, PreparedImage
from e4t_cli.system_memory import memory_ran_out


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageItem:
    """One image of a source, not opened yet."""

    name: str  # unique in its source; for a file its path below the source's folder
    image: ImageInput | PreparedImage
    fault: str = ""  # why there is no image, if that is known already

    def digest(self) -> bytes:
        """Return a hash of the content, whatever its name: 32 bytes.

        Raises:
            InputError: it cannot be read. Caches hash these messages in place of the content, so their wording is part
                of the format.
        """
        image = self.image
        if self.fault:
            raise InputError(self.fault)
        if isinstance(image, PreparedImage):
            parts = [image_sha256(one) for one in (image.image, image.mask) if one is not None]
            return hashlib.sha256(" ".join(parts).encode()).digest()
        try:
            if isinstance(image, Image.Image):
                return hashlib.sha256(image_sha256(image).encode() + image.getexif().tobytes()).digest()
            if isinstance(image, bytes):
                return hashlib.sha256(image).digest()
            if isinstance(image, str | os.PathLike):
                return _file_digest(Path(image))
            image.seek(0)
            found = hashlib.sha256(image.read(MAX_BYTES + 1)).digest()
            image.seek(0)
            return found
        except InputError:
            raise
        except OSError as error:
            raise InputError(f"it cannot be read: {error.strerror or error}") from error
        except Exception as error:  # a lazily opened PIL image decodes here, hostile bytes and all
            if memory_ran_out(error):
                raise
            raise InputError(f"it is damaged: {error}") from error

    def stamp(self) -> str | None:
        """Return path, size and times of a file, without reading it; None for anything else."""
        if isinstance(self.image, str | os.PathLike):
            with suppress(OSError):
                path, about = os.path.abspath(self.image), os.stat(self.image)
                return f"{path}\0{about.st_size}\0{about.st_mtime_ns}\0{about.st_ctime_ns}"
        return None

    def prepare(self, domain: Domain, target: PreparationTarget) -> PreparedImage:
        """Open the image as `personalize` opens a photo, and run the domain's preparation.

        Raises:
            InputError, UsageError: it cannot be used as an image.
            E4TError: the domain's function failed.
        """
        if self.fault:
            raise InputError(self.fault)
        if isinstance(self.image, PreparedImage):
            return self.image
        return prepare_image(domain, open_image(self.image).image, target)


def _file_digest(path: Path) -> bytes:
    # Without O_NONBLOCK, opening a FIFO without a writer would block.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise InputError("it is not a plain file")
        if about.st_size > MAX_BYTES:
            raise InputError(f"it is larger than {MAX_BYTES >> 20} MiB")
        return hashlib.file_digest(file, "sha256").digest()


class ImageSource(ABC):
    """Unopened images in a fixed order; `notes` are warnings for the user, `other_files` are counted only."""

    def __init__(self, title: str, notes: Iterable[str] = (), other_files: int = 0) -> None:
        self.title, self.notes, self.other_files = title, list(notes), other_files

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies the source among others."""

    @abstractmethod
    def __iter__(self) -> Iterator[ImageItem]: ...


class MapStyleSource(ImageSource):
    """A source with random access, as torch's map-style datasets have it."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> ImageItem: ...

    def __iter__(self) -> Iterator[ImageItem]:
        return (self[index] for index in range(len(self)))


class IterableSource(ImageSource):
    """A source that is read from front to back, and can be split among processes."""

    @property
    @abstractmethod
    def approximate_len(self) -> int:
        """About how many images there are, 0 if unknown."""

    @abstractmethod
    def shuffled(self, seed: int, epoch: int, rank: int, ranks: int) -> Iterator[ImageItem]:
        """Return one process's share of an epoch, in an order that the four numbers decide."""


# What data sets keep beside their images; counted, and never reported as damaged.
_ANNOTATIONS = {
    *(".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".toml"),
    *(".md", ".html", ".npy", ".npz", ".safetensors", ".parquet", ".db", ".ini", ".log", ".py"),
}
_OTHER_KINDS = (".tar", ".tgz", ".parquet", ".arrow")  # sources of their own
# In webdataset's names for what belongs to an image, such as "dog.seg.png" beside "dog.jpg".
_MAPS = {
    *("seg", "segm", "segmentation", "semantic", "instance", "panoptic", "mask", "masks", "matte"),
    *("depth", "disparity", "normals", "canny"),
}
# What systems and network storage put into folders: previews and rubbish, often with the names of images.
_SYSTEM = {
    *("@eadir", "@tmp", "@__thumb", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin"),
    *("__macosx", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "lost+found"),
}


def is_annotation(name: str) -> bool:
    """Whether a file belongs to an image and is none itself, by its name: a caption, a mask."""
    stem, suffix = os.path.splitext(name.lower())
    return suffix in _ANNOTATIONS or (bool(suffix) and os.path.splitext(stem)[1][1:] in _MAPS)


def is_passed_over(part: str) -> bool:
    """Whether a file or folder of this name is hidden, or the system's own (one part of a path)."""
    return part[:1] == "." or part.lower() in _SYSTEM or part.startswith("PaxHeader")


_PLAIN_FORMATS = ("JPEG", "PNG", "GIF", "TIFF", "BMP", "PPM")  # which every Pillow has
_BRANDS = (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypavif")  # whose readers are optional


def is_image(content: bytes) -> bool:
    """Whether bytes whose name tells nothing are an image, by the first of them."""
    if content[4:12] in _BRANDS or (content[:4], content[8:12]) == (b"RIFF", b"WEBP"):
        return True
    try:
        with Image.open(io.BytesIO(content), formats=_PLAIN_FORMATS):
            return True
    except Exception:  # whatever the readers raise
        return False


class FolderSource(MapStyleSource):
    """The files of a folder and its sub-folders, sorted; hidden ones and the system's own are passed over.

    Links to folders are followed, each real folder once, so a loop of links ends. One pass over the disk; after that
    only the names are kept, about a hundred bytes an image. InputError if it cannot be read or is empty.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self.root = root
        self._unreadable: list[str] = []
        self._visited: set[tuple[int, int]] = set()
        self._other_kinds: dict[str, str] = {}  # suffix of a table or of shards -> folder of the first
        self._names = list(self._walk(str(root), ""))
        if self._unreadable:
            folders = "1 folder" if len(self._unreadable) == 1 else f"{len(self._unreadable)} folders"
            self.notes.append(f"{folders} could not be read, as {printable(self._unreadable[0])}")
        if not self._names:
            hint = next((f"--data {pattern} reads them" for pattern in self._other_kinds.values()), None)
            raise InputError(f"there is no image in {printable(str(root))}", hint=hint)
        for pattern in self._other_kinds.values():
            self.notes.append(f"only loose images are read; --data {pattern} would read the others")

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> ImageItem:
        return ImageItem(name=self._names[index], image=self.root / self._names[index])

    @property
    def fingerprint(self) -> str:
        """Identifies the list of names; the content is not read here."""
        digest = hashlib.sha256()
        for name in self._names:
            digest.update(os.fsencode(name) + b"\0")
        return digest.hexdigest()[:32]

    def _walk(self, folder: str, inside: str) -> Iterator[str]:
        try:
            about = os.stat(folder)
            if (about.st_dev, about.st_ino) in self._visited:
                return
            self._visited.add((about.st_dev, about.st_ino))
            with os.scandir(folder) as entries:
                shown = (entry for entry in entries if not is_passed_over(entry.name))
                found = sorted(shown, key=lambda entry: entry.name)
        except OSError as error:
            if not inside:
                raise InputError(f"{printable(folder)} cannot be read: {error.strerror}") from error
            self._unreadable.append(inside)
            return
        for entry in found:
            name = f"{inside}{entry.name}"
            if _is(entry.is_dir):
                yield from self._walk(entry.path, f"{name}/")
            elif entry.name.lower().endswith(_OTHER_KINDS):
                suffix = entry.name[entry.name.rindex(".") :]
                self._other_kinds.setdefault(suffix, f"'{printable(folder)}/*{suffix}'")
                self.other_files += 1
            elif not _is(entry.is_file) or is_annotation(entry.name):
                self.other_files += 1  # also a dangling link, a FIFO, a socket
            else:
                yield name


def _is(kind: Callable[[], bool]) -> bool:
    """Ask an entry of a folder for its kind; the answer of a link to itself is an error."""
    with suppress(OSError):
        return kind()
    return False


class SequenceSource(MapStyleSource):
    """A Python sequence of images; InputError if it is empty."""

    def __init__(self, images: Sequence[Any]) -> None:
        if not len(images):
            raise InputError("there are no images to train on")
        super().__init__(f"{len(images)} images")
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> ImageItem:
        image = self._images[index]
        name = str(os.fspath(image)) if isinstance(image, str | os.PathLike) else f"image {index}"
        return ImageItem(name=name, image=image)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for item in self:
            try:
                digest.update(item.digest())
            except InputError as error:
                digest.update(error.message.encode())
        return digest.hexdigest()[:32]


class SinglePassSource(ImageSource):
    """A Python iterable that can be read once."""

    fingerprint = ""

    def __init__(self, images: Iterable[Any]) -> None:
        super().__init__("an iterable of images")
        self._images = images

    def __iter__(self) -> Iterator[ImageItem]:
        return (ImageItem(name=f"image {index}", image=image) for index, image in enumerate(self._images))


def find_source(data: str | os.PathLike[str] | Iterable[Any], *, offline: bool = False) -> ImageSource:
    """Return the images that `data` names.

    Args:
        data: a folder (sub-folders count); a tar shard, a pattern such as "dogs-{0000..0099}.tar", or a text file with
            one shard a line (`e4t[shards]`); a dataset on the hub "hf://owner/name@revision:split", saved in a folder,
            or a parquet file (`e4t[datasets]`); in Python also any iterable of images.
        offline: open no connection.

    Raises:
        UsageError: there is no such thing, or a package that reads it is missing.
        InputError: there is, and it cannot be used.
        WeightsUnavailable: it is not on this machine, and could not or must not be fetched.
    """
    from e4t_cli.datasets import shards, tables  # whose classes extend those of this module

    if not isinstance(data, str | os.PathLike):
        return SequenceSource(data) if isinstance(data, Sequence) else SinglePassSource(data)
    place, path, shown = os.fspath(data), Path(data), printable(os.fspath(data))
    if "\0" in place:
        raise UsageError(f"{shown} cannot be the name of a folder")
    if tables.is_arrow(place):
        return tables.ArrowSource(place, offline=offline)
    if os.path.isdir(path):
        return FolderSource(path)
    if shards.is_shards(place):
        return shards.ShardSource(shards.shard_paths(place), place, offline=offline)
    if os.path.isfile(path):
        raise UsageError(f"{shown} is one file", hint="--data takes a folder, shards (.tar) or a dataset")
    if "://" in place:
        hint = "shards end in .tar; a dataset on the hub is hf://owner/name"
        raise UsageError(f"{shown} is neither shards nor a dataset", hint=hint)
    raise UsageError(f"there is no folder {shown}")


def optional_package(name: str, extra: str) -> Any:
    """Import an optional package, or raise UsageError."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UsageError(f"{extra} need one more package", hint=f"pip install 'e4t[{extra}]'") from error
