"""Jobs of ``e4t batch`` from a JSONL file: one JSON object a line, checked before torch is imported.

    {"domain": "face", "image": "a.jpg", "prompts": ["S* at sea"], "seed": 1, "n": 2, "save": "a.e4t"}

Fields are named as the options of ``e4t personalize``; what a line does not say is that of the command line. Paths are
relative to the file's folder. Every complaint begins with the file and the line, and names the field.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, cast

from e4t_cli.api.jobs import Job
from e4t_cli.cli.prompt_files import OPTIONS, STDIN
from e4t_cli.errors import InputError, UsageError, printable
from e4t_cli.files import file_error
from e4t_cli.prompts import PromptRequest

MAX_FILE_BYTES = 200_000_000
BATCH_WIDE = {
    "base", "device", "dtype", "vram", "threads", "offline", "accept_license", "lora", "embedding", "vae", "force",
    "no_safety_checker", "no_metadata", "json", "quiet", "verbose", "dry_run",
}  # fmt: skip
"""Options of the command line that hold for all jobs."""


@dataclass(frozen=True, kw_only=True)
class FileJob(Job):
    """A job whose results are files.

    Args:
        out: the folder for images.
        name: beginning of their names; None for the photo's.
        save: the concept's file; None saves none.
    """

    out: Path = Path("outputs")
    name: str | None = None
    save: Path | None = None


def read_jobs(source: str, defaults: FileJob) -> list[FileJob]:
    """Return the jobs of a JSONL file, ``-`` is stdin; empty lines are passed over.

    Args:
        defaults: what holds for a line that does not say otherwise.

    Raises:
        UsageError: a line is no JSON, or a field is unknown or cannot be.
        InputError: the file cannot be read as text, or has no jobs.
    """
    shown = "stdin" if source == STDIN else printable(source)
    folder = Path() if source == STDIN else Path(source).parent
    try:
        text = _read(source, shown).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{shown} is not UTF-8 text: {error.reason}") from None
    jobs = [
        _job(line, f"{shown}:{number}", number, folder, defaults)
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    if not jobs:
        raise InputError(f"{shown} has no jobs; put one on each line", hint=EXAMPLE)
    return jobs


EXAMPLE = '{"domain": "face", "image": "me.jpg", "prompts": ["S* as an astronaut"]}'


def _read(source: str, shown: str) -> bytes:
    if source == STDIN and (sys.stdin is None or sys.stdin.closed):  # `<&-`
        raise UsageError("stdin is closed: no jobs can be read from it", hint="name a file: e4t batch jobs.jsonl")
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if source == STDIN else open(source, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise file_error(error, shown, reading=True) from None
    if len(data) > MAX_FILE_BYTES:
        raise InputError(f"{shown} is longer than {MAX_FILE_BYTES // 10**6} MB of jobs")
    return data


# ── one line ──


def _job(line: str, source: str, number: int, folder: Path, defaults: FileJob) -> FileJob:
    try:
        found = json.loads(line, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        at = f"{error.msg}, at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UsageError(f"{source}: no JSON: {printable(at, limit=120)}", hint=f"such as {EXAMPLE}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{source}: a line is one JSON object, not {_kind(found)}", hint=f"such as {EXAMPLE}")
    fields: dict[str, Any] = {}
    options: dict[str, Any] = {}
    sampling: dict[str, Any] = {}
    for written, value in _named(found, source):
        if written in _OPTIONS:
            name, read = _OPTIONS[written]
            options[name] = _value(read, value, written, source)
        elif written in _SAMPLING:
            sampling[written] = _value(_SAMPLING[written], value, written, source)
        elif written in _FIELDS:
            name, read = _FIELDS[written]
            fields[name] = _value(read, value, written, source)
        else:
            _unknown(written, source, [*_FIELDS, *_SAMPLING, *_OPTIONS])
    for name in ("image", "out", "save"):
        if name in fields:
            fields[name] = _placed(folder, fields[name])
    if "domain" in fields and os.path.sep in fields["domain"]:
        fields["domain"] = str(folder / fields["domain"])
    if "mask" in options:
        options["mask"] = [one if _is_word(one) else str(folder / one) for one in options["mask"]]
    fields |= {name: Path(fields[name]) for name in ("out", "save") if name in fields}
    for name in ("domain", "image"):
        if not fields.get(name, getattr(defaults, name)):
            raise UsageError(f"{source}: the field {name!r} is missing", hint=f"such as {EXAMPLE}")
    if "prompts" in fields:
        fields["prompts"] = [replace(one, source=source) for one in fields["prompts"]]
    fields["wants_concept"] = bool(fields.get("save", defaults.save))
    changed: dict[str, Any] = {
        **fields, "source": source, "number": number, "options": {**defaults.options, **options},
        "sampling": {**cast(dict[str, Any], defaults.sampling), **sampling},
    }  # fmt: skip
    return replace(defaults, **changed)


def _named(found: Mapping[str, Any], source: str) -> Iterator[tuple[str, Any]]:
    """Yield fields by their names in snake case, without those that are null."""
    seen = set()
    for written, value in found.items():
        name = written.replace("-", "_")
        name = _ALIASES.get(name, name)
        if name in seen:
            raise UsageError(f"{source}: the field {printable(written)!r} is given twice")
        seen.add(name)
        if value is not None:
            yield name, value


def _unknown(name: str, source: str, known: Sequence[str]) -> NoReturn:
    if name in BATCH_WIDE:
        option = f"--{name.replace('_', '-')}"
        raise UsageError(f"{source}: {name!r} holds for all jobs", hint=f"give {option} on the command line")
    message = f"{source}: there is no field {printable(name, limit=40)!r}"
    raise UsageError(message, hint=f"there are {', '.join(sorted(known))}")


def _value(read: Callable[[Any], Any], value: Any, name: str, source: str) -> Any:
    try:
        return read(value)
    except ValueError as error:
        raise UsageError(f"{source}: {name}: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has the same key twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _placed(folder: Path, found: Any) -> Any:
    """Return a path, or each of several, relative to the folder of the jobs' file."""
    return [str(folder / one) for one in found] if isinstance(found, list) else str(folder / found)


def _is_word(mask: str) -> bool:
    from e4t_cli.api.photos import NAMED_MASKS

    return mask in NAMED_MASKS or mask.startswith("words:")


# ── values ──


def _kind(value: object) -> str:
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), "null")


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"it takes a text, not {_kind(value) if value != '' else 'an empty one'}")
    return value


def _any_text(value: Any) -> str:
    return "" if value == "" else _text(value)


def _texts(value: Any) -> list[str]:
    several = value if isinstance(value, list) else [value]
    if not several:
        raise ValueError("it takes one or more, not an empty list")
    return [_text(one) for one in several]


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"it takes true or false, not {_kind(value)}")
    return value


def _option(name: str) -> Callable[[Any], Any]:
    """Return the reader of an option of prompt files, for a JSON number in place of its text."""
    read = OPTIONS[name]

    def checked(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"it takes a number, not {_kind(value)}")
        return read(repr(value))

    return checked


def _seed(value: Any) -> Any:
    one = _option("seed")
    return [one(each) for each in value] if isinstance(value, list) and value else one(value)


def _face(value: Any) -> str | int:
    return value if isinstance(value, int) and not isinstance(value, bool) else _text(value)


def _steps(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("it takes a whole number, 0 or more")
    return value


def _prompts(value: Any) -> list[PromptRequest]:
    return [_prompt(one) for one in (value if isinstance(value, list) else [value])]


def _prompt(value: Any) -> PromptRequest:
    """Return a prompt: a text, or an object with the prompt and options of its own."""
    if not isinstance(value, dict):
        return PromptRequest(_text(value))
    given: dict[str, Any] = {}
    for written, one in value.items():
        name = "num_images" if written == "n" else written.replace("-", "_")
        read = {"prompt": _text, "num_images": _option("num-images"), "seed": _option("seed"), **_SAMPLING}.get(name)
        if read is None:
            raise ValueError(f"a prompt has no field {printable(written, limit=40)!r}")
        try:
            given[name] = read(one)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if "prompt" not in given:
        raise ValueError('an object has to have the field "prompt"')
    own = {name: given.pop(name) for name in list(given) if name in _SAMPLING}
    return PromptRequest(given["prompt"], given.get("num_images"), given.get("seed"), own)


_ALIASES = {"n": "num_images", "images": "image", "prompt": "prompts"}
_FIELDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "domain": ("domain", _text),
    "image": ("image", _texts),
    "prompts": ("prompts", _prompts),
    "num_images": ("num_images_per_prompt", _option("num-images")),
    "seed": ("seed", _seed),
    "placeholder": ("placeholder", _text),
    "out": ("out", _text),
    "name": ("name", _text),
    "save": ("save", _text),
}
_SAMPLING: dict[str, Callable[[Any], Any]] = {
    "steps": _option("steps"),
    "guidance": _option("guidance"),
    "scheduler": _text,
    "negative_prompt": _any_text,
    "concept_scale": _option("concept-scale"),
    "prompt_weights": _flag,
}
_OPTIONS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "mask": ("mask", _texts),
    "face": ("face", _face),
    "no_align": ("align", lambda value: not _flag(value)),
    "require_face": ("require_face", _flag),
    "strict": ("strict", _flag),
    "tuning": ("tuning", _text),
    "tune_steps": ("tune_steps", _steps),
    "keep_weights": ("keep_weights", _flag),
    "domain_base": ("domain_base", _text),
}
