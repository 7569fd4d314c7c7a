"""Training data that is looked at when it is needed: one pass over more than a disk should hold.

Rows are functions of their place, as in `encoding`: what stands at a step and a position follows
from the seed, and a picture that cannot be used is replaced by the next one that can, which
changes nothing for the others. The next step's pictures are opened while this one trains.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from e4t_cli.datasets.folder import ImageItem
from e4t_cli.datasets.reader import Preparation
from e4t_cli.datasets.sources import Listed, Streamed
from e4t_cli.errors import InputError
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.pretraining.batches import DistributedContext
from e4t_cli.pretraining.encoded_images import EncodedRows, epoch_indices, look
from e4t_cli.registry.domain import PreparedImage

MAX_FAILURES = 1000
"""Pictures in a row that cannot be used before a stream is given up."""


class OnTheFlyImages:
    """A listed source, its pictures opened and looked at in each step.

    Args:
        source: gives any of its pictures at any time.
        preparation: opens them.
    """

    def __init__(self, model: TextToImageModel, source: Listed, preparation: Preparation) -> None:
        self._model, self._source, self._preparation = model, source, preparation
        self._bad: set[int] = set()
        self._pool = ThreadPoolExecutor(preparation.threads, thread_name_prefix="e4t-pictures")
        self._ahead: dict[tuple[int, int, int], Future[PreparedImage]] = {}
        self.fingerprint = _hash(source.fingerprint, preparation.key)

    def __len__(self) -> int:
        return len(self._source) - len(self._bad)

    def rows(self, *, seed: int, step: int, positions: range, batch_size: int) -> EncodedRows:
        """Walk through a new order of all pictures in each epoch (see `TrainingData`)."""
        self._prepare(seed, step, positions, batch_size)
        prepared = [self._ahead.pop((seed, step, position)) for position in positions]
        self._ahead = {place: one for place, one in self._ahead.items() if place[1] >= step}
        self._prepare(seed, step + 1, positions, batch_size)
        return look(self._model, [one.result() for one in prepared])

    def close(self) -> None:
        """End the threads and write the log of what was left out."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._preparation.write_log()

    def _prepare(self, seed: int, step: int, positions: range, batch_size: int) -> None:
        index = epoch_indices(seed, step, positions, batch_size, len(self._source)).tolist()
        for position, one in zip(positions, index, strict=True):
            if (seed, step, position) not in self._ahead:
                self._ahead[seed, step, position] = self._pool.submit(self._usable, one)

    def _usable(self, index: int) -> PreparedImage:
        count = len(self._source)
        for place in range(index, index + count):
            if place % count in self._bad:
                continue
            found = self._preparation.prepare(self._source[place % count])
            if not isinstance(found, str):
                return found
            self._bad.add(place % count)
        raise self._preparation.nothing()


class OnTheFlyStream:
    """A streamed source: every process reads its own share, from front to back, epoch by epoch.

    A resumed run reads past what it has seen without opening it. Asked for an earlier place than
    before, the stream starts again.

    Args:
        source: read in an order that seed, epoch and process decide.
        preparation: opens its pictures.
        processes: among which the shards are dealt out.
    """

    def __init__(
        self,
        model: TextToImageModel,
        source: Streamed,
        preparation: Preparation,
        processes: DistributedContext | None = None,
    ) -> None:
        self._model, self._source, self._preparation = model, source, preparation
        self._processes = processes or DistributedContext()
        self._pool = ThreadPoolExecutor(preparation.threads, thread_name_prefix="e4t-pictures")
        self._window: deque[Future[PreparedImage | str]] = deque()
        self._first, self._seed = 0, -1  # the place of the window's first item, and of which run
        self._items: Iterator[ImageItem] = iter(())
        self.fingerprint = _hash(source.fingerprint, preparation.key, str(self._processes.count))

    def __len__(self) -> int:
        return self._source.about

    def rows(self, *, seed: int, step: int, positions: range, batch_size: int) -> EncodedRows:
        """Read on to the samples of these positions (see `TrainingData`)."""
        share = batch_size // self._processes.count
        first = step * share + positions.start - self._processes.rank * share
        self._seek(seed, first)
        prepared = [self._usable(place) for place in range(len(positions))]
        self._fill(2 * len(positions))
        return look(self._model, prepared)

    def close(self) -> None:
        """End the threads and write the log of what was left out."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._preparation.write_log()

    def _seek(self, seed: int, first: int) -> None:
        """Make the window begin at a place of the stream."""
        if seed != self._seed or first < self._first:
            self._window.clear()
            self._items, self._first, self._seed = self._endless(seed), 0, seed
        while self._window and self._first < first:
            self._window.popleft()
            self._first += 1
        while self._first < first:
            next(self._items)
            self._first += 1

    def _fill(self, size: int) -> None:
        while len(self._window) < size:
            self._window.append(self._pool.submit(self._preparation.prepare, next(self._items)))

    def _usable(self, place: int) -> PreparedImage:
        for later in range(place, place + MAX_FAILURES):
            self._fill(later + 1)
            found = self._window[later].result()
            if not isinstance(found, str):
                return found
        raise self._preparation.nothing()

    def _endless(self, seed: int) -> Iterator[ImageItem]:
        epoch = 0
        while True:
            empty = True
            for item in self._source.shuffled(
                seed, epoch, self._processes.rank, self._processes.count
            ):
                empty = False
                yield item
            if empty:
                raise InputError(f"there is no picture in {self._source.title}")
            epoch += 1


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
