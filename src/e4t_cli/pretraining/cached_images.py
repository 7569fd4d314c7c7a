"""What pre-training reads from the cache: a source's pictures, row by row from mapped files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy
from torch import Tensor

from .chunks import Chunk, joined, mapped_rows
from .encoding import EncodedRows, epoch_indices

OPEN_AT_ONCE = 256
"""Chunks that stay mapped: what of the files is in memory is the system's to take back."""


class CachedImages:
    """A source's pictures as training sees them, read row by row from memory-mapped chunks.

    Epochs walk through the whole source; where a picture could not be used, the next usable one
    stands in for it, so that what all other samples see does not depend on it.

    Args:
        chunks: all of the source, in its order; equally many pictures in each but the last.
    """

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._size = len(chunks[0].good)
        self._paths = [chunk.path for chunk in chunks]
        good = numpy.concatenate([chunk.good.numpy() for chunk in chunks])
        usable = numpy.flatnonzero(good)
        self._usable = len(usable)
        later = numpy.searchsorted(usable, numpy.arange(len(good)))
        self._stand_in = usable[later % len(usable)]
        self._count = len(good)
        names = "\n".join(path.name for path in self._paths)
        self.fingerprint = hashlib.sha256(names.encode()).hexdigest()[:32]
        self._open = lru_cache(maxsize=OPEN_AT_ONCE)(mapped_rows)

    def __len__(self) -> int:
        return self._usable

    def rows(self, *, seed: int, step: int, positions: range, batch_size: int) -> EncodedRows:
        """Walk through a new order of all pictures in each epoch (see `TrainingData`)."""
        index = epoch_indices(seed, step, positions, batch_size, self._count)
        return joined(self._one(int(place)) for place in self._stand_in[index.numpy()])

    def _one(self, place: int) -> dict[str, Tensor]:
        number, row = divmod(place, self._size)
        rows = self._open(self._paths[number])
        return {name: values[row : row + 1] for name, values in rows.items()}
