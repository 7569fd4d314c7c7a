"""Holds a few images out of a source: they are in no batch, and show how a pre-training advances."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice

from e4t_cli.datasets.reader import ImageReader
from e4t_cli.datasets.sources import ImageItem, ImageSource, IterableSource, MapStyleSource
from e4t_cli.registry.domain import PreparedImage

MAX_HELD_OUT = 4  # images of a contact sheet


def hold_out(source: ImageSource, reader: ImageReader) -> tuple[ImageSource, list[PreparedImage]]:
    """Return the source without a few of its images, and these, prepared.

    At most one in ten, evenly spread over a map-style source, the first ones of an iterable one: always the same ones.
    """
    if isinstance(source, MapStyleSource):
        count = min(MAX_HELD_OUT, len(source) // 10)
        indices = [number * len(source) // count for number in range(count)]
        items = [source[index] for index in indices]
        rest: ImageSource = _WithoutIndices(source, indices)
    elif isinstance(source, IterableSource):
        items = list(islice(source, MAX_HELD_OUT))
        rest = _WithoutNames(source, {item.name for item in items})
    else:
        return source, []  # it can be read once only
    prepared = [reader.prepare(item) for item in items]
    return rest, [one for one in prepared if not isinstance(one, str)]


class _WithoutIndices(MapStyleSource):
    def __init__(self, source: MapStyleSource, without: list[int]) -> None:
        super().__init__(source.title, source.notes, source.other_files)
        self._source, self._without = source, without

    def __len__(self) -> int:
        return len(self._source) - len(self._without)

    def __getitem__(self, index: int) -> ImageItem:
        for left_out in self._without:  # sorted, and very few
            index += left_out <= index
        return self._source[index]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self._source.fingerprint} {self._without}".encode()).hexdigest()


class _WithoutNames(IterableSource):
    def __init__(self, source: IterableSource, without: set[str]) -> None:
        super().__init__(source.title, source.notes, source.other_files)
        self._source, self._without = source, without

    @property
    def approximate_len(self) -> int:
        return max(self._source.approximate_len - len(self._without), 0)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self._source.fingerprint} {sorted(self._without)}".encode()).hexdigest()

    def __iter__(self) -> Iterator[ImageItem]:
        return (item for item in self._source if item.name not in self._without)

    def shuffled(self, seed: int, epoch: int, rank: int, ranks: int) -> Iterator[ImageItem]:
        items = self._source.shuffled(seed, epoch, rank, ranks)
        return (item for item in items if item.name not in self._without)
