"""Encoded training images (VAE latents, [CLS] features): all in memory, or encoded when a step needs them.

Neither changes in training. Rows are functions of seed, step and position. An image that cannot be used is replaced by
the next one that can, which changes nothing for the others.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol, Self

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from e4t_cli.datasets.reader import SIGNATURE, ImageReader
from e4t_cli.datasets.sources import ImageItem, IterableSource, MapStyleSource
from e4t_cli.errors import InputError
from e4t_cli.files import write_atomically
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.precision import PrecisionPolicy, half_precision
from e4t_cli.nn.randomness import choose, epoch_order, uniforms
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.registry.domain import PreparedImage
from e4t_cli.training.loss import latent_mask

MAX_FAILURES = 1000  # unusable images in a row after which a stream is given up


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedRows:
    """Encoded images, one row a sample; on any device, in any dtype."""

    means: Tensor  # of the VAE's posterior (rows, channels, height, width)
    logvars: Tensor
    image_features: Tensor  # [CLS] of every second layer (rows, layers, width)
    masks: Tensor | None = None  # soft weights at latent size (rows, height, width)

    def __len__(self) -> int:
        return len(self.means)


class TrainingData(Protocol):
    """The samples of a training run.

    `rows` is a pure function of its arguments, which makes resumed runs exact. A run reads its steps in order, and
    within a step its micro-batches in order.
    """

    @property
    def fingerprint(self) -> str:
        """Identifies content and settings, so that a run is not resumed on other images."""

    def __len__(self) -> int:
        """How many images there are, for the domain's manifest."""

    def rows(self, *, seed: int, step: int, positions: range, batch_size: int) -> EncodedRows:
        """Return the samples at some positions of one step's batch.

        Args:
            seed: of the run.
            step: steps done before this one, 0 …
            positions: which samples of the batch: one process's micro-batch, without gaps.
            batch_size: of the whole batch, over all processes and micro-batches.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedImages(EncodedRows):
    """A domain's encoded images in memory.

    Args:
        encoder_index: for each image the indices of images of the same concept (count, k), one of which is the
            encoder's input in its place. Departure: None, the paper's way, gives it the very image that it has to
            reproduce, background and all.
    """

    encoder_index: Tensor | None = None

    def rows(self, *, seed: int, step: int, positions: range, batch_size: int) -> EncodedRows:
        """Visit all images once an epoch, in a new order (see `TrainingData`)."""
        index = shown = epoch_indices(seed, step, positions, batch_size, len(self))
        if self.encoder_index is not None:
            numbers = uniforms(seed, step, batch_size)[positions.start : positions.stop, 2]
            shown = self.encoder_index[index, choose(numbers, self.encoder_index.shape[1])].long()
        masks = None if self.masks is None else self.masks[index]
        features = self.image_features[shown]
        return EncodedRows(means=self.means[index], logvars=self.logvars[index], image_features=features, masks=masks)

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file."""
        tensors = {key: value.contiguous() for key, value in vars(self).items() if value is not None}
        write_atomically(path, save(tensors))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote."""
        return cls(**load_file(path))

    @property
    def fingerprint(self) -> str:
        """Identifies the content (see `TrainingData`)."""
        digest = hashlib.sha256()
        for key, value in vars(self).items():
            if value is not None:
                digest.update(f"{key}{tuple(value.shape)}".encode())
                digest.update(value.contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()[:32]


def epoch_indices(seed: int, step: int, positions: range, batch_size: int, count: int) -> Tensor:
    """Return which of `count` images are at some positions of one step's batch, (positions,).

    Each epoch visits every image once, in an order of its own; a batch may span two epochs.
    """
    samples = [step * batch_size + position for position in positions]
    return torch.stack([_order(seed, one // count, count)[one % count] for one in samples])


_order = lru_cache(maxsize=4)(epoch_order)


def encode_images(
    model: TextToImageModel,
    images: Iterable[PreparedImage],
    *,
    batch_size: int | None = None,
    total: int = 0,
    autocast: bool | None = False,
    on_progress: ProgressCallback | None = None,
) -> EncodedImages:
    """Encode every image once: latents, [CLS] features, masks; in float16 on the CPU. InputError if there are none.

    Args:
        images: masks are kept if every image has one.
        batch_size: None for as many as a small GPU holds.
        total: how many there are, for progress reports.
        autocast: encode in bfloat16, which is less exact than what is stored; None where the hardware multiplies it.
    """
    precision = PrecisionPolicy.resolve(model.device, model.dtype, autocast, loss_scaling=False)
    # The VAE's first layers are the largest tensors of all: about eight images of 512 pixels.
    batch_size = batch_size or max(1, min(32, 8 * 512**2 // model.resolution**2))
    parts: list[dict[str, Tensor]] = []
    source, count = iter(images), 0
    while batch := list(itertools.islice(source, batch_size)):
        count += len(batch)
        pixels = model.pixels([one.image for one in batch])
        with half_precision(model.device, precision.half):
            posterior, features = model.posterior(pixels), model.image_features(pixels)
        part = {"means": posterior.mean, "logvars": posterior.logvar, "image_features": features}
        masks = [one.mask for one in batch if one.mask is not None]
        if len(masks) == len(batch):
            part["masks"] = latent_mask(model.masks(masks), model.latent_shape[1:])
        parts.append({name: value.half().cpu() for name, value in part.items()})
        if on_progress:
            on_progress(Progress(stage="encode", done=count, total=total))
    if not parts:
        raise InputError("there are no images to train on")
    complete = [name for name in parts[0] if all(name in part for part in parts)]
    return EncodedImages(**{name: torch.cat([part[name] for part in parts]) for name in complete})


def bytes_per_image(model: TextToImageModel, *, mask: bool) -> int:
    """Return the size of an encoded image in the cache."""
    (channels, height, width), tower = model.latent_shape, model.image_tower
    values = 2 * channels * height * width + len(tower.indices) * int(tower.width)
    return 2 * (values + (height * width if mask else 0)) + 33 + SIGNATURE


class _OnTheFly:
    """Threads that open the next step's images while this one trains, for more images than a disk should hold."""

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
        self.left_out: set[int] = set()  # indices of images that cannot be used
        self._ahead: dict[tuple[int, int, int], Future[PreparedImage]] = {}

    def __len__(self) -> int:
        return len(self._source) - len(self.left_out)

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
        for candidate in (later % count for later in range(index, index + count)):
            if candidate not in self.left_out:
                found = self.reader.prepare(self._source[candidate])
                if not isinstance(found, str):
                    return found
                self.left_out.add(candidate)
        raise self.reader.empty_error()


class StreamingDataset(_OnTheFly):
    """An iterable source: process `rank` of `ranks` reads its own share, from front to back, epoch by epoch.

    A resumed run skips what it has used without opening it. When an earlier position than before is requested, the
    stream starts again.
    """

    def __init__(
        self, model: TextToImageModel, source: IterableSource, reader: ImageReader, rank: int = 0, ranks: int = 1
    ) -> None:
        super().__init__(model, reader, source.fingerprint, reader.key, str(ranks))
        self._source, self._rank, self._ranks = source, rank, ranks
        self._window: deque[Future[PreparedImage | str]] = deque()
        self._first, self._seed = 0, -1  # position of the window's first item, and of which run
        self._items: Iterator[ImageItem] = iter(())

    def __len__(self) -> int:
        return self._source.approximate_len

    def rows(self, *, seed: int, step: int, positions: range, batch_size: int) -> EncodedRows:
        """Read on to the samples of these positions (see `TrainingData`)."""
        share = batch_size // self._ranks
        self._seek(seed, (step - self._rank) * share + positions.start)
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
        for epoch in itertools.count():
            item: ImageItem | None = None
            for item in self._source.shuffled(seed, epoch, self._rank, self._ranks):
                yield item
            if item is None:
                raise InputError(f"there is no image in {self._source.title}")
