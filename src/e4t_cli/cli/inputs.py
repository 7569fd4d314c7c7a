"""Prompts from arguments, a file and stdin, checked before anything heavy is loaded."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from e4t_cli.errors import InputError, UsageError, printable
from e4t_cli.prompts import PLACEHOLDER, parse_prompt

STDIN = "-"
LONGEST_FILE = 4_000_000  # bytes; a list of prompts, not a book


def gather_prompts(
    arguments: Sequence[str],
    file: str | None,
    *,
    placeholder: str | None,
    stdin_taken: bool = False,
) -> list[str]:
    """All prompts, in the order given: arguments first, then the file's lines.

    Args:
        arguments: prompts as typed; ``-`` stands for the lines of stdin.
        file: ``-f``, a text file with one prompt a line, or ``-``.
        placeholder: the word that stands for the concept; None if only the concept's file knows.
        stdin_taken: the photo comes from stdin already.

    Raises:
        UsageError: two inputs want stdin, or a prompt does not name the concept.
        InputError: the file cannot be read as text.
    """
    if [*arguments, file].count(STDIN) + stdin_taken > 1:
        raise UsageError("only one input can be - (stdin)", hint="give the others as files")
    prompts: list[str] = []
    for argument in arguments:
        prompts += _lines(STDIN) if argument == STDIN else [argument]
    if file is not None:
        prompts += _lines(file)
    for prompt in prompts if placeholder is not None else ():
        try:
            parse_prompt(prompt, placeholder or PLACEHOLDER)
        except UsageError as error:
            hint = _shell_hint(arguments, placeholder or PLACEHOLDER) or error.hint
            raise UsageError(error.message, hint=hint) from None
    return prompts


def _lines(source: str) -> list[str]:
    shown = "stdin" if source == STDIN else printable(source)
    try:
        if source == STDIN:
            data = sys.stdin.buffer.read(LONGEST_FILE + 1)
        else:
            with Path(source).open("rb") as file:
                data = file.read(LONGEST_FILE + 1)
        if len(data) > LONGEST_FILE:
            raise InputError(f"{shown} is longer than {LONGEST_FILE // 10**6} MB of prompts")
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{shown} is not UTF-8 text: {error.reason}") from None
    except FileNotFoundError:
        raise UsageError(f"there is no file {shown}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{shown} cannot be read: {error}") from None
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise InputError(f"{shown} has no prompts; put one on each line")
    return found


def _shell_hint(arguments: Sequence[str], placeholder: str) -> str | None:
    """Recognise a prompt without quotes: the shell split it, and may have expanded ``S*``.

    ``e4t personalize face me.jpg S* as an astronaut`` arrives as single words, and beside
    ``Screenshot.png`` the shell puts that name where ``S*`` stood.
    """
    if any(Path(word).exists() for word in arguments if 0 < len(word) < 256 and "\0" not in word):
        return (
            f"a file's name stands in place of a prompt: quote the prompt, "
            f'as in "{placeholder} as an astronaut", so that the shell does not expand the *; '
            "or choose another word with --placeholder '<me>'"
        )
    if len(arguments) > 1 and all(len(word.split()) == 1 for word in arguments):
        first = placeholder if placeholder.casefold() != arguments[0].casefold() else arguments[0]
        words = [word for word in arguments if word.casefold() != placeholder.casefold()]
        return f'quote the prompt: "{printable(" ".join([first, *words]))}"'
    return None


def sampling_of(**given: Any) -> dict[str, Any]:
    """Only what was asked for; the rest is the library's to decide."""
    return {name: value for name, value in given.items() if value is not None}
