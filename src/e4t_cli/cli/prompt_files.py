"""Prompts from arguments, from files and from stdin, checked before torch is imported.

A file has one prompt a line. Empty lines and lines that begin with # are passed over. Behind a prompt its own options
can follow, in place of those of the command line:

    S* as an astronaut
    S* at sea, don't crop  --num-images 4 --seed 7 --negative-prompt people, boats
    --prompt "S* on a sign that says --sale" --steps 30

The prompt ends before the first word that begins with two dashes and a letter; a value reaches to the next such word,
or is in quotes. Unlike in a shell, an apostrophe is a letter. Every complaint begins with the file and the line.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from e4t_cli.errors import InputError, UsageError, printable
from e4t_cli.files import file_error
from e4t_cli.prompts import PLACEHOLDER, PromptRequest, parse_prompt

STDIN = "-"
MAX_FILE_BYTES = 4_000_000  # a list of prompts, not a book


# Behind `--` an option arrives as a prompt.
_LATE = re.compile(r"--?[A-Za-z][\w-]*(=.*)?|--", re.DOTALL)


def gather_prompts(
    arguments: Sequence[str], file: str | None, *, placeholder: str | None, stdin_taken: int = 0
) -> list[PromptRequest]:
    """Return all prompts in the order given: arguments first, then the file's lines; ``-`` is stdin.

    Args:
        placeholder: the word that stands for the concept; None if only the concept's file knows.
        stdin_taken: how many photos, masks and pictures are to come from stdin.

    Raises:
        UsageError: two inputs want stdin, an option is behind `--`, a prompt does not name the concept, or a line has
            an option that is none.
        InputError: the file cannot be read as text.
    """
    if [*arguments, file].count(STDIN) + stdin_taken > 1:
        raise UsageError("only one input can be - (stdin)", hint="give the others as files")
    if late := next(
        (one for one in arguments if _LATE.fullmatch(one) and (placeholder or PLACEHOLDER) not in one), ""
    ):
        shown = f"{printable(late)} " if late != "--" else ""
        late_hint = f'options come before it: e4t … {shown}… -- "{printable(placeholder or PLACEHOLDER)} …"'
        raise UsageError(f"{printable(late)} comes after --, where everything is a prompt", hint=late_hint)
    prompts = [line for one in arguments for line in (_lines(STDIN) if one == STDIN else [PromptRequest(one)])]
    prompts += _lines(file) if file is not None else []
    if placeholder is not None:
        word = placeholder or PLACEHOLDER
        for prompt in prompts:
            try:
                with prompt.located():
                    parse_prompt(prompt.prompt, word)
            except UsageError as error:
                hint = None if prompt.source else _shell_hint(arguments, word)
                raise UsageError(error.message, hint=hint or error.hint) from None
    return prompts


def _lines(source: str) -> list[PromptRequest]:
    """Return the prompts of a file or of stdin."""
    shown = "stdin" if source == STDIN else printable(source)
    try:
        text = _read(source, shown).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{shown} is not UTF-8 text: {error.reason}") from None
    found = []
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            place = PromptRequest("", source=f"{shown}:{number}")
            with place.located():
                found.append(parse_line(line.strip(), source=place.source))
    if not found:
        raise InputError(f"{shown} has no prompts; put one on each line")
    return found


def _read(source: str, shown: str) -> bytes:
    """Return the bytes of a file, a pipe (``-f <(...)``) or stdin."""
    if source == STDIN and (sys.stdin is None or sys.stdin.closed):  # `<&-`
        raise UsageError("stdin is closed: no prompts can be read from it", hint="give a file: -f prompts.txt")
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if source == STDIN else open(source, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise file_error(error, shown, reading=True) from None
    if len(data) > MAX_FILE_BYTES:
        raise InputError(f"{shown} is longer than {MAX_FILE_BYTES // 10**6} MB of prompts")
    return data


# ── one line ──

_OPTION = re.compile(r"(?:^|(?<=\s))--(?=[A-Za-z])")
_QUOTED = re.compile(r"""("(?:[^"\\]|\\.)*"|'[^']*')(?:$|\s+(?=$|--[A-Za-z]))""")


def parse_line(line: str, *, source: str = "") -> PromptRequest:
    """Return the prompt of one line with its options; raises UsageError for an option or a value that is none."""
    start = _OPTION.search(line)
    prompt = line[: start.start()].strip() if start else line
    given: dict[str, Any] = {}
    for written, value in _options(line[start.start() :] if start else ""):
        name = _ALIASES.get(written.replace("_", "-"), written.replace("_", "-"))
        if name not in OPTIONS:
            known = ", ".join(f"--{one}" for one in OPTIONS)
            raise UsageError(f"there is no option --{written} for a prompt", hint=f"there are {known}")
        if name in given:
            raise UsageError(f"--{written} is given twice")
        try:
            given[name] = OPTIONS[name](value)
        except ValueError as error:
            other = "; a negative prompt is --negative-prompt" if written == "n" else ""
            raise UsageError(f"--{written} {printable(value, limit=40)}: {error}{other}") from None
    own = given.pop("prompt", "")
    if prompt and own:
        raise UsageError("the prompt is there twice, before --prompt and behind it")
    number, seed = given.pop("num-images", None), given.pop("seed", None)
    sampling = {name.replace("-", "_"): value for name, value in given.items()}
    return PromptRequest(prompt or own, num_images=number, seed=seed, sampling=sampling, source=source)


def _options(text: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the value of every option."""
    while text:
        name, text = re.match(r"--([A-Za-z][\w-]*)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
        text = text.lstrip().removeprefix("=").lstrip()
        if quoted := _QUOTED.match(text):
            value, text = quoted[1], text[quoted.end() :]
            yield name, re.sub(r"\\(.)", r"\1", value[1:-1]) if value[0] == '"' else value[1:-1]
            continue
        following = _OPTION.search(text)
        end = following.start() if following else len(text)
        yield name, text[:end].strip()
        text = text[end:]


def _number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    what = "a whole number" if kind is int else "a number"

    def read(value: str) -> float:
        with contextlib.suppress(ValueError):
            # Python's own reading takes 1_000 and digits of other scripts.
            if value.isascii() and "_" not in value and low <= (number := kind(value)) <= high:
                return number
        raise ValueError(f"it takes {what}, {low:g} to {high:.10g}")

    return read


def _switch(value: str) -> bool:
    if value not in ("", "on", "off"):
        raise ValueError("it takes nothing, on or off")
    return value != "off"


def _text(value: str) -> str:
    if not value:
        raise ValueError("it takes a text")
    return value


OPTIONS: dict[str, Callable[[str], Any]] = {
    "prompt": _text,
    "num-images": _number(int, 1, 10_000),
    "seed": _number(int, 0, 2**32 - 1),
    "negative-prompt": str,
    "steps": _number(int, 1, 1000),
    "guidance": _number(float, 0, 100),
    "scheduler": _text,
    "concept-scale": _number(float, 0, 2),
    "prompt-weights": _switch,
}
"""The options of a line, and how their values are read; `SamplingConfig` has the same limits."""
# Short forms, and what other programs that read prompts from files call them.
_ALIASES = {
    "n": "num-images", "s": "seed", "neg": "negative-prompt",
    "n-iter": "num-images", "cfg-scale": "guidance", "sampler-name": "scheduler",
}  # fmt: skip


# ── prompts without quotes ──


def _shell_hint(arguments: Sequence[str], placeholder: str) -> str | None:
    """Return a hint for a prompt without quotes: the shell split it, and may have expanded ``S*``.

    ``e4t personalize face me.jpg S* as an astronaut`` arrives as single words, and in a folder with ``Screenshot.png``
    the shell puts that name where ``S*`` stood.
    """
    if any(os.path.exists(word) for word in arguments if 0 < len(word) < 256 and "\0" not in word):
        return (
            f'a file\'s name stands in place of a prompt: quote the prompt, as in "{placeholder} as an astronaut", '
            "so that the shell does not expand the *; or choose another word with --placeholder '<me>'"
        )
    if len(arguments) > 1 and all(len(word.split()) == 1 for word in arguments):
        first = placeholder if placeholder.casefold() != arguments[0].casefold() else arguments[0]
        words = [word for word in arguments if word.casefold() != placeholder.casefold()]
        return f'quote the prompt: "{printable(" ".join([first, *words]))}"'
    return None
