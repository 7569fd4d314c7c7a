"""Opens and prepares the images of a source; counts those that are unusable or duplicates."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import secrets
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy
import PIL
from PIL import Image

from e4t_cli.datasets.sources import ImageItem
from e4t_cli.errors import InputError, IntegrityError, UsageError, WeightsUnavailable, printable
from e4t_cli.files import write_atomically
from e4t_cli.hub.bases import EMBEDDED
from e4t_cli.registry.domain import Domain, PreparationTarget, PreparedImage

SIGNATURE = 8 + 4 * 4 * 3  # bytes of a signature
COMPARED = 50_000  # images among which near duplicates are searched
REMEMBERED = 2_000_000  # images among which exact duplicates are searched
FEW = 100  # with fewer images a domain tends to overfit to them
_BITS, _COLOUR, _NOISE = 3, 12, 4
_BUCKET = 32  # of images that agree in a band, the first ones stand for all
MISSING = "missing"
_NAMED = 10_000  # of the images left out; more are only counted


def signature(image: Image.Image) -> bytes:
    """Return a difference hash (64 bits) and the colours on a 4 × 4 grid, SIGNATURE bytes."""
    box = Image.Resampling.BOX
    grey = numpy.asarray(image.convert("L").resize((9, 8), box), dtype=numpy.int16)
    rises = grey[:, 1:] > grey[:, :-1] + _NOISE  # flat parts stay 0 whatever compression did
    colours = numpy.asarray(image.convert("RGB").resize((4, 4), box), dtype=numpy.uint8)
    return numpy.packbits(rises).tobytes() + colours.tobytes()


class NearDuplicateFilter:
    """Counts exact and near duplicates in one pass, in bounded memory.

    Near duplicates differ in at most three bits of the hash, which finds copies that were scaled or compressed again,
    and in no colour by much, which keeps apart images of the same outline.
    """

    def __init__(self) -> None:
        self.same = self.near = 0
        self.first_same: tuple[str, str] | None = None
        self.first_near: tuple[str, str] | None = None
        self._digests: dict[int, str | None] = {}
        self._compared: list[tuple[str, bytes]] = []
        self._bands: dict[tuple[int, bytes], list[int]] = defaultdict(list)

    def add(self, name: str, digest: bytes, signature: bytes) -> None:
        """Compare one more image with those before it."""
        key = int.from_bytes(digest[:8], "big")
        if key in self._digests:
            self.same += 1
            self.first_same = self.first_same or (name, self._digests[key] or "another")
            return
        if len(self._digests) < REMEMBERED:  # names are for the first example only
            self._digests[key] = name if len(self._digests) < COMPARED else None
        if len(self._compared) >= COMPARED:
            return
        other = self._near(signature)
        if other is not None:
            self.near += 1
            self.first_near = self.first_near or (name, other)
        for band in _bands(signature):
            if len(self._bands[band]) < _BUCKET:
                self._bands[band].append(len(self._compared))
        self._compared.append((name, signature))

    def notes(self) -> list[str]:
        """Return warnings for the user; none without duplicates."""
        found = []
        if self.first_same:
            found.append(f"{_images(self.same, 'is', 'are')} there twice, as {' and '.join(self.first_same)}")
        if self.first_near:
            near = _images(self.near, "is a near duplicate", "are near duplicates")
            found.append(f"{near}, as {' and '.join(self.first_near)}")
        return found

    def _near(self, signature: bytes) -> str | None:
        bits = int.from_bytes(signature[:8], "big")
        colours = numpy.frombuffer(signature, numpy.uint8, offset=8).astype(numpy.int16)
        for band in _bands(signature):
            for index in self._bands.get(band, ()):
                name, other = self._compared[index]
                alike = (bits ^ int.from_bytes(other[:8], "big")).bit_count() <= _BITS
                if alike and numpy.abs(colours - numpy.frombuffer(other, numpy.uint8, offset=8)).max() <= _COLOUR:
                    return name
        return None


def _bands(signature: bytes) -> list[tuple[int, bytes]]:
    """Return the hash as four numbered bands of 16 bits: one is equal when at most three bits differ."""
    return [(band, signature[2 * band : 2 * band + 2]) for band in range(4)]


def _images(count: int, one: str, many: str) -> str:
    return f"1 image {one}" if count == 1 else f"{count:,} images {many}"


class ImageReader:
    """Opens images and runs a domain's preparation on them.

    Args:
        strict: stop at the first image that cannot be used.
        log: file that names those left out; None keeps them in memory.
    """

    def __init__(
        self, domain: Domain, target: PreparationTarget, *, strict: bool = False, log: Path | None = None
    ) -> None:
        self.domain, self.target, self.strict, self.log = domain, target, strict, log
        self.left_out: dict[str, str] = {}
        self._earlier: set[str] = set()  # lines of the log
        self.duplicates = NearDuplicateFilter()
        self._lock = threading.Lock()
        # Only the default preparation is known to be thread-safe.
        self.threads = min(8, os.cpu_count() or 1) if domain.prepare is None else 1

    @property
    def key(self) -> str:
        """Identifies what decodes an image and what preparation does to it, also when a domain's author changes it."""
        heic = "heic" if find_spec("pi_heif") else ""  # such a file is bad until its package is installed
        target = f"{self.target.size} {self.target.mask} {self.target.align}"
        key = f"{_function_key(self.domain)} {target} Pillow {PIL.__version__} {heic}"
        return " ".join([key, *(f"{name} {state}" for name, state in self.networks.items())])

    @cached_property
    def networks(self) -> dict[str, str]:
        """What the domain's preparation uses where it is here: name → commit or version, or "missing".

        The networks of the domain, which are fetched now if they can be, and OpenCV, with which one of them detects
        faces. The bases of this package have parts of their own for both.
        """
        wanted = self.domain.networks if self.domain.prepare is not None else ()
        if not wanted or self.target.base in EMBEDDED:
            return {}
        found = {repository: self._commit(repository) for repository in wanted}
        return {**found, "OpenCV": _opencv_version()}

    def _commit(self, repository: str) -> str:
        with contextlib.suppress(WeightsUnavailable, IntegrityError):
            if self.target.fetch is not None:
                return self.target.fetch(repository).name
        return MISSING

    def prepare(self, item: ImageItem) -> PreparedImage | str:
        """Return the prepared image, or why it cannot be used; raise InputError instead if `strict` is set."""
        try:
            found = item.prepare(self.domain, self.target)
        except (InputError, UsageError) as error:
            reason = printable(error.message)
            self.leave_out(item.name, reason)
            return reason
        if (found.mask is None) == (self.target.mask is None):
            return found
        # No mask means all of the image, explicit where others have a mask.
        return replace(found, mask=None if self.target.mask is None else Image.new("L", found.image.size, 255))

    def blank(self) -> PreparedImage:
        """Return a black image with an all-white mask, such as preparation returns."""
        size = (self.target.size, self.target.size)
        mask = None if self.target.mask is None else Image.new("L", size, 255)
        return PreparedImage(image=Image.new("RGB", size), mask=mask)

    def prepare_all(self, items: Iterable[ImageItem]) -> Iterator[PreparedImage | str]:
        """Prepare images in order, several at once where that is safe; few results wait."""
        if self.threads <= 1:
            yield from map(self.prepare, items)
            return
        source = iter(items)
        with ThreadPoolExecutor(self.threads, thread_name_prefix="e4t-images") as pool:
            try:
                waiting = [pool.submit(self.prepare, item) for item in islice(source, 2 * self.threads)]
                while waiting:
                    found = waiting.pop(0).result()
                    waiting += [pool.submit(self.prepare, item) for item in islice(source, 1)]
                    yield found
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def leave_out(self, name: str, reason: str) -> None:
        """Count and name an image that cannot be used; raise InputError if `strict` is set."""
        reason = printable(reason)
        if self.strict:
            raise InputError(_named(name, reason), hint="without --strict such images are left out")
        with self._lock:
            if name in self.left_out or len(self.left_out) >= _NAMED:
                return
            self.left_out[name] = reason
            if self.log is not None:  # at once: a run that resumes from its checkpoint does not open the image again
                self.log.parent.mkdir(parents=True, exist_ok=True)
                with self.log.open("a", encoding="utf-8") as file:
                    file.write(_line(name, reason))

    def write_log(self) -> None:
        """Write the names of the images left out in order; without any, remove what an earlier run has written."""
        if self.log is None:
            return
        with self._lock:
            lines = {_line(name, why) for name, why in self.left_out.items()} | self._earlier
            if lines:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self.log, "".join(sorted(lines)).encode())
            else:
                self.log.unlink(missing_ok=True)

    def resume_log(self) -> None:
        """Keep what the log says: it is of the run that is being resumed."""
        if self.log is not None and os.path.isfile(self.log):
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            self._earlier = {line for line in lines if line.endswith("\n") and "\t" in line}  # but for a torn one

    def empty_error(self) -> InputError:
        """Return the error for a source without a usable image."""
        first = f"no image can be used; the first: {self._first()}" if self.left_out else ""
        return InputError(first or "there are no images to train on")

    def notes(self, usable: int | None) -> list[str]:
        """Return warnings for the user: images left out, too few `usable` ones (None if unknown yet), duplicates."""
        found = []
        if self.left_out:
            count = len(self.left_out)
            were = ("" if count < _NAMED else "more than ") + _images(count, "was", "were")
            named = f"; all are named in {printable(str(self.log))}" if self.log else ""
            found.append(f"{were} left out; the first: {self._first()}{named}")
        if usable is not None and usable < FEW:
            few = _images(usable, "is few", "are few")
            found.append(f"{few}: the domain may overfit to them; {FEW} or more are better")
        return found + self.duplicates.notes()

    def _first(self) -> str:
        return _named(*min(self.left_out.items()))


def _opencv_version() -> str:
    """Return the version of OpenCV, of whichever distribution it is; importing it would take a second."""
    if find_spec("cv2") is None:
        return MISSING
    versions = set()
    for name in packages_distributions().get("cv2", ()):
        with contextlib.suppress(PackageNotFoundError):
            versions.add(version(name))
    return "+".join(sorted(versions)) or "unknown"


def _line(name: str, reason: str) -> str:
    return f"{printable(name)}\t{reason}\n"


def _named(name: str, reason: str) -> str:
    return reason if name in reason else f"{printable(name)}: {reason}"  # some reasons name the file already


def _function_key(domain: Domain) -> str:
    """Return name and source hash of a domain's preparation."""
    if domain.prepare is None:
        return "centre"
    function = inspect.unwrap(domain.prepare)
    module = getattr(function, "__module__", None) or "?"
    name = f"{module}.{getattr(function, '__qualname__', '?')}"
    try:
        source = Path(inspect.getsourcefile(function) or "")
        digest = hashlib.sha256(source.read_bytes())
        # What it imports from its own package decides as much.
        for path in sorted(source.parent.glob("*.py")) if "." in module else ():
            digest.update(path.read_bytes())
        return f"{name} {digest.hexdigest()[:16]}"
    except (TypeError, OSError):  # typed into an interpreter: the name identifies nothing
        return f"{name} {secrets.token_hex(8)}"
