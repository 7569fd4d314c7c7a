"""The words that a base knows, where they are few: vocabulary.json in its folder, phrases by group."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from e4t_cli.errors import IntegrityError, printable

FILE = "vocabulary.json"
MAX_BYTES = 1_000_000
OTHER = "other"  # the group of words that change nothing in an image


def read_vocabulary(folder: Path) -> dict[str, list[str]] | None:
    """Return the phrases that a base was trained on, by group, or None if it has no such list.

    Raises:
        IntegrityError: the file cannot be used.
    """
    path = folder / FILE
    if not os.path.isfile(path):
        return None
    try:
        with path.open("rb") as file:
            groups = json.loads(file.read(MAX_BYTES + 1))
        if not isinstance(groups, dict):
            raise ValueError("it is not a table")
        lists = [phrases if isinstance(phrases, list) else [None] for phrases in groups.values()]
        if not all(isinstance(phrase, str) for phrases in lists for phrase in phrases):
            raise ValueError("its groups are not lists of phrases")
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{printable(str(path))} cannot be used: {printable(str(error))}") from error
    return groups


def words_of(groups: dict[str, list[str]]) -> frozenset[str]:
    """Return all words of a vocabulary, in lower case."""
    return frozenset(
        word for phrases in groups.values() for phrase in phrases for word in re.findall(r"[^\W_]+", phrase.lower())
    )
