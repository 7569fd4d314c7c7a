"""The cache of encoded images: checksummed files, each whole or absent, memory-mapped in training.

    <cache>/pretraining/<settings>/<content>.safetensors    up to 256 images: latents, features
    <cache>/pretraining/<settings>/stamps/<stamps>          the content that files with these had
    <cache>/pretraining/<settings>/settings.json            what the first name is a hash of

The first name is a hash of everything that decides how an image is encoded (base, resolution, dtype, preparation), the
second one of the images' bytes. So a chunk is valid whichever run wrote it: another run, another folder with the same
images, a process that was faster.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from e4t_cli.datasets.reader import MISSING, ImageReader, signature
from e4t_cli.datasets.sources import ImageItem, ImageSource, SinglePassSource
from e4t_cli.errors import InputError, IntegrityError
from e4t_cli.files import file_error, write_atomically
from e4t_cli.hub.architecture import read_config
from e4t_cli.hub.paths import matches, user_cache
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.pretraining.batches import DistributedContext
from e4t_cli.pretraining.encoded_images import EncodedRows, encode_images, epoch_indices
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.registry.domain import PreparedImage

CHUNK_FORMAT = "1"
SETTINGS = "settings.json"
CHUNK = 256  # images in a file: what an interrupted encoding can lose
OPEN_AT_ONCE = 256  # chunks that stay mapped; the operating system decides what of them is in memory
_ROWS = ("means", "logvars", "image_features", "masks")


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """A chunk without its rows."""

    path: Path
    good: Tensor  # (images,), bool: which can be used
    bad: dict[int, str]  # index → reason, of the others
    digests: Tensor  # (images, 32), of each image's bytes
    signatures: Tensor  # (images, SIGNATURE), for finding near duplicates


def write_chunk(
    path: Path, rows: EncodedRows, *, bad: dict[int, str], digests: list[bytes], signatures: list[bytes]
) -> None:
    """Write a chunk with its checksum, unless another process was first; `rows` include those of bad images."""
    tensors = {name: value.contiguous() for name, value in vars(rows).items() if value is not None}
    tensors["good"] = torch.tensor([index not in bad for index in range(len(digests))]).byte()
    for name, column in (("digests", digests), ("signatures", signatures)):
        tensors[name] = torch.frombuffer(bytearray(b"".join(column)), dtype=torch.uint8).view(len(column), -1)
    plain = save(tensors)
    data = memoryview(plain)[8 + int.from_bytes(plain[:8], "little") :]
    about = {"format": CHUNK_FORMAT, "bad": json.dumps(bad), "sha256": hashlib.sha256(data).hexdigest()}
    _write(path, save(tensors, about), overwrite=False)


def read_chunk(path: Path, count: int) -> Chunk:
    """Return a chunk of `count` images; FileNotFoundError if there is none, ValueError if it is damaged or another."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 2**24:
                raise ValueError("its header is too long")
            metadata = json.loads(file.read(length))["__metadata__"]
            if hashlib.file_digest(file, "sha256").hexdigest() != metadata["sha256"]:
                raise ValueError("its checksum is another")
        with safe_open(path, framework="pt") as tensors:
            good = tensors.get_tensor("good").bool()
            digests, signatures = tensors.get_tensor("digests"), tensors.get_tensor("signatures")
        bad = {int(index): str(why) for index, why in json.loads(metadata["bad"]).items()}
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error
    if len(good) != count or metadata.get("format") != CHUNK_FORMAT:
        raise ValueError("it is another chunk")
    return Chunk(path=path, good=good, bad=bad, digests=digests, signatures=signatures)


def _map_rows(path: Path) -> dict[str, Any]:
    """Return the rows of a chunk by name, read from the disk where they are indexed."""
    try:
        file: Any = safe_open(path, framework="pt")
        return {name: file.get_slice(name) for name in file.keys() if name in _ROWS}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        message = f"the cache of encoded images in {path.parent} changed during the run"
        hint = "the same command makes it again and resumes from the last checkpoint"
        raise IntegrityError(message, hint=hint) from error


def _write(path: Path, data: bytes, *, overwrite: bool = True) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data, overwrite=overwrite)
    except FileExistsError:  # another process was first, with the same content
        pass
    except OSError as error:
        hint = "E4T_CACHE_DIR moves it, --cache off trains without it"
        kind = type(file_error(error, path))
        raise kind(f"the cache in {path.parent} cannot be written: {error.strerror}", hint=hint) from error


class CachedDataset:
    """A source's encoded images, read row by row from memory-mapped chunks.

    An image that could not be used is replaced by the next usable one, which changes nothing for the others. `chunks`
    are all of the source, in its order, with equally many images in each but the last.
    """

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._size, self._paths = len(chunks[0].good), [chunk.path for chunk in chunks]
        good = numpy.concatenate([chunk.good.numpy() for chunk in chunks])
        usable = numpy.flatnonzero(good)
        self._count, self._usable = len(good), len(usable)
        later = numpy.searchsorted(usable, numpy.arange(len(good)))
        self._stand_in = usable[later % len(usable)]
        self.fingerprint = hashlib.sha256("\n".join(path.name for path in self._paths).encode()).hexdigest()[:32]
        self._open = lru_cache(maxsize=OPEN_AT_ONCE)(_map_rows)

    def __len__(self) -> int:
        return self._usable

    def rows(self, *, seed: int, step: int, positions: range, batch_size: int) -> EncodedRows:
        """Visit all images once an epoch, in a new order (see `TrainingData`)."""
        indices = epoch_indices(seed, step, positions, batch_size, self._count)
        columns: dict[str, list[Tensor]] = {}
        for index in self._stand_in[indices.numpy()].tolist():
            chunk, row = divmod(index, self._size)
            for name, values in self._open(self._paths[chunk]).items():
                columns.setdefault(name, []).append(values[row : row + 1])
        return EncodedRows(**{name: torch.cat(rows) for name, rows in columns.items()})


class EncodingCache:
    """The chunks of one base, dtype and preparation."""

    def __init__(self, model: TextToImageModel, reader: ImageReader) -> None:
        self.model, self.reader = model, reader
        settings = {"format": CHUNK_FORMAT, "base": model.fingerprint, "resolution": model.resolution}
        settings |= {"dtype": str(model.dtype), "preparation": reader.key}
        self._settings: dict[str, Any] = {**settings, "networks": reader.networks}
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
        self.folder = user_cache() / "pretraining" / name
        self.encoded = self.repaired = 0
        self._changed: dict[str, None] = {}  # why images that are in another folder are encoded again
        self._report: ProgressCallback = lambda event: None
        self._total = 0

    def encode(
        self,
        source: ImageSource,
        *,
        total: int = 0,
        processes: DistributedContext | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> CachedDataset:
        """Return the source's images, after encoding those that are not in the cache.

        Args:
            total: how many there are, for progress; 0 if unknown.
            processes: several of them share the work, each a part of the chunks.

        Raises:
            InputError: no image can be used, or one cannot and the reader is strict.
            ResourceError: the disk is full.
        """
        self._report, self._total, processes = on_progress or self._report, total, processes or DistributedContext()
        known: dict[int, Chunk] = {}
        if processes.count > 1 and not isinstance(source, SinglePassSource):
            for number, items in _chunks(source):
                if number % processes.count == processes.rank:
                    known[number] = self._chunk(items, number)
            processes.any(False)  # a barrier; chunks on another machine's disk are encoded below
        for number, items in _chunks(source):
            if number not in known:
                known[number] = self._chunk(items, number)
            self._count(known[number], items)
        chunks = [known[number] for number in sorted(known)]
        self.reader.write_log()
        count = sum(len(chunk.good) for chunk in chunks)
        usable = sum(int(chunk.good.sum()) for chunk in chunks)
        if not usable:
            raise self.reader.empty_error()
        self._report(Progress(stage="encode", done=count, total=count))
        repaired = [f"{self.repaired} damaged files of the cache were made again"] if self.repaired else []
        again = [f"images that were encoded before were prepared again: {reason}" for reason in self._changed]
        for note in self.reader.notes(usable) + repaired + again:
            self._report(Progress(stage="encode", note=note))
        return CachedDataset(chunks)

    def _chunk(self, items: list[ImageItem], number: int) -> Chunk:
        """Return a chunk: found by its files' stamps, by their content, or encoded."""
        stamps = [item.stamp() or "" for item in items]
        stamped = hashlib.sha256("\n".join(stamps).encode("utf-8", "surrogateescape"))
        note = self.folder / "stamps" / stamped.hexdigest()
        content = _read_note(note) if all(stamps) else None
        found = self._find(content, len(items)) if content else None
        if found is None:
            digests, unread = _digests(items)
            content = hashlib.sha256(b"".join(digests)).hexdigest()
            found = self._find(content, len(items))
            if found is None:
                found = self._make(content, items, unread, digests, number * CHUNK)
                self.encoded += len(items)
            if all(stamps) and not unread:  # a disk that failed once may not fail again
                _write(note, content.encode())
        self._report(Progress(stage="encode", done=number * CHUNK + len(items), total=self._total))
        return found

    def _path(self, content: str) -> Path:
        return self.folder / f"{content}.safetensors"

    def _find(self, content: str, count: int) -> Chunk | None:
        """Return a chunk if it is there and whole; a damaged one is removed."""
        try:
            return read_chunk(self._path(content), count)
        except FileNotFoundError:
            pass
        except ValueError:
            self._path(content).unlink(missing_ok=True)
            self.repaired += 1
        return None

    def _make(
        self, content: str, items: list[ImageItem], unread: dict[int, str], digests: list[bytes], first: int
    ) -> Chunk:
        """Encode a chunk's images and write them."""
        bad, signatures = dict(unread), []
        # A blank stands for a bad image, so that the others go through the model in the same batches as if it were a
        # good one, and come out in the same bits.
        blank = self.reader.blank()

        def images() -> Iterator[PreparedImage]:
            for index, why in unread.items():
                self.reader.leave_out(items[index].name, why)
            prepared = self.reader.prepare_all(item for index, item in enumerate(items) if index not in unread)
            for index in range(len(items)):
                one = unread.get(index) or next(prepared)
                if isinstance(one, str):
                    bad[index], one = one, blank
                signatures.append(signature(one.image))
                yield one

        def advance(event: Progress) -> None:
            self._report(replace(event, done=first + event.done, total=self._total))

        self._changed |= dict.fromkeys(self._changes(content))
        rows = encode_images(self.model, images(), on_progress=advance)
        if not os.path.isfile(self.folder / SETTINGS):
            _write(self.folder / SETTINGS, json.dumps(self._settings, indent=1).encode())
        write_chunk(self._path(content), rows, bad=bad, digests=digests, signatures=signatures)
        return read_chunk(self._path(content), len(items))

    def _changes(self, content: str) -> Iterator[str]:
        """Yield what differs where the same images were encoded for the same base, if only networks do."""
        for path in matches(self.folder.parent, f"*/{content}.safetensors"):
            with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
                earlier = read_config(path.parent / SETTINGS)
                if any(earlier.get(name) != self._settings[name] for name in ("base", "resolution", "dtype")):
                    continue
                for name, now in self._settings["networks"].items():
                    then = earlier["networks"].get(name, now)
                    if now != then:
                        state = "is not here now" if now == MISSING else "was not here then" if then == MISSING else ""
                        yield f"{name} {state or 'is another version now'}"

    def _count(self, chunk: Chunk, items: list[ImageItem]) -> None:
        """Count a chunk's unusable and duplicate images, whichever run encoded them."""
        for index, why in chunk.bad.items():
            self.reader.leave_out(items[index].name, why)
        for index in chunk.good.nonzero()[:, 0].tolist():
            both = (rows[index].numpy().tobytes() for rows in (chunk.digests, chunk.signatures))
            self.reader.duplicates.add(items[index].name, *both)


def _chunks(source: ImageSource) -> Iterator[tuple[int, list[ImageItem]]]:
    """Yield numbered lists of CHUNK items, the last one shorter (itertools.batched)."""
    items = iter(source)
    return enumerate(iter(lambda: list(islice(items, CHUNK)), []))


def _digests(items: list[ImageItem]) -> tuple[list[bytes], dict[int, str]]:
    """Return hashes of all contents, and index → reason of those that cannot be read."""
    digests, unread = [], {}
    for index, item in enumerate(items):
        try:
            digests.append(item.digest())
        except InputError as error:
            unread[index] = error.message
            digests.append(hashlib.sha256(error.message.encode()).digest())
    return digests, unread


def _read_note(note: Path) -> str | None:
    """Return the content that files with these stamps had, if it was written down."""
    with contextlib.suppress(OSError):
        text = note.read_text(encoding="ascii", errors="replace")
        return text if re.fullmatch(r"[0-9a-f]{64}", text) else None
    return None
