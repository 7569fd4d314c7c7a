"""e4t-batch.jsonl: which images of a batch are finished, beside them, one JSON object a line.

A line is appended before its file is put in place, so that a kill at any moment loses no file and repeats none: an
image is finished if its line is there, and a file of the recorded name and size. Paths are relative to the folder,
which can be moved. Each process of several appends to a file of its own; all of them are read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from e4t_cli.files import file_error

SCHEMA = 1


class Manifest:
    """The manifest of one folder.

    Args:
        folder: need not exist before something is added.
        rank: of this process among several.

    Raises:
        E4TError: it is there and cannot be read.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self.file = folder / (f"e4t-batch.{rank}.jsonl" if rank else "e4t-batch.jsonl")
        self._entries: dict[str, dict[str, Any]] = {}
        for path in sorted(folder.glob("e4t-batch*.jsonl")):
            try:
                lines = path.read_bytes().split(b"\n")
            except OSError as error:
                raise file_error(error, path, reading=True) from error
            for line in lines:
                if (entry := _entry(line)) is not None and (self._path(entry) or entry["key"] not in self._entries):
                    self._entries[entry["key"]] = entry

    def path_of(self, key: str) -> Path | None:
        """Return the file with the image or concept of a key, None if there is none, or another one in its place."""
        entry = self._entries.get(key)
        return None if entry is None else self._path(entry)

    def lists(self, path: Path) -> bool:
        """Whether a file was written as the manifest says."""
        name = self._relative(path)
        return any(entry.get("path") == name for entry in self._entries.values())

    def is_withheld(self, key: str) -> bool:
        """Whether the safety checker withheld the image of a key."""
        return bool(self._entries.get(key, {}).get("withheld"))

    def add(self, key: str, path: Path | None, *, size: int | None = None, **about: Any) -> None:
        """Append an entry.

        Args:
            path: the file that is written next; None for an image that was withheld.
            size: its size in bytes, if that is known.
            about: further values for the reader of the manifest.
        """
        entry: dict[str, Any] = {"schema": SCHEMA, "key": key}
        if path is None:
            entry["withheld"] = True
        else:
            entry |= {"path": self._relative(path), **({} if size is None else {"bytes": size})}
        self._append({**entry, **about})
        self._entries[key] = entry

    def _append(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        try:
            with self.file.open("ab+", buffering=0) as file:
                # A process that was killed, or a full disk, may have left half a line.
                if end := file.seek(0, os.SEEK_END):
                    file.seek(end - 1)
                    line = line if file.read(1) == b"\n" else b"\n" + line
                if file.write(line) != len(line):
                    raise OSError(28, "No space left on device")
        except OSError as error:
            raise file_error(error, self.file) from error

    def _relative(self, path: Path) -> str:
        try:
            return os.path.relpath(path, self.folder)
        except ValueError:  # on another drive of Windows
            return os.path.abspath(path)

    def _path(self, entry: Mapping[str, Any]) -> Path | None:
        if not isinstance(name := entry.get("path"), str):
            return None
        path = self.folder / name
        try:
            size = path.stat().st_size if os.path.isfile(path) else None
        except (OSError, ValueError):
            return None
        return path if size is not None and entry.get("bytes", size) == size else None


def _entry(line: bytes) -> dict[str, Any] | None:
    """Return what a line holds, None for half a line and for entries of another version."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    known = isinstance(entry, dict) and entry.get("schema") == SCHEMA and isinstance(entry.get("key"), str)
    return entry if known else None
