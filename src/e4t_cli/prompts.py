"""Parses prompts: finds the placeholder, and makes training prompts and file names.

A regular expression finds S*, never the tokenizer: a tokenizer lower-cases, splits "S*" in two and, once it is in its
vocabulary, also finds it inside words. The rule, after NFKC normalization (full-width letters become plain ones):
"S*" in either case, or in angle brackets, that touches neither a letter, a digit or "_" nor a further "*". So `S*`,
`s*`, `S*'s`, `"S*,"`, `S*-style`, `<S*>` are the placeholder; `S *`, `S**`, `aS*`, `S*x` are not.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from e4t_cli.errors import UsageError, printable
from e4t_cli.prompt_weights import read_weights
from e4t_cli.registry.domain import Domain

PLACEHOLDER = "S*"
MAX_PROMPT_LENGTH = 10_000  # characters; far beyond what a text encoder reads (77 tokens), far below what hurts

# Paper silent: the prompt templates of training. After the example of Textual Inversion's list; {} is the concept.
SUBJECT_TEMPLATES = (
    "{}", "a photo of {}", "one photo of {}", "a picture of {}", "an image of {}", "a snapshot of {}",
    "a sharp photo of {}", "a blurry photo of {}", "a bright photo of {}", "a dark photo of {}", "a close-up of {}",
    "a small picture of {}", "a cropped picture of {}", "a good view of {}", "a view of {}", "a good picture of {}",
    "a nice picture of {}", "here is {}", "this is {}", "a depiction of {}", "a rendering of {}",
    "a well-lit picture of {}",
)  # fmt: skip
"""For concepts that are subjects: people, animals, objects."""


@dataclass(frozen=True)
class Prompt:
    """A prompt cut at its placeholders, and where the weight of its words changes."""

    text: str  # the normalized prompt on one line
    segments: tuple[str | None, ...]  # the text between placeholders in order; None stands for a placeholder
    placeholder: str = PLACEHOLDER  # as the user spelled it
    weights: tuple[float, ...] = ()  # of each segment, see `weighted`; empty: all are 1

    def weighted(self) -> Prompt:
        """Return the prompt with its brackets read as weights, see `prompt_weights.read_weights`.

        Raises:
            UsageError: they cannot be.
        """
        pieces = _pieces(self.text, self.placeholder)
        segments, weights = read_weights(pieces, f"the prompt {printable(self.text, limit=60)!r}")
        return replace(self, segments=segments, weights=weights)

    @property
    def placeholders(self) -> int:
        """How often the concept is named."""
        return self.segments.count(None)

    def without_placeholder(self, descriptor: str) -> str:
        """Return the prompt with the descriptor in place of the concept."""
        return "".join(descriptor if part is None else part for part in self.segments)


@dataclass(frozen=True)
class PromptRequest:
    """A prompt with settings of its own; those that are not given are the settings of the whole request.

    Args:
        prompt: as the user wrote it.
        num_images: how many images of it.
        seed: of its first image; tuning does not depend on it.
        sampling: fields of `SamplingConfig` that differ, such as `negative_prompt`.
        source: where it was read, such as "prompts.txt:3"; begins every complaint about it.
    """

    prompt: str
    num_images: int | None = None
    seed: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    @contextmanager
    def located(self) -> Iterator[None]:
        """Begin the message of a `UsageError` that is raised inside with the source."""
        try:
            yield
        except UsageError as error:
            if not self.source:
                raise
            raise UsageError(f"{printable(self.source)}: {error.message}", hint=error.hint) from error


@lru_cache
def word_rule(placeholder: str) -> re.Pattern[str]:
    """Return the pattern that finds a placeholder or another word of its own, by the rule above."""
    core = re.escape(placeholder)
    before = r"(?<![\w*])" if re.match(r"[\w*]", placeholder) else ""
    after = r"(?![\w*])" if re.search(r"[\w*]$", placeholder) else ""
    return re.compile(rf"<{core}>|{before}{core}{after}", re.IGNORECASE)


def check_placeholder(placeholder: str) -> str:
    """Return the normalized placeholder.

    Raises:
        UsageError: it is empty, longer than 32 characters, or contains spaces or controls.
    """
    shown = unicodedata.normalize("NFKC", placeholder)
    if not 1 <= len(shown) <= 32 or any(c.isspace() or not c.isprintable() for c in shown):
        message = f"the placeholder {printable(placeholder)!r} must be one word of at most 32 characters"
        raise UsageError(message, hint='for example: --placeholder "<me>"')
    return shown


def parse_prompt(text: str, placeholder: str = PLACEHOLDER, *, require_placeholder: bool = True) -> Prompt:
    """Find the concept in a prompt.

    Raises:
        UsageError: the prompt is empty, too long, not text, or does not name the concept.
    """
    placeholder = check_placeholder(placeholder)
    plain = plain_text(text)
    if not plain:
        raise UsageError("the prompt is empty", hint=f'for example: "{placeholder} on the beach"')
    segments = tuple(_pieces(plain, placeholder))
    if require_placeholder and None not in segments:
        hint = f'for example: "{placeholder} as an astronaut" (in quotes: shells expand *)'
        message = f"the prompt {printable(plain, limit=60)!r} does not name the concept, {placeholder}"
        raise UsageError(message, hint=hint)
    return Prompt(plain, segments, placeholder)


def _pieces(plain: str, placeholder: str) -> list[str | None]:
    """Return the parts of a text with None between them, and no empty parts."""
    separated = [piece for part in word_rule(placeholder).split(plain) for piece in (None, part)][1:]
    return [piece for piece in separated if piece != ""]


def plain_text(text: str, what: str = "the prompt") -> str:
    """Return a prompt normalized, on one line.

    Raises:
        UsageError: it is too long or not text; `what` is its name in the message.
    """
    # Line breaks and tabs are spaces to a text encoder; other control characters are refused.
    plain = " ".join(unicodedata.normalize("NFKC", text).split())
    if len(plain) > MAX_PROMPT_LENGTH:
        limits = f"{MAX_PROMPT_LENGTH:,} is the limit, and a text encoder reads about 300"
        raise UsageError(f"{what} has {len(plain):,} characters; {limits}")
    categories = {unicodedata.category(character) for character in plain}
    if "Cs" in categories:  # Python's form of bytes that are no text in the locale
        message = f"{what} {printable(plain, limit=60)!r} is not text in the encoding of this terminal"
        raise UsageError(message, hint="set LC_ALL=C.UTF-8, or PYTHONUTF8=1")
    if "Cc" in categories:
        raise UsageError(f"{what} {printable(plain, limit=60)!r} contains control characters")
    return plain


def parse_negative_prompt(text: str, placeholder: str, *, weights: bool = False) -> Prompt:
    """Return a negative prompt, which may be empty.

    Args:
        placeholder: what it cannot name; "" if that was checked before.
        weights: read its brackets as `Prompt.weighted` does.

    Raises:
        UsageError: it is too long, not text, or names the concept, or its weights cannot be read.
    """
    plain = plain_text(text, "the negative prompt")
    what = f"the negative prompt {printable(plain, limit=60)!r}"
    if placeholder and word_rule(placeholder).search(plain):
        message = f"{what} names the concept, {placeholder}"
        raise UsageError(message, hint="say in other words what the images should not show")
    pieces: tuple[str | None, ...] = (plain,) if plain else ()
    segments, own = read_weights(pieces, what) if weights else (pieces, ())
    return Prompt(plain, segments, placeholder, own)


# What other programs read as weights, where it can mean nothing else.
_WEIGHTS = re.compile(
    r"""\( [^()\[\]]* [^()\[\]\d\s] \s*:\s* [-+]?\d*\.?\d+ \s*\)   # (word:1.2), and not (at 10:30)
    | \(\([^()]+\)\)+ | \[\[[^\[\]]+\]\]+      # ((word)), [[word]]""",
    re.VERBOSE,
)
# As schedules, alternatives and files.
_FOREIGN = re.compile(
    r"""\[[^\[\]]* : \s*\d*\.?\d+\s* \]         # [from:to:0.5]
    | \[[^\[\]|]+ \| [^\[\]]+\]               # [one|other]
    | <(?:lora|lyco|hypernet):[^<>]+>         # <lora:file:0.8>
    | \bembedding:[\w./-]+""",
    re.VERBOSE,
)
_FOREIGN_WORDS = re.compile(r"\b(?:BREAK|AND)\b")


def weight_syntax(text: str) -> list[str]:
    """Return the parts of a prompt that other programs read as weights: "(word:1.2)", "((word))"."""
    return list(dict.fromkeys(part.group() for part in _WEIGHTS.finditer(text)))


def foreign_syntax(text: str) -> list[str]:
    """Return the parts of a prompt that other programs read neither as words nor as weights: "<lora:file:0.8>"."""
    found = [part.group() for part in _FOREIGN.finditer(text)]
    if text != text.upper():  # a prompt in capitals has an AND of its own
        found += _FOREIGN_WORDS.findall(text)
    return list(dict.fromkeys(found))


def unknown_words(prompts: Iterable[Prompt], known: Container[str]) -> list[str]:
    """Return the words of prompts that are not among the known ones, which are in lower case.

    Placeholders are no words, nor is what has no letter.
    """
    found: dict[str, None] = {}
    for prompt in prompts:
        for segment in prompt.segments:
            text = re.sub(r"['’]s\b", "", (segment or "").lower())
            # Letters with their marks, and digits, of any script.
            parts = "".join(c if c in "'’" or unicodedata.category(c)[0] in "LMN" else " " for c in text).split()
            words = (part.strip("'’") for part in parts)
            found |= dict.fromkeys(word for word in words if not word.isnumeric() and word not in known)
    return [word for word in found if word]


def training_templates(domain: Domain) -> tuple[str, ...]:
    """Return the prompt templates a domain is trained with."""
    return domain.prompt_templates or SUBJECT_TEMPLATES


def training_prompts(templates: tuple[str, ...]) -> tuple[Prompt, ...]:
    """Return the templates as prompts that name the concept."""
    return tuple(parse_prompt(template.replace("{}", PLACEHOLDER)) for template in templates)


def slug(text: str, *, limit: int = 60, default: str = "picture") -> str:
    """Return an ASCII piece of a file name: "S* as an astronaut" → "s-as-an-astronaut"; `default` if none is left."""
    ascii_only = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", ascii_only).strip("-")
    if len(words) > limit:
        words = words[: limit + 1].rpartition("-")[0] or words[:limit]
    return words or default
