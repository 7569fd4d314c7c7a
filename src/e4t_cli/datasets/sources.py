"""From what the user wrote after ``--data`` to a source.

A few pictures that training never sees, to be drawn from while it goes on.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from e4t_cli.datasets.archives import SUFFIXES, Shards, Table, is_table, shard_places
from e4t_cli.datasets.folder import Folder, ImageItem
from e4t_cli.datasets.reader import Preparation
from e4t_cli.errors import InputError, UsageError, printable
from e4t_cli.registry.domain import PreparedImage


class Source(Protocol):
    """Pictures in an order of their own.

    `title` names it for the user, `notes` are sentences for them, `beside` counts files that are
    no pictures, `fingerprint` tells it from other sources.
    """

    title: str
    notes: list[str]
    beside: int

    @property
    def fingerprint(self) -> str: ...

    def __iter__(self) -> Iterator[ImageItem]: ...


@runtime_checkable
class Listed(Source, Protocol):
    """A source that gives any of its pictures at any time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ImageItem: ...


@runtime_checkable
class Streamed(Source, Protocol):
    """A source that is read from front to back, and can deal itself out to processes."""

    @property
    def about(self) -> int:
        """About how many pictures there are, 0 if nobody knows."""
        ...

    def shuffled(self, seed: int, epoch: int, rank: int, ranks: int) -> Iterator[ImageItem]: ...


class Pictures:
    """A Python sequence of pictures.

    Raises:
        InputError: it is empty.
    """

    def __init__(self, pictures: Sequence[Any]) -> None:
        if not len(pictures):
            raise InputError("there are no pictures to train on")
        self._pictures = pictures
        self.title, self.beside = f"{len(pictures)} pictures", 0
        self.notes: list[str] = []

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> ImageItem:
        picture = self._pictures[index]
        name = os.fspath(picture) if isinstance(picture, str | os.PathLike) else None
        return ImageItem(name=f"picture {index}" if name is None else str(name), picture=picture)

    def __iter__(self) -> Iterator[ImageItem]:
        return (self[index] for index in range(len(self)))

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for item in self:
            try:
                digest.update(item.digest())
            except InputError as error:
                digest.update(error.message.encode())
        return digest.hexdigest()[:32]


class Generated:
    """A Python iterable that can be read once."""

    def __init__(self, pictures: Iterable[Any]) -> None:
        self._pictures = pictures
        self.title, self.beside = "an iterable of pictures", 0
        self.notes: list[str] = []
        self.fingerprint = ""

    def __iter__(self) -> Iterator[ImageItem]:
        for index, picture in enumerate(self._pictures):
            yield ImageItem(name=f"picture {index}", picture=picture)


def find_source(data: str | os.PathLike[str] | Iterable[Any]) -> Source:
    """Return the pictures that `data` means.

    Args:
        data: a folder (sub-folders count); a tar shard, a pattern such as "dogs-{0000..0099}.tar",
            or a text file with one shard a line (`e4t[shards]`); a dataset on the hub
            "hf://owner/name@revision:split", saved in a folder, or a parquet file
            (`e4t[datasets]`); in Python also any iterable of pictures.

    Raises:
        UsageError: there is no such thing, or a package that reads it is missing.
        InputError: there is, and it cannot be used.
    """
    if not isinstance(data, str | os.PathLike):
        return Pictures(data) if isinstance(data, Sequence) else Generated(data)
    place = os.fspath(data)
    shown = printable(place)
    if "\0" in place:
        raise UsageError(f"{shown} cannot be the name of a folder")
    if is_table(place):
        return Table(place)
    path = Path(place)
    if path.is_dir():
        return Folder(path)
    lists = (".txt", ".list", ".urls")
    if place.endswith(SUFFIXES) or (path.is_file() and place.endswith(lists)):
        return Shards(shard_places(place), place)
    if path.is_file():
        raise UsageError(
            f"{shown} is one file", hint="--data takes a folder, shards (.tar) or a dataset"
        )
    if "://" in place:
        raise UsageError(
            f"{shown} is neither shards nor a dataset",
            hint="shards end in .tar; a dataset on the hub is hf://owner/name",
        )
    raise UsageError(f"there is no folder {shown}")


MOST = 4
"""Pictures of a contact sheet."""


def hold_out(source: Source, preparation: Preparation) -> tuple[Source, list[PreparedImage]]:
    """Return the source without a few of its pictures, and these, prepared.

    At most one in ten is held out, evenly spread over a listed source, the first ones of a
    stream: the same ones whenever the same source is given.
    """
    if isinstance(source, Listed):
        count = min(MOST, len(source) // 10)
        places = [place * len(source) // count for place in range(count)]
        items = [source[place] for place in places]
        rest: Source = _Rest(source, places)
    elif isinstance(source, Streamed):
        items = [item for item, _ in zip(source, range(MOST), strict=False)]
        rest = _RestOfStream(source, {item.name for item in items})
    else:
        return source, []  # it can be read once only
    prepared = [preparation.prepare(item) for item in items]
    return rest, [one for one in prepared if not isinstance(one, str)]


class _Rest:
    """A listed source without some places."""

    def __init__(self, source: Listed, without: list[int]) -> None:
        self._source, self._without = source, without
        self.title, self.notes, self.beside = source.title, source.notes, source.beside

    def __len__(self) -> int:
        return len(self._source) - len(self._without)

    def __getitem__(self, index: int) -> ImageItem:
        for place in self._without:  # sorted, and very few
            index += place <= index
        return self._source[index]

    def __iter__(self) -> Iterator[ImageItem]:
        return (self[index] for index in range(len(self)))

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self._source.fingerprint} {self._without}".encode()).hexdigest()


class _RestOfStream:
    """A stream without some names."""

    def __init__(self, source: Streamed, without: set[str]) -> None:
        self._source, self._without = source, without
        self.title, self.notes, self.beside = source.title, source.notes, source.beside

    @property
    def about(self) -> int:
        return max(self._source.about - len(self._without), 0)

    @property
    def fingerprint(self) -> str:
        names = sorted(self._without)
        return hashlib.sha256(f"{self._source.fingerprint} {names}".encode()).hexdigest()

    def __iter__(self) -> Iterator[ImageItem]:
        return (item for item in self._source if item.name not in self._without)

    def shuffled(self, seed: int, epoch: int, rank: int, ranks: int) -> Iterator[ImageItem]:
        items = self._source.shuffled(seed, epoch, rank, ranks)
        return (item for item in items if item.name not in self._without)
