"""Finding pictures that a data set has twice, exactly or nearly, in bounded memory.

A picture's signature is its difference hash (64 bits: where brightness rises from left to right
by more than noise) and its colours on a 4 × 4 grid. Two pictures look alike if at most three bits
differ and no colour by much: the first finds copies that were scaled or compressed again, the
second keeps apart what merely has the same outline.

Opening the pictures of a source one by one; those that cannot be used are counted and named.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import secrets
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy
import PIL
from PIL import Image

from e4t_cli.datasets.folder import ImageItem
from e4t_cli.errors import InputError, UsageError, printable
from e4t_cli.files import write_atomically
from e4t_cli.registry.domain import Domain, PreparationTarget, PreparedImage

SIGNATURE = 8 + 4 * 4 * 3
"""Bytes of a signature."""
COMPARED = 50_000
"""Pictures among which near-duplicates are looked for."""
REMEMBERED = 2_000_000
"""Pictures among which exact duplicates are looked for."""
_BITS, _COLOUR, _NOISE = 3, 12, 4
_SIDE_BY_SIDE = 32  # of pictures that agree in a band, the first ones stand for all


def signature(image: Image.Image) -> bytes:
    """Return what `Lookalikes` compares, SIGNATURE bytes."""
    box = Image.Resampling.BOX
    grey = numpy.asarray(image.convert("L").resize((9, 8), box), dtype=numpy.int16)
    rises = grey[:, 1:] > grey[:, :-1] + _NOISE  # flat parts stay 0 whatever compression did
    colours = numpy.asarray(image.convert("RGB").resize((4, 4), box), dtype=numpy.uint8)
    return numpy.packbits(rises).tobytes() + colours.tobytes()


class NearDuplicateFilter:
    """Counts duplicates while pictures go by."""

    def __init__(self) -> None:
        self.same = self.near = 0
        self.first_same: tuple[str, str] | None = None
        self.first_near: tuple[str, str] | None = None
        self._digests: dict[int, str | None] = {}
        self._seen: list[tuple[str, bytes]] = []
        # Of four bands of 16 bits, one is equal when at most three bits differ.
        self._bands: dict[tuple[int, bytes], list[int]] = defaultdict(list)

    def add(self, name: str, digest: bytes, looks: bytes) -> None:
        """Take one more picture into account."""
        key = int.from_bytes(digest[:8], "big")
        if key in self._digests:
            self.same += 1
            self.first_same = self.first_same or (name, self._digests[key] or "another")
            return
        if len(self._digests) < REMEMBERED:
            # Names are for the first example only.
            self._digests[key] = name if len(self._digests) < COMPARED else None
        if len(self._seen) >= COMPARED:
            return
        other = self._alike(looks)
        if other is not None:
            self.near += 1
            self.first_near = self.first_near or (name, other)
        index = len(self._seen)
        self._seen.append((name, looks))
        for band in range(4):
            bucket = self._bands[band, looks[2 * band : 2 * band + 2]]
            if len(bucket) < _SIDE_BY_SIDE:
                bucket.append(index)

    def notes(self) -> list[str]:
        """Return sentences for the user; none if every picture is its own."""
        found = []
        if self.first_same:
            count = "1 picture is" if self.same == 1 else f"{self.same:,} pictures are"
            found.append(f"{count} there twice, as {_pair(self.first_same)}")
        if self.first_near:
            count = "1 picture looks" if self.near == 1 else f"{self.near:,} pictures look"
            found.append(f"{count} almost like another one, as {_pair(self.first_near)}")
        return found

    def _alike(self, looks: bytes) -> str | None:
        bits = int.from_bytes(looks[:8], "big")
        colours = numpy.frombuffer(looks, numpy.uint8, offset=8).astype(numpy.int16)
        for band in range(4):
            for index in self._bands.get((band, looks[2 * band : 2 * band + 2]), ()):
                name, other = self._seen[index]
                if (bits ^ int.from_bytes(other[:8], "big")).bit_count() > _BITS:
                    continue
                theirs = numpy.frombuffer(other, numpy.uint8, offset=8)
                if numpy.abs(colours - theirs).max() <= _COLOUR:
                    return name
        return None


def _pair(names: tuple[str, str]) -> str:
    return f"{names[0]} and {names[1]}"


FEW = 100
"""Below so many pictures a domain tends to learn these very pictures."""
_NAMED = 10_000  # of the pictures left out; more are only counted
_T = TypeVar("_T")


class Preparation:
    """What one run does with its pictures before the base sees them.

    Args:
        domain: whose preparation it is.
        target: size, and whether a mask is wanted.
        strict: stop at the first picture that cannot be used.
        log: where those that were left out are named; None keeps them in memory.
    """

    def __init__(
        self,
        domain: Domain,
        target: PreparationTarget,
        *,
        strict: bool = False,
        log: Path | None = None,
    ) -> None:
        self.domain, self.target, self.strict, self.log = domain, target, strict, log
        self.left_out: dict[str, str] = {}
        self.lookalikes = NearDuplicateFilter()
        self._lock = threading.Lock()
        # Only our own preparation is known to bear several threads.
        self.threads = min(8, os.cpu_count() or 1) if domain.prepare is None else 1

    @property
    def key(self) -> str:
        """Identify what preparation does to a picture, also when a domain's author changes it.

        What decodes pictures is part of it: a HEIC file is bad until its package is installed.
        """
        heic = "heic" if find_spec("pi_heif") else ""
        target = f"{self.target.size} {self.target.mask} {self.target.align}"
        return f"{_written(self.domain)} {target} Pillow {PIL.__version__} {heic}"

    def prepare(self, item: ImageItem) -> PreparedImage | str:
        """Return the prepared picture, or why it cannot be used.

        Raises:
            InputError: it cannot be used, and the run is strict.
        """
        try:
            found = item.prepare(self.domain, self.target)
        except (InputError, UsageError) as error:
            reason = printable(error.message)
            self.leave_out(item.name, reason)
            return reason
        if self.target.mask is None:
            return found if found.mask is None else replace(found, mask=None)
        if found.mask is None:  # which means all of it, and has to be said where others have one
            return replace(found, mask=Image.new("L", found.image.size, 255))
        return found

    def blank(self) -> PreparedImage:
        """Return a picture of nothing, such as preparation returns."""
        size = (self.target.size, self.target.size)
        mask = None if self.target.mask is None else Image.new("L", size, 255)
        return PreparedImage(image=Image.new("RGB", size), mask=mask)

    def prepare_all(self, items: Iterable[ImageItem]) -> Iterator[PreparedImage | str]:
        """Prepare pictures in order, some at once where that is safe; a few wait, never all."""
        return _mapped(self.prepare, items, self.threads)

    def leave_out(self, name: str, reason: str) -> None:
        """Count and name a picture that cannot be used.

        Raises:
            InputError: the run is strict.
        """
        reason = printable(reason)
        if self.strict:
            # Some reasons name the file; a name is said once.
            named = reason if name in reason else f"{printable(name)}: {reason}"
            raise InputError(named, hint="without --strict such pictures are left out")
        with self._lock:
            fresh = name not in self.left_out
            if len(self.left_out) < _NAMED:
                self.left_out[name] = reason
            count = len(self.left_out)
        if fresh and count & (count - 1) == 0:  # 1, 2, 4, 8 …: each line is written a few times
            self.write_log()

    def write_log(self) -> None:
        """Write the names of the pictures left out, if there are any."""
        if self.log is None or not self.left_out:
            return
        with self._lock:
            lines = [f"{printable(name)}\t{why}" for name, why in sorted(self.left_out.items())]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.log, "".join(f"{line}\n" for line in lines).encode())

    def nothing(self) -> InputError:
        """Return the error for a source of which nothing can be used."""
        if self.left_out:
            return InputError(f"no picture can be used; the first: {self._first()}")
        return InputError("there are no pictures to train on")

    def notes(self, usable: int | None) -> list[str]:
        """Return what the user should know about the pictures.

        Args:
            usable: how many can be used; None if nobody knows yet.
        """
        found = []
        if self.left_out:
            count = len(self.left_out)
            many = f"{count:,}" if count < _NAMED else f"more than {_NAMED:,}"
            were = "1 picture was" if count == 1 else f"{many} pictures were"
            named = f"; all are named in {printable(str(self.log))}" if self.log else ""
            found.append(f"{were} left out; the first: {self._first()}{named}")
        if usable is not None and usable < FEW:
            pictures = "1 picture is" if usable == 1 else f"{usable} pictures are"
            found.append(
                f"{pictures} few: the domain may learn these very pictures (overfitting); "
                f"{FEW} or more are better"
            )
        return found + self.lookalikes.notes()

    def _first(self) -> str:
        """Return the first picture left out and why; many reasons name the file themselves."""
        name, why = min(self.left_out.items())
        return why if name in why else f"{printable(name)}: {why}"


def _mapped(
    function: Callable[[ImageItem], _T], items: Iterable[ImageItem], threads: int
) -> Iterator[_T]:
    """Apply a function to items in order, with at most a few results waiting."""
    if threads <= 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="e4t-pictures")
    try:
        source = iter(items)
        waiting = [pool.submit(function, item) for item in islice(source, 2 * threads)]
        while waiting:
            found = waiting.pop(0).result()
            waiting += [pool.submit(function, item) for item in islice(source, 1)]
            yield found
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _written(domain: Domain) -> str:
    """Return what tells one preparation from another: where it is written, and what is there."""
    if domain.prepare is None:
        return "centre"
    function = inspect.unwrap(domain.prepare)
    name = f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', '?')}"
    try:
        source = Path(inspect.getsourcefile(function) or "")
        return f"{name} {hashlib.sha256(source.read_bytes()).hexdigest()[:16]}"
    except (TypeError, OSError):  # typed into an interpreter: the same name says nothing
        return f"{name} {secrets.token_hex(8)}"
