"""Tar shards, here or elsewhere, read from front to back through webdataset.

A dataset of the `datasets` library: from the hub, saved to a folder, or one parquet file.
"""

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

from e4t_cli.datasets.folder import ImageItem
from e4t_cli.errors import E4TError, InputError, UsageError, WeightsUnavailable, printable

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

    def __iter__(self) -> Iterator[ImageItem]:
        return self._read(self.places)

    def shuffled(self, seed: int, epoch: int, rank: int, ranks: int) -> Iterator[ImageItem]:
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

    def _read(self, places: list[str], order: random.Random | None = None) -> Iterator[ImageItem]:
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
            yield ImageItem(name=f"{shard}/{sample['__key__']}.{found}", picture=sample[found])
        for place, why in broken.items():
            yield ImageItem(
                name=place, picture=b"", fault=f"this shard breaks off: {printable(why)}"
            )


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


_HUB = re.compile(r"hf://(?:datasets/)?(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?"
                  r"(?::(?P<split>[\w\[\]%:+-]+))?")  # fmt: skip
_SAVED = ("dataset_dict.json", "state.json")
_FILES = {".parquet": "parquet", ".arrow": "arrow"}


def is_table(data: str) -> bool:
    """Whether `data` is something that `datasets` opens."""
    path = Path(data)
    return (
        data.startswith("hf://")
        or (path.suffix in _FILES and path.is_file())
        or any((path / name).is_file() for name in _SAVED)
    )


class Table:
    """The column of pictures of a dataset; any of its rows at any time, straight from the disk.

    Args:
        data: "hf://owner/name@revision:split" (revision and split may be left out), a folder
            that `save_to_disk` wrote, or a parquet or arrow file.

    Raises:
        UsageError: `datasets` is not installed, or the reference cannot be read.
        InputError: it cannot be opened, or has no column of pictures.
    """

    def __init__(self, data: str) -> None:
        self.title = data
        self.beside = 0
        self.notes: list[str] = []
        table = _open(data)
        from datasets import Image

        columns = [name for name, kind in table.features.items() if isinstance(kind, Image)]
        if not columns:
            names = ", ".join(map(repr, table.features))
            raise InputError(f"{printable(data)} has no column of pictures, only {names}")
        if len(columns) > 1:
            self.notes.append(f"{printable(data)} has {len(columns)} columns of pictures; "
                              f"{columns[0]!r} is used")  # fmt: skip
        if not len(table):
            raise InputError(f"there is no picture in {printable(data)}")
        # Undecoded: pictures are opened by the same code as any other.
        self._column = columns[0]
        self._table = table.select_columns(columns[:1]).cast_column(
            self._column, Image(decode=False)
        )

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> ImageItem:
        found = self._table[index][self._column] or {}
        name = f"row {index}"
        if found.get("bytes") is not None:
            return ImageItem(name=name, picture=found["bytes"])
        # An empty row is a bad picture like any other.
        return ImageItem(name=name, picture=found["path"] if found.get("path") else b"")

    def __iter__(self) -> Iterator[ImageItem]:
        return (self[index] for index in range(len(self)))

    @property
    def fingerprint(self) -> str:
        return str(self._table._fingerprint)


def _open(data: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            "datasets need one more package", hint="pip install 'e4t[datasets]'"
        ) from error
    datasets.disable_progress_bars()
    path = Path(data)
    try:
        if data.startswith("hf://"):
            parts = _HUB.fullmatch(data)
            if parts is None:
                raise UsageError(
                    f"{printable(data)!r} is no dataset", hint="for example: hf://owner/name:train"
                )
            found = datasets.load_dataset(
                parts["repo"], revision=parts["revision"], split=parts["split"]
            )
        elif path.is_file():
            found = datasets.load_dataset(_FILES[path.suffix], data_files=str(path), split="train")
        else:
            found = datasets.load_from_disk(str(path))
    except E4TError:
        raise
    except ConnectionError as error:
        raise WeightsUnavailable(
            f"the dataset {printable(data)} could not be fetched: {printable(str(error))}"
        ) from error
    except Exception as error:  # the library raises whatever its readers raise
        raise InputError(
            f"{printable(data)} cannot be opened as a dataset: {printable(str(error), limit=200)}"
        ) from error
    if isinstance(found, dict):
        name = "train" if "train" in found else next(iter(found))
        found = found[name]
    return found
