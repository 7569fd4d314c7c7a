"""Encoded pictures on disk: looked at once, kept for every later pass, run and resumption.

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
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy

from e4t_cli.base_model import TextToImageModel
from e4t_cli.domain import PreparedImage
from e4t_cli.errors import InputError
from e4t_cli.hub.places import own_cache
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.sources import Generated, Item, Preparation, Source
from e4t_cli.sources.lookalikes import signature

from .cached_images import CachedImages
from .chunks import FORMAT, Chunk, read_chunk, write_chunk, write_file
from .looking import look
from .processes import Processes

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
        self.folder = own_cache() / "pretraining" / name
        self.encoded = self.mended = 0

    def encode(
        self,
        source: Source,
        *,
        total: int = 0,
        processes: Processes | None = None,
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
        processes = processes or Processes()
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

    def _chunk(self, items: list[Item], number: int, total: int, report: ProgressCallback) -> Chunk:
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
        items: list[Item],
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

    def _tell(self, chunk: Chunk, items: list[Item]) -> None:
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


def _digests(items: list[Item]) -> tuple[list[bytes], dict[int, str]]:
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
