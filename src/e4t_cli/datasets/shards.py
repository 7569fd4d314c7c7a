"""Images in tar shards, as webdataset writes them, read member by member.

webdataset's own grouping cuts names at the first dot, so of "IMG_2024.05.01_03.png" and "IMG_2024.05.02_07.png" it
makes one sample and loses one picture. Here every member with a picture is an image of its own; webdataset opens
addresses, shuffles and expands braces. Nothing is unpacked to the disk.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import os
import random
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from e4t_cli.datasets.sources import (
    ImageItem,
    IterableSource,
    is_annotation,
    is_image,
    is_passed_over,
    optional_package,
)
from e4t_cli.errors import InputError, UsageError, WeightsUnavailable, printable
from e4t_cli.images.loading import MAX_BYTES
from e4t_cli.system_memory import memory_ran_out

_PACKED = ("", ".gz", ".bz2", ".xz", ".zst")
SUFFIXES = (*(f".tar{packed}" for packed in _PACKED), ".tgz", ".tbz2", ".txz")
LISTS = (".txt", ".list", ".urls")
_PICTURES = {
    *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "avif", "gif", "tif", "tiff", "bmp", "ppm", "pgm"),
    *("heic", "heif", "jp2", "jxl"),
}
SHUFFLE_BUFFER = 1000  # samples among which the next one is chosen: the memory that shuffling a stream costs
MAX_SHARDS = 1_000_000
_REMOTE = re.compile(r"(https?|gs)://[\w.~:/?#\[\]@!&=+,%-]+", re.ASCII)
_META = re.compile(r"__[^/]*__(/|$)")  # what webdataset reserves for itself
_EXTENDED = {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, b"K"}
_ZSTD = b"\x28\xb5\x2f\xfd"
_HEAD = 1 << 16  # bytes of a member by which an image is known
_MAX_HEADER = 1 << 20  # bytes of an extended header, which tarfile reads whole


class ShardSource(IterableSource):
    """The images in tar files.

    Args:
        shards: paths and URLs, in order.
        offline: open no connection.

    Raises:
        UsageError: webdataset is not installed, or a URL is of a kind that is not read.
        InputError: a file does not exist.
        WeightsUnavailable: a shard is remote, and `offline` is set.
    """

    def __init__(self, shards: list[str], title: str, *, offline: bool = False) -> None:
        optional_package("webdataset", "shards")
        super().__init__(title)
        self.shards = shards
        self.remote = [shard for shard in shards if "://" in shard]
        for shard in shards:
            remote = "://" in shard or shard.startswith("pipe:")
            if remote and not _REMOTE.fullmatch(shard):  # webdataset would run `pipe:` as a shell command
                raise UsageError(f"shards are read from files, https and gs, not {printable(shard)!r}")
            if not remote and not os.path.isfile(shard):
                raise InputError(f"there is no shard {printable(shard)}")
        if offline and self.remote:
            message = f"{printable(self.remote[0])} is not on this machine, and e4t is offline"
            raise WeightsUnavailable(message, hint="download the shards and give --data their paths")
        # Shards of one name in several folders are told apart by their paths.
        names = Counter(map(_last_part, shards))
        self._titles = {shard: name if names[name := _last_part(shard)] == 1 else shard for shard in shards}

    @property
    def fingerprint(self) -> str:
        """Identifies the shards by name, and by size where they are on this machine."""
        about = [f"{shard} {'' if '://' in shard else os.path.getsize(shard)}" for shard in self.shards]
        return hashlib.sha256("\n".join(about).encode("utf-8", "surrogateescape")).hexdigest()[:32]

    @property
    def approximate_len(self) -> int:
        """Extrapolated from the first shard by size; 0 with remote shards."""
        if self.remote:
            return 0
        with contextlib.suppress(Exception):  # what is wrong with the shard is said when it is read
            with tarfile.open(self.shards[0]) as shard:  # headers alone
                count = sum(member.isreg() and _named_as_picture(_inside(member.name)) for member in shard)
            sizes = [os.path.getsize(shard) for shard in self.shards]
            return count if len(sizes) == 1 else round(count * sum(sizes) / sizes[0])
        return 0

    def __iter__(self) -> Iterator[ImageItem]:
        return self._read(self.shards)

    def shuffled(self, seed: int, epoch: int, rank: int, ranks: int) -> Iterator[ImageItem]:
        """Return one process's share of an epoch (see `IterableSource`).

        Whole shards are distributed where there are enough of them; else every process reads all and takes every
        `ranks`-th image.
        """
        shards = list(self.shards)
        random.Random(f"{seed}/shards/{epoch}").shuffle(shards)
        if len(shards) >= ranks:
            return self._read(shards[rank::ranks], random.Random(f"{seed}/pictures/{epoch}/{rank}"))
        return itertools.islice(self._read(shards, random.Random(f"{seed}/pictures/{epoch}")), rank, None, ranks)

    def _read(self, shards: list[str], order: random.Random | None = None) -> Iterator[ImageItem]:
        broken: dict[str, str] = {}
        others = 0

        def items() -> Iterator[ImageItem]:
            nonlocal others
            for shard in shards:
                try:
                    with _opened(shard) as stream:
                        for item in _images_in(stream, self._titles[shard]):
                            if item is None:
                                others += 1
                            else:
                                yield item
                except Exception as error:  # of tarfile, of a decompressor, of webdataset's downloads
                    if memory_ran_out(error):
                        raise
                    # What was read of the shard counts, and the next one follows.
                    broken[shard] = _reason(error)

        data = items()
        if order is not None:  # webdataset's, so that runs begun before are resumed in the same order
            data = optional_package("webdataset", "shards").shuffle(SHUFFLE_BUFFER, rng=order)(data)
        yield from data
        self.other_files = max(self.other_files, others)
        for shard, why in broken.items():
            yield ImageItem(name=shard, image=b"", fault=f"this shard breaks off: {printable(why)}")


class _CutShort(Exception):
    """An archive that ends, or goes on, where it should not."""


class _Header(tarfile.TarInfo):
    """Tells an archive's end mark from a file that just ends, or has a damaged header, which tarfile takes for it."""

    @classmethod
    def fromtarfile(cls, archive: Any) -> _Header:
        try:
            return super().fromtarfile(archive)
        except _END:
            archive.has_end_mark = True
            raise

    @classmethod
    def frombuf(cls, *args: Any) -> _Header:
        header = super().frombuf(*args)
        if header.type in _EXTENDED and header.size > _MAX_HEADER:
            raise _CutShort("a header is larger than headers are")
        return header


_END: type[Exception] = tarfile.EOFHeaderError  # type: ignore[attr-defined] # a block of zeros


def _images_in(stream: BinaryIO, shard: str) -> Iterator[ImageItem | None]:
    """Yield the images of a tar file; None for each member that belongs to an image, such as a caption.

    Raises:
        Exception: it is damaged, of whatever kind; what came before was yielded.
    """
    # Untyped: the list of members is in no stub. The caller closes the file.
    archive: Any = tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header)  # noqa: SIM115
    seen: set[int] = set()
    while (member := archive.next()) is not None:
        archive.members = []  # which tarfile would keep
        inside = _inside(member.name)
        if member.isdir() or _passed_over(inside):
            continue
        named = _named_as_picture(inside)
        if is_annotation(inside) or not (named or member.isreg()):
            yield None
            continue
        fault, key = "", hash(member.name)
        file = archive.extractfile(member) if member.isreg() else None
        content = file.read(_HEAD) if file else b""
        if not named and not is_image(content):
            yield None
            continue
        if member.islnk() or member.issym():
            fault = f"it is a link to {member.linkname}, without a picture of its own"
        elif not member.isreg():
            fault = "it is not a plain file, or goes on in another volume"
        elif member.size > MAX_BYTES:
            fault = f"it is larger than {MAX_BYTES >> 20} MiB"
        elif key in seen:
            fault = "the shard has two members of this name; the first one is used"
        elif file:
            content += file.read()
        seen.add(key)
        yield ImageItem(name=f"{shard}/{member.name}", image=b"" if fault else content, fault=printable(fault))
    if not getattr(archive, "has_end_mark", False):
        raise _CutShort("it lacks the end mark of a tar file, so it is cut or damaged there")
    rest: Any = archive.fileobj
    while block := rest.read(1 << 16):
        if block.strip(b"\0"):
            raise _CutShort("more follows after its end mark, as where tar files were joined by cat")


def _inside(name: str) -> str:
    """Return a member's name without "./" and the like, which are neither hidden files nor places elsewhere."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def _passed_over(inside: str) -> bool:
    return bool(_META.match(inside)) or any(map(is_passed_over, inside.split("/")))


def _named_as_picture(inside: str) -> bool:
    kept = not is_annotation(inside) and not _passed_over(inside)
    return kept and inside.rpartition(".")[2].lower() in _PICTURES


@contextlib.contextmanager
def _opened(shard: str) -> Iterator[BinaryIO]:
    download = optional_package("webdataset", "shards").gopen
    stream: Any = download(shard) if "://" in shard else open(shard, "rb")  # noqa: SIM115 (closed below)
    try:
        packed = hasattr(stream, "peek") and stream.peek(4)[:4] == _ZSTD
        if packed and sys.version_info < (3, 14):
            raise _CutShort("it is packed with zstd, which is not read; unpack it with zstd -d")
        yield stream
    finally:
        with contextlib.suppress(Exception):  # a download that was given up reports that
            stream.close()


def _reason(error: Exception) -> str:
    text = str(error)
    if isinstance(error, EOFError) or not text:
        return "unexpected end of data"
    return text


def _last_part(shard: str) -> str:
    return shard.rpartition("/")[2]


def is_shards(place: str) -> bool:
    """Whether a name means shards, or an existing list of them."""
    lower = place.lower()
    return lower.endswith(SUFFIXES) or (lower.endswith(LISTS) and os.path.isfile(place))


def shard_paths(pattern: str) -> list[str]:
    """Return the shards that `{0000..0099}`, `*` or a file names, one a line; UsageError if no file matches."""
    if pattern.lower().endswith(LISTS) and os.path.isfile(pattern):
        text = Path(pattern).read_text(encoding="utf-8", errors="surrogateescape")
        entries = filter(None, map(str.strip, text.splitlines()))
        return [shard for entry in entries if not entry.startswith("#") for shard in _expanded(entry)]
    return _expanded(pattern)


def _expanded(pattern: str) -> list[str]:
    if os.path.isfile(pattern):
        return [pattern]
    if "{" in pattern:
        optional_package("webdataset", "shards")
        import braceexpand  # comes with webdataset

        try:
            found = list(itertools.islice(braceexpand.braceexpand(pattern), MAX_SHARDS + 1))
        except ValueError as error:  # unbalanced braces
            raise UsageError(f"{printable(pattern)} is no pattern: {printable(str(error))}") from error
        if len(found) > MAX_SHARDS:
            raise UsageError(f"{printable(pattern)} names more than {MAX_SHARDS:,} shards")
        return found
    if "://" in pattern or not glob.has_magic(pattern):
        return [pattern]
    found = sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise UsageError(f"no file matches {printable(pattern)}")
    return found
