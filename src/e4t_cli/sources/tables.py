"""A dataset of the `datasets` library: from the hub, saved to a folder, or one parquet file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from e4t_cli.errors import E4TError, InputError, UsageError, WeightsUnavailable, printable

from .items import Item

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

    def __getitem__(self, index: int) -> Item:
        found = self._table[index][self._column] or {}
        name = f"row {index}"
        if found.get("bytes") is not None:
            return Item(name=name, picture=found["bytes"])
        # An empty row is a bad picture like any other.
        return Item(name=name, picture=found["path"] if found.get("path") else b"")

    def __iter__(self) -> Iterator[Item]:
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
