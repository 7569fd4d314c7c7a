"""Training data that is encoded on the fly: for one pass over more than a disk should hold.

As with the cache, rows are functions of seed, step and position, and an image that cannot be used is replaced by the
next one that can, which changes nothing for the others. The next step's images are opened while this one trains.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from e4t_cli.datasets.reader import ImageReader
from e4t_cli.datasets.sources import ImageItem, IterableSource, MapStyleSource
from e4t_cli.errors import InputError
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.pretraining.batches import DistributedContext
from e4t_cli.pretraining.encoded_images import EncodedRows, encode_images, epoch_indices
from e4t_cli.registry.domain import PreparedImage

MAX_FAILURES = 1000
"""Unusable images in a row after which a stream is given up."""


class _OnTheFly:
    """Threads that open images, and what is common to both kinds of source."""

    def __init__(self, model: TextToImageModel, reader: ImageReader, *fingerprints: str) -> None:
        self.model, self.reader = model, reader
        self._pool = ThreadPoolExecutor(reader.threads, thread_name_prefix="e4t-images")
        self.fingerprint = hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()[:32]

    def close(self) -> None:
        """End the threads and write the log of images that were left out."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.reader.write_log()


class OnTheFlyDataset(_OnTheFly):
    """A map-style source whose images are opened and encoded in each step."""

    def __init__(self, model: TextToImageModel, source: MapStyleSource, reader: ImageReader) -> None:
        super().__init__(model, reader, source.fingerprint, reader.key)
        self._source = source
        self._bad: set[int] = set()
        self._ahead: dict[tuple[int, int, int], Future[PreparedImage]] = {}

    def __len__(self) -> int:
        return len(self._source) - len(self._bad)

    def rows(self, *, seed: int, step: int, positions: range, batch_size: int) -> EncodedRows:
        """Visit all images once an epoch, in a new order (see `TrainingData`)."""
        self._submit(seed, step, positions, batch_size)
        prepared = [self._ahead.pop((seed, step, position)) for position in positions]
        self._ahead = {key: one for key, one in self._ahead.items() if key[1] >= step}
        self._submit(seed, step + 1, positions, batch_size)
        return encode_images(self.model, [one.result() for one in prepared])

    def _submit(self, seed: int, step: int, positions: range, batch_size: int) -> None:
        indices = epoch_indices(seed, step, positions, batch_size, len(self._source)).tolist()
        for position, index in zip(positions, indices, strict=True):
            if (seed, step, position) not in self._ahead:
                self._ahead[seed, step, position] = self._pool.submit(self._usable, index)

    def _usable(self, index: int) -> PreparedImage:
        count = len(self._source)
        for candidate in range(index, index + count):
            if candidate % count in self._bad:
                continue
            found = self.reader.prepare(self._source[candidate % count])
            if not isinstance(found, str):
                return found
            self._bad.add(candidate % count)
        raise self.reader.empty_error()


class StreamingDataset(_OnTheFly):
    """An iterable source: every process reads its own share, from front to back, epoch by epoch.

    A resumed run skips what it has used without opening it. When an earlier position than before
    is requested, the stream starts again.
    """

    def __init__(
        self,
        model: TextToImageModel,
        source: IterableSource,
        reader: ImageReader,
        processes: DistributedContext | None = None,
    ) -> None:
        self._processes = processes or DistributedContext()
        super().__init__(model, reader, source.fingerprint, reader.key, str(self._processes.count))
        self._source = source
        self._window: deque[Future[PreparedImage | str]] = deque()
        self._first, self._seed = 0, -1  # position of the window's first item, and of which run
        self._items: Iterator[ImageItem] = iter(())

    def __len__(self) -> int:
        return self._source.approximate_len

    def rows(self, *, seed: int, step: int, positions: range, batch_size: int) -> EncodedRows:
        """Read on to the samples of these positions (see `TrainingData`)."""
        share = batch_size // self._processes.count
        self._seek(seed, step * share + positions.start - self._processes.rank * share)
        prepared = [self._usable(place) for place in range(len(positions))]
        self._fill(2 * len(positions))
        return encode_images(self.model, prepared)

    def _seek(self, seed: int, first: int) -> None:
        """Make the window begin at a position of the stream."""
        if seed != self._seed or first < self._first:
            self._window.clear()
            self._items, self._first, self._seed = self._endless(seed), 0, seed
        while self._first < first:
            if self._window:
                self._window.popleft()
            else:
                next(self._items)
            self._first += 1

    def _fill(self, size: int) -> None:
        while len(self._window) < size:
            self._window.append(self._pool.submit(self.reader.prepare, next(self._items)))

    def _usable(self, place: int) -> PreparedImage:
        for later in range(place, place + MAX_FAILURES):
            self._fill(later + 1)
            found = self._window[later].result()
            if not isinstance(found, str):
                return found
        raise self.reader.empty_error()

    def _endless(self, seed: int) -> Iterator[ImageItem]:
        processes, epoch = self._processes, 0
        while True:
            empty = True
            for item in self._source.shuffled(seed, epoch, processes.rank, processes.count):
                empty = False
                yield item
            if empty:
                raise InputError(f"there is no image in {self._source.title}")
            epoch += 1
