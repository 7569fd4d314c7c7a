"""A few pictures that training never sees, to be drawn from while it goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from e4t_cli.domain import PreparedImage

from .finding import Listed, Source, Streamed
from .items import Item
from .preparation import Preparation

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

    def __getitem__(self, index: int) -> Item:
        for place in self._without:  # sorted, and very few
            index += place <= index
        return self._source[index]

    def __iter__(self) -> Iterator[Item]:
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

    def __iter__(self) -> Iterator[Item]:
        return (item for item in self._source if item.name not in self._without)

    def shuffled(self, seed: int, epoch: int, rank: int, ranks: int) -> Iterator[Item]:
        items = self._source.shuffled(seed, epoch, rank, ranks)
        return (item for item in items if item.name not in self._without)
