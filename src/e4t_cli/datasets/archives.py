"""Image sources behind optional packages: tar shards (webdataset) and Arrow tables (datasets)."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import os
import random
import re
import tarfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from e4t_cli.datasets.sources import ImageItem, IterableSource, MapStyleSource
from e4t_cli.errors import E4TError, InputError, UsageError, WeightsUnavailable, printable

SUFFIXES = (".tar", ".tar.gz", ".tgz")
LISTS = (".txt", ".list", ".urls")
_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "avif", "gif", "tif", "tiff", "bmp", "ppm", "heic")
SHUFFLE_BUFFER = 1000  # samples among which the next one is chosen: the memory that shuffling a stream costs
_REMOTE = re.compile(r"(https?|gs)://[\w.~:/?#\[\]@!&=+,%-]+", re.ASCII)


class ShardSource(IterableSource):
    """Images in tar files, as webdataset writes them: files of one name are one sample.

    Args:
        shards: paths and URLs, in order.
        offline: open no connection.

    Raises:
        UsageError: webdataset is not installed, or a URL is of a kind that is not read.
        InputError: a file does not exist.
        WeightsUnavailable: a shard is remote, and `offline` is set.
    """

    def __init__(self, shards: list[str], title: str, *, offline: bool = False) -> None:
        _package("webdataset", "shards")
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

    @property
    def fingerprint(self) -> str:
        """Identifies the shards by name, and by size where they are on this machine."""
        about = [f"{shard} {'' if '://' in shard else os.path.getsize(shard)}" for shard in self.shards]
        return hashlib.sha256("\n".join(about).encode()).hexdigest()[:32]

    @property
    def approximate_len(self) -> int:
        """Extrapolated from the first shard by size; 0 with remote shards."""
        if self.remote:
            return 0
        with contextlib.suppress(OSError, tarfile.TarError):
            with tarfile.open(self.shards[0]) as shard:  # headers alone
                count = sum(member.name.rpartition(".")[2].lower() in _EXTENSIONS for member in shard)
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
        wds = _package("webdataset", "shards")
        broken: dict[str, str] = {}

        def handler(error: Exception) -> bool:
            text = " ".join(map(str, error.args))  # webdataset repeats what broke, and where
            shard = next((shard for shard in shards if shard in text), "?")
            broken.setdefault(shard, text.partition(" @ ")[0])
            return True  # what was read of the shard counts, and the next one follows

        # Not split here but in `shuffled`, in a way that a resumed run can repeat.
        data = wds.WebDataset(
            shards, shardshuffle=False, nodesplitter=None, workersplitter=None, empty_check=False, handler=handler
        )
        if order is not None:
            data = data.shuffle(SHUFFLE_BUFFER, rng=order)
        for sample in data:
            found = next((key for key in sample if key.lower() in _EXTENSIONS), None)
            if found is None:
                self.other_files += 1
                continue
            shard = str(sample.get("__url__", "")).rpartition("/")[2]
            yield ImageItem(name=f"{shard}/{sample['__key__']}.{found}", image=sample[found])
        for shard, why in broken.items():
            yield ImageItem(name=shard, image=b"", fault=f"this shard breaks off: {printable(why)}")


def shard_paths(pattern: str) -> list[str]:
    """Return the shards that `{0000..0099}`, `*` or a file names, one a line; UsageError if no file matches."""
    if pattern.endswith(LISTS) and os.path.isfile(pattern):
        text = Path(pattern).read_text(encoding="utf-8", errors="surrogateescape")
        entries = filter(None, map(str.strip, text.splitlines()))
        return [shard for entry in entries if not entry.startswith("#") for shard in _expanded(entry)]
    return _expanded(pattern)


def _expanded(pattern: str) -> list[str]:
    if os.path.isfile(pattern):
        return [pattern]
    if "{" in pattern:
        _package("webdataset", "shards")
        import braceexpand  # comes with webdataset

        return list(braceexpand.braceexpand(pattern))
    if "://" in pattern or not glob.has_magic(pattern):
        return [pattern]
    found = sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise UsageError(f"no file matches {printable(pattern)}")
    return found


_HUB = re.compile(
    r"hf://(?:datasets/)?(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?(?::(?P<split>[\w\[\]%:+-]+))?"
)
_SAVED = ("dataset_dict.json", "state.json")
_FILES = {".parquet": "parquet", ".arrow": "arrow"}


def is_arrow(data: str) -> bool:
    """Whether `data` is something that the `datasets` library opens."""
    path = Path(data)
    local = os.path.isfile(path) if path.suffix in _FILES else any(os.path.isfile(path / name) for name in _SAVED)
    return local or data.startswith("hf://")


class ArrowSource(MapStyleSource):
    """The image column of a dataset of the `datasets` library, read from its memory-mapped table.

    Args:
        data: "hf://owner/name@revision:split" (revision and split may be left out), a folder that `save_to_disk`
            wrote, or a parquet or arrow file.
        offline: open no connection.

    Raises:
        UsageError: `datasets` is not installed, or the reference cannot be parsed.
        WeightsUnavailable: it is not on this machine, and could not or must not be fetched.
        InputError: it cannot be opened, or has no column of images.
    """

    def __init__(self, data: str, *, offline: bool = False) -> None:
        super().__init__(data)
        with _hub_offline() if offline else contextlib.nullcontext():
            table = _open(data)
        from datasets import Image

        columns = [name for name, kind in table.features.items() if isinstance(kind, Image)]
        if not columns:
            raise InputError(f"{printable(data)} has no column of images, only {', '.join(map(repr, table.features))}")
        if len(columns) > 1:
            self.notes.append(f"{printable(data)} has {len(columns)} columns of images; {columns[0]!r} is used")
        if not len(table):
            raise InputError(f"there is no image in {printable(data)}")
        # Undecoded: images are opened by the same code as any other.
        self._column = columns[0]
        self._table = table.select_columns(columns[:1]).cast_column(self._column, Image(decode=False))

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> ImageItem:
        found = self._table[index][self._column] or {}
        content = found.get("bytes")
        # An empty row is a bad image like any other.
        return ImageItem(name=f"row {index}", image=(found.get("path") or b"") if content is None else content)

    @property
    def fingerprint(self) -> str:
        return str(self._table._fingerprint)


@contextlib.contextmanager
def _hub_offline() -> Iterator[None]:
    """Set the offline switches of huggingface_hub and datasets, which are read at import."""
    from huggingface_hub import constants

    config = _package("datasets", "datasets").config
    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before


def _package(name: str, extra: str) -> Any:
    """Import an optional package, or raise UsageError."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UsageError(f"{extra} need one more package", hint=f"pip install 'e4t[{extra}]'") from error


def _open(data: str) -> Any:
    datasets = _package("datasets", "datasets")
    datasets.disable_progress_bars()
    path = Path(data)
    try:
        if data.startswith("hf://"):
            parts = _HUB.fullmatch(data)
            if parts is None:
                raise UsageError(f"{printable(data)!r} is no dataset", hint="for example: hf://owner/name:train")
            found = datasets.load_dataset(parts["repo"], revision=parts["revision"], split=parts["split"])
        elif os.path.isfile(path):
            found = datasets.load_dataset(_FILES[path.suffix], data_files=str(path), split="train")
        else:
            found = datasets.load_from_disk(str(path))
    except E4TError:
        raise
    except ConnectionError as error:
        message = f"the dataset {printable(data)} could not be fetched: {printable(str(error))}"
        raise WeightsUnavailable(message) from error
    except Exception as error:  # the library raises whatever its readers raise
        message = f"{printable(data)} cannot be opened as a dataset: {printable(str(error), limit=200)}"
        raise InputError(message) from error
    if isinstance(found, dict):
        return found["train" if "train" in found else next(iter(found))]
    return found
