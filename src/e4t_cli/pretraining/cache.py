"""Files of encoded pictures: whole or absent, checked when found, mapped when read.

What pre-training reads from the cache: a source's pictures, row by row from mapped files.

Encoded pictures on disk: looked at once, kept for every later pass, run and resumption.

    <cache>/pretraining/<settings>/<content>.safetensors    up to 256 pictures: latents, features
    <cache>/pretraining/<settings>/stamps/<stamps>          which content these files had last time

The first name is a hash of everything that decides how a picture is looked at (base, resolution,
precision, preparation), the second one of the pictures' bytes. So a chunk is right wherever it
comes from: another run, another folder with the same pictures, a process that was faster. Chunks
appear whole or not at all, and carry a checksum: a damaged one is made again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from e4t_cli.datasets.folder import ImageItem
from e4t_cli.datasets.reader import SIGNATURE, Preparation, signature
from e4t_cli.datasets.sources import Generated, Source
from e4t_cli.errors import InputError, IntegrityError, ResourceError
from e4t_cli.files import write_atomically
from e4t_cli.hub.paths import user_cache
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.pretraining.batches import DistributedContext
from e4t_cli.pretraining.encoded_images import EncodedRows, epoch_indices, look
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.registry.domain import PreparedImage

FORMAT = "1"
_ROWS = ("means", "logvars", "image_features", "masks")


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """What is known of a chunk without holding its rows.

    Args:
        path: of its file.
        good: which of its pictures can be used (pictures,), bool.
        bad: position → reason, of the others.
        digests: of each picture's bytes (pictures, 32).
        signatures: of each picture's looks (pictures, SIGNATURE).
    """

    path: Path
    good: Tensor
    bad: dict[int, str]
    digests: Tensor
    signatures: Tensor


def write_chunk(
    path: Path,
    rows: EncodedRows,
    *,
    bad: dict[int, str],
    digests: list[bytes],
    looks: list[bytes],
) -> None:
    """Write a chunk with its checksum, unless another process was first.

    Args:
        rows: of all its pictures; what stands for a bad one is never read.
        bad: position → reason, of those that cannot be used.

    Raises:
        ResourceError: the disk is full, or not ours to write to.
    """
    found = {name: getattr(rows, name) for name in _ROWS}
    tensors = {name: value.contiguous() for name, value in found.items() if value is not None}
    tensors["good"] = torch.tensor([place not in bad for place in range(len(digests))]).byte()
    tensors["digests"] = _bytes(digests, 32)
    tensors["signatures"] = _bytes(looks, SIGNATURE)
    plain = save(tensors)
    data = memoryview(plain)[8 + int.from_bytes(plain[:8], "little") :]
    about = {"format": FORMAT, "bad": json.dumps(bad), "sha256": hashlib.sha256(data).hexdigest()}
    write_file(path, save(tensors, about), overwrite=False)


def read_chunk(path: Path, count: int) -> Chunk:
    """Return a chunk of `count` pictures, every byte of it checked.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or another one.
    """
    try:
        with open(path, "rb") as file:
            metadata = _checked(file)
        with safe_open(path, framework="pt") as tensors:
            good = tensors.get_tensor("good").bool()
            digests, looks = tensors.get_tensor("digests"), tensors.get_tensor("signatures")
        bad = {int(place): str(why) for place, why in json.loads(metadata["bad"]).items()}
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error
    if len(good) != count or metadata.get("format") != FORMAT:
        raise ValueError("it is another chunk")
    return Chunk(path=path, good=good, bad=bad, digests=digests, signatures=looks)


def mapped_rows(path: Path) -> dict[str, Any]:
    """Return the rows of a chunk by name, read from the disk where they are indexed.

    Raises:
        IntegrityError: it has gone since the run began.
    """
    try:
        file = safe_open(path, framework="pt").__enter__()
        return {name: file.get_slice(name) for name in file.keys() if name in _ROWS}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise IntegrityError(
            f"the cache of encoded pictures in {path.parent} changed during the run",
            hint="the same command makes it again and goes on from the last checkpoint",
        ) from error


def joined(parts: Iterable[dict[str, Tensor]]) -> EncodedRows:
    """Return rows of one picture each as one value."""
    columns: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, row in part.items():
            columns.setdefault(name, []).append(row)
    return EncodedRows(**{name: torch.cat(rows) for name, rows in columns.items()})


def write_file(path: Path, data: bytes, *, overwrite: bool = True) -> None:
    """Write a file of the cache.

    Raises:
        ResourceError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data, overwrite=overwrite)
    except FileExistsError:  # another process was first, with the same content
        pass
    except OSError as error:
        raise ResourceError(
            f"the cache in {path.parent} cannot be written: {error.strerror}",
            hint="E4T_CACHE_DIR moves it, --cache off trains without it",
        ) from error


def _checked(file: BinaryIO) -> dict[str, str]:
    """Return a safetensors file's metadata.

    Raises:
        ValueError: the data is not what its checksum says.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > 2**24:
        raise ValueError("its header is too long")
    metadata = json.loads(file.read(length))["__metadata__"]
    if hashlib.file_digest(file, "sha256").hexdigest() != metadata["sha256"]:
        raise ValueError("its checksum is another")
    return dict(metadata)


def _bytes(rows: list[bytes], width: int) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(-1, width)


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


CHUNK = 256
"""Pictures in a file: what an interrupted encoding can lose."""
_T = TypeVar("_T")


class EncodingCache:
    """The chunks of one base, precision and preparation.

    Args:
        model: looks at pictures.
        preparation: opens them.
    """

    def __init__(self, model: TextToImageModel, preparation: Preparation) -> None:
        self.model, self.preparation = model, preparation
        settings = {
            "format": FORMAT,
            "base": model.fingerprint,
            "resolution": model.resolution,
            "dtype": str(model.dtype),
            "preparation": preparation.key,
        }
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
        self.folder = user_cache() / "pretraining" / name
        self.encoded = self.mended = 0

    def encode(
        self,
        source: Source,
        *,
        total: int = 0,
        processes: DistributedContext | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> CachedImages:
        """Return the source's pictures, having looked at those that nobody has looked at before.

        Args:
            total: how many there are, for progress; 0 if unknown.
            processes: several of them share the work, each a part of the chunks.

        Raises:
            InputError: no picture can be used, or one cannot and the preparation is strict.
            ResourceError: the disk is full.
        """
        report = on_progress or (lambda event: None)
        processes = processes or DistributedContext()
        known: dict[int, Chunk] = {}
        if processes.count > 1 and not isinstance(source, Generated):
            for number, items in enumerate(in_chunks(source, CHUNK)):
                if number % processes.count == processes.rank:
                    known[number] = self._chunk(items, number, total, report)
            processes.any(False)  # wait for the others; on disks of their own, theirs stay there
        for number, items in enumerate(in_chunks(source, CHUNK)):
            if number not in known:
                known[number] = self._chunk(items, number, total, report)
            self._tell(known[number], items)
        chunks = [known[number] for number in sorted(known)]
        self.preparation.write_log()
        count = sum(len(chunk.good) for chunk in chunks)
        usable = sum(int(chunk.good.sum()) for chunk in chunks)
        if not usable:
            raise self.preparation.nothing()
        report(Progress(stage="encode", done=count, total=count))
        notes = self.preparation.notes(usable)
        if self.mended:
            notes.append(f"{self.mended} damaged files of the cache were made again")
        for note in notes:
            report(Progress(stage="encode", note=note))
        return CachedImages(chunks)

    def _chunk(
        self, items: list[ImageItem], number: int, total: int, report: ProgressCallback
    ) -> Chunk:
        """Return a chunk: found by its files' stamps, by their content, or made."""
        first = number * CHUNK
        stamps = [item.stamp() or "" for item in items]
        note = self.folder / "stamps" / _hash(*stamps)
        content = _remembered(note) if all(stamps) else None
        found = self._find(content, len(items)) if content else None
        if found is None:
            digests, unread = _digests(items)
            content = hashlib.sha256(b"".join(digests)).hexdigest()
            found = self._find(content, len(items))
            if found is None:
                self._make(content, items, digests, unread, first, total, report)
                found = read_chunk(self._path(content), len(items))
                self.encoded += len(items)
            if all(stamps) and not unread:  # a disk that failed once may not fail again
                write_file(note, content.encode())
        report(Progress(stage="encode", done=first + len(items), total=total))
        return found

    def _path(self, content: str) -> Path:
        return self.folder / f"{content}.safetensors"

    def _find(self, content: str, count: int) -> Chunk | None:
        """Return a chunk if it is there and whole; a damaged one is removed."""
        try:
            return read_chunk(self._path(content), count)
        except FileNotFoundError:
            return None
        except ValueError:
            self._path(content).unlink(missing_ok=True)
            self.mended += 1
            return None

    def _make(
        self,
        content: str,
        items: list[ImageItem],
        digests: list[bytes],
        unread: dict[int, str],
        first: int,
        total: int,
        report: ProgressCallback,
    ) -> None:
        """Look at a chunk's pictures and write them."""
        bad, looks = dict(unread), []
        # A blank stands for a bad picture, so that the others go through the model in the same
        # company as if it were a good one, and come out in the same bits.
        blank = self.preparation.blank()

        def squares() -> Iterator[PreparedImage]:
            for place, why in unread.items():
                self.preparation.leave_out(items[place].name, why)
            readable = [item for place, item in enumerate(items) if place not in unread]
            prepared = self.preparation.prepare_all(readable)
            for place in range(len(items)):
                one = unread.get(place) or next(prepared)
                if isinstance(one, str):
                    bad[place], one = one, blank
                looks.append(signature(one.image))
                yield one

        def advance(event: Progress) -> None:
            report(replace(event, done=first + event.done, total=total))

        rows = look(self.model, squares(), on_progress=advance)
        write_chunk(self._path(content), rows, bad=bad, digests=digests, looks=looks)

    def _tell(self, chunk: Chunk, items: list[ImageItem]) -> None:
        """Let the preparation know of a chunk's pictures, whoever has looked at them."""
        for place, why in chunk.bad.items():
            self.preparation.leave_out(items[place].name, why)
        digests, looks = chunk.digests.numpy(), chunk.signatures.numpy()
        for place in numpy.flatnonzero(chunk.good.numpy()):
            name = items[place].name
            self.preparation.lookalikes.add(name, digests[place].tobytes(), looks[place].tobytes())


def in_chunks(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """Yield consecutive lists of `size` items, the last one shorter."""
    source = iter(items)
    while found := list(islice(source, size)):
        yield found


def _digests(items: list[ImageItem]) -> tuple[list[bytes], dict[int, str]]:
    """Return hashes of all contents, and why some cannot be read."""
    digests, unread = [], {}
    for place, item in enumerate(items):
        try:
            digests.append(item.digest())
        except InputError as error:
            unread[place] = error.message
            digests.append(hashlib.sha256(error.message.encode()).digest())
    return digests, unread


def _remembered(note: Path) -> str | None:
    """Return the content that files with these stamps had, if it was written down."""
    try:
        text = note.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    return text if re.fullmatch(r"[0-9a-f]{64}", text) else None


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
