"""The column of images in an Arrow or parquet table, through the `datasets` library."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from e4t_cli.datasets.sources import ImageItem, MapStyleSource, is_image, optional_package
from e4t_cli.errors import E4TError, InputError, UsageError, WeightsUnavailable, printable
from e4t_cli.system_memory import memory_ran_out

_HUB = re.compile(
    r"hf://(?:datasets/)?(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?(?::(?P<split>[\w\[\]%:+-]+))?"
)
_SAVED = ("dataset_dict.json", "state.json")
_TRIED = 20  # rows and columns that are looked at
_FILES = {".parquet": "parquet", ".arrow": "arrow"}


def is_arrow(data: str) -> bool:
    """Whether `data` is something that the `datasets` library opens."""
    path = Path(data)
    if path.suffix.lower() in _FILES and not os.path.isdir(path):
        return os.path.isfile(path) or glob.has_magic(data)
    return data.startswith("hf://") or any(os.path.isfile(path / name) for name in _SAVED)


class ArrowSource(MapStyleSource):
    """The image column of a dataset of the `datasets` library, read from its memory-mapped table.

    Args:
        data: "hf://owner/name@revision:split" (revision and split may be left out), a folder that `save_to_disk`
            wrote, or parquet or arrow files: one, or a pattern with "*".
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

        if not len(table):
            raise InputError(f"there is no image in {printable(data)}")
        columns = [
            name for name, kind in table.features.items() if isinstance(kind, Image) or _holds_images(table, name)
        ]
        if not columns:
            raise _no_images(data, table)
        if len(columns) > 1:
            self.notes.append(f"{printable(data)} has {len(columns)} columns of images; {columns[0]!r} is used")
        # Undecoded: images are opened by the same code as any other.
        self._column = columns[0]
        self._table = table.select_columns(columns[:1]).cast_column(self._column, Image(decode=False))

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> ImageItem:
        try:
            found = self._table[index][self._column] or {}
        except Exception as error:  # a damaged table, of which pyarrow reads a row when it is asked for
            if memory_ran_out(error):
                raise
            return ImageItem(name=f"row {index}", image=b"", fault=f"it cannot be read: {printable(str(error))}")
        content = found.get("bytes")
        # An empty row is a bad image like any other.
        return ImageItem(name=f"row {index}", image=(found.get("path") or b"") if content is None else content)

    @property
    def fingerprint(self) -> str:
        return str(self._table._fingerprint)


def _holds_images(table: Any, name: str) -> bool:
    """Whether a column without the hub's metadata has images: their bytes, or bytes and path."""
    kind = table.features[name]
    fields = {key: getattr(value, "dtype", "") for key, value in kind.items()} if isinstance(kind, dict) else {}
    if set(fields) == {"bytes", "path"}:
        return "binary" in fields["bytes"]
    if "binary" not in str(getattr(kind, "dtype", "")):
        return False
    found = next(
        (row for row in table.select_columns([name]).select(range(min(len(table), _TRIED)))[name] if row), b""
    )
    return is_image(found)


def _no_images(data: str, table: Any) -> InputError:
    """Return the error for a table without a column of images, and what to do about the column that comes closest."""
    shown, hint = printable(data), None
    names = ", ".join(printable(repr(name), limit=60) for name in list(table.features)[:_TRIED])
    for name, kind in table.features.items():
        if "List" in type(kind).__name__ or isinstance(kind, list):
            hint = f"{printable(repr(name))} has a list in each row; one image a row is read"
        elif str(getattr(kind, "dtype", "")) in ("string", "large_string"):
            first = table.select(range(min(len(table), _TRIED)))[name]
            if any(str(value).startswith(("http://", "https://")) for value in first):
                hint = (
                    f"{printable(repr(name))} has addresses, which are not fetched; img2dataset makes shards of them"
                )
    return InputError(f"{shown} has no column of images, only {names}", hint=hint)


@contextlib.contextmanager
def _hub_offline() -> Iterator[None]:
    """Set the offline switches of huggingface_hub and datasets, which are read at import."""
    from huggingface_hub import constants

    config = optional_package("datasets", "datasets").config
    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before


def _open(data: str) -> Any:
    datasets = optional_package("datasets", "datasets")
    datasets.disable_progress_bars()
    path = Path(data)
    try:
        if data.startswith("hf://"):
            parts = _HUB.fullmatch(data)
            if parts is None:
                raise UsageError(f"{printable(data)!r} is no dataset", hint="for example: hf://owner/name:train")
            found = datasets.load_dataset(parts["repo"], revision=parts["revision"], split=parts["split"])
        elif glob.has_magic(data) and not os.path.exists(path):
            files = sorted(glob.glob(data, recursive=True))
            if not files:
                raise UsageError(f"no file matches {printable(data)}")
            files = [glob.escape(file) for file in files]
            found = datasets.load_dataset(_FILES[path.suffix.lower()], data_files=files, split="train")
        elif os.path.isfile(path):
            found = datasets.load_dataset(_FILES[path.suffix.lower()], data_files=glob.escape(data), split="train")
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
