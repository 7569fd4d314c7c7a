"""A folder of pictures: listed once, in one order, whatever is linked where."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from e4t_cli.errors import InputError, printable

from .items import Item

_BESIDE_PICTURES = {
    *(".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".toml"),
    *(".md", ".html", ".npy", ".npz", ".safetensors", ".parquet", ".db", ".ini", ".log", ".py"),
}
"""What data sets keep beside their pictures; passed over without a word about damage."""


class Folder:
    """The files of a folder and its sub-folders, sorted; hidden ones are left out.

    Links to folders are followed, each real folder once, so a loop of links is none. One pass
    over the disk; after that only the names are kept, about a hundred bytes a picture.

    Args:
        root: the folder.

    Raises:
        InputError: it cannot be read, or there is no file in it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.beside = 0
        self.notes: list[str] = []
        self._unreadable: list[str] = []
        self._seen: set[tuple[int, int]] = set()
        self._names: list[str] = list(self._walk(str(root), ""))
        if self._unreadable:
            count = len(self._unreadable)
            folders = "1 folder" if count == 1 else f"{count} folders"
            self.notes.append(f"{folders} could not be read, as {printable(self._unreadable[0])}")
        if not self._names:
            raise InputError(f"there is no picture in {printable(str(root))}")

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Item:
        name = self._names[index]
        return Item(name=name, picture=self.root / name)

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))

    @property
    def title(self) -> str:
        return str(self.root)

    @property
    def fingerprint(self) -> str:
        """Identify the list of names; the content is known only to who reads it."""
        digest = hashlib.sha256()
        for name in self._names:
            digest.update(os.fsencode(name) + b"\0")
        return digest.hexdigest()[:32]

    def _walk(self, folder: str, inside: str) -> Iterator[str]:
        try:
            about = os.stat(folder)
            place = about.st_dev, about.st_ino
            if place in self._seen:
                return
            self._seen.add(place)
            with os.scandir(folder) as entries:
                found = sorted(
                    (entry for entry in entries if not entry.name.startswith(".")),
                    key=lambda entry: entry.name,
                )
        except OSError as error:
            if not inside:
                raise InputError(f"{printable(folder)} cannot be read: {error.strerror}") from error
            self._unreadable.append(inside)
            return
        for entry in found:
            name = f"{inside}{entry.name}"
            if entry.is_dir():
                yield from self._walk(entry.path, f"{name}/")
            elif not entry.is_file() or _suffix(name) in _BESIDE_PICTURES:
                self.beside += 1  # also a dangling link, a FIFO, a socket
            else:
                yield name


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()
