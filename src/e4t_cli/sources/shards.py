"""Tar shards, here or elsewhere, read from front to back through webdataset."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import random
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from e4t_cli.errors import InputError, UsageError, printable

from .items import Item

SUFFIXES = (".tar", ".tar.gz", ".tgz")
_PICTURES = ("jpg", "jpeg", "png", "webp", "avif", "gif", "tif", "tiff", "bmp", "ppm", "heic")
SHUFFLED = 1000
"""Samples that wait together, of which the next one is drawn: the memory that order costs."""
_REMOTE = re.compile(r"(https?|gs)://[\w.~:/?#\[\]@!&=+,%-]+", re.ASCII)


class Shards:
    """Pictures in tar files, as webdataset writes them: files of one name are one sample.

    Args:
        places: paths and addresses of the shards, in order.
        title: what the user called them.

    Raises:
        UsageError: webdataset is not installed, or an address is of a kind that is not read.
        InputError: a file is not there.
    """

    def __init__(self, places: list[str], title: str) -> None:
        _webdataset()
        self.places, self.title = places, title
        self.beside = 0
        self.notes: list[str] = []
        for place in places:
            if "://" in place or place.startswith("pipe:"):
                if not _REMOTE.fullmatch(place):
                    # webdataset would run `pipe:` as a command of this machine's shell.
                    raise UsageError(
                        f"shards are read from files, https and gs, not {printable(place)!r}"
                    )
            elif not Path(place).is_file():
                raise InputError(f"there is no shard {printable(place)}")

    @property
    def fingerprint(self) -> str:
        """Identify the shards by name, and by size where they are on this machine."""
        about = [f"{place} {os.path.getsize(place) if _is_local(place) else ''}"
                 for place in self.places]  # fmt: skip
        return hashlib.sha256("\n".join(about).encode()).hexdigest()[:32]

    @property
    def about(self) -> int:
        """About how many pictures there are, from the first shard's; 0 if nobody knows."""
        local = [place for place in self.places if _is_local(place)]
        if len(local) < len(self.places):
            return 0
        try:
            with tarfile.open(local[0]) as shard:  # headers alone
                count = sum(1 for member in shard if _is_picture(member.name))
        except (OSError, tarfile.TarError):
            return 0
        sizes = [os.path.getsize(place) for place in local]
        return count if len(sizes) == 1 else round(count * sum(sizes) / sizes[0])

    def __iter__(self) -> Iterator[Item]:
        return self._read(self.places)

    def shuffled(self, seed: int, epoch: int, rank: int, ranks: int) -> Iterator[Item]:
        """Return one process's share of an epoch, in an order that these four numbers decide.

        Whole shards are dealt out where there are enough of them; else every process reads all
        and takes every `ranks`-th picture.
        """
        places = list(self.places)
        random.Random(f"{seed}/shards/{epoch}").shuffle(places)
        if len(places) >= ranks:
            order = random.Random(f"{seed}/pictures/{epoch}/{rank}")
            return self._read(places[rank::ranks], order)
        order = random.Random(f"{seed}/pictures/{epoch}")
        return itertools.islice(self._read(places, order), rank, None, ranks)

    def _read(self, places: list[str], order: random.Random | None = None) -> Iterator[Item]:
        wds = _webdataset()
        broken: dict[str, str] = {}

        def note(error: Exception) -> bool:
            told = " ".join(map(str, error.args))  # webdataset says twice what broke, and where
            place = next((place for place in places if place in told), "?")
            broken.setdefault(place, told.partition(" @ ")[0])
            return True  # what was read of the shard counts, and the next one follows

        data = wds.WebDataset(
            places,
            shardshuffle=False,
            nodesplitter=None,  # dealt out above, in a way that a resumed run can repeat
            workersplitter=None,
            empty_check=False,
            handler=note,
        )
        if order is not None:
            data = data.shuffle(SHUFFLED, rng=order)
        for sample in data:
            found = next((key for key in sample if key.lower() in _PICTURES), None)
            if found is None:
                self.beside += 1
                continue
            shard = str(sample.get("__url__", "")).rpartition("/")[2]
            yield Item(name=f"{shard}/{sample['__key__']}.{found}", picture=sample[found])
        for place, why in broken.items():
            yield Item(name=place, picture=b"", fault=f"this shard breaks off: {printable(why)}")


def shard_places(pattern: str) -> list[str]:
    """Return the shards that a pattern means: `{0000..0099}`, `*`, or a list of addresses.

    Raises:
        UsageError: no file matches.
    """
    if pattern.endswith((".txt", ".list", ".urls")) and Path(pattern).is_file():
        lines = Path(pattern).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        entries = [line.strip() for line in lines]
        listed = [entry for entry in entries if entry and not entry.startswith("#")]
        return list(itertools.chain.from_iterable(_expanded(entry) for entry in listed))
    return _expanded(pattern)


def _expanded(pattern: str) -> list[str]:
    if Path(pattern).is_file():
        return [pattern]
    if "{" in pattern:
        _webdataset()
        import braceexpand  # comes with webdataset

        return list(braceexpand.braceexpand(pattern))
    if glob.has_magic(pattern) and "://" not in pattern:
        found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise UsageError(f"no file matches {printable(pattern)}")
        return found
    return [pattern]


def _is_local(place: str) -> bool:
    return "://" not in place


def _is_picture(name: str) -> bool:
    return name.rpartition(".")[2].lower() in _PICTURES


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError as error:
        raise UsageError(
            "tar shards need one more package", hint="pip install 'e4t[shards]'"
        ) from error
    return webdataset
