r"""Reads weights of words out of a prompt, in AUTOMATIC1111's syntax.

    (red hat:1.2)   1.2 times        \( \) \[ \] \:   plain characters
    (red hat)       1.1 times        ((red) hat)      groups in groups multiply: red 1.21, hat 1.1
    [red hat]       1 / 1.1 times

A backslash makes the next character plain text, and is itself left out. What that program reads in spite of a mistake
(brackets without their counterpart, `(hat:big)`, `()`) is an error here. Groups of prompt editing, `[hat:0.5]`, are
errors too; alternatives, `[hat|cap]`, are words with the weight of their brackets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from e4t_cli.errors import UsageError

LIMIT = 10.0  # of a word's weight; far beyond what gives images
STEP = 1.1  # of a bracket without a number
HINT = r"\( \) \[ \] \: are plain characters; without --prompt-weights all are"
_CLOSING = {"(": ")", "[": "]"}
_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)\s*", re.ASCII)


@dataclass
class _Group:
    bracket: str
    begin: int  # of its characters
    colon: int | None = None  # the last one that is not in a further group


def read_weights(pieces: Sequence[str | None], what: str) -> tuple[tuple[str | None, ...], tuple[float, ...]]:
    """Return the pieces of a prompt without its brackets, and the weight of each.

    Neighbours of one weight are one piece, so a weight of 1 leaves no trace: "a (red:1.0) hat" is "a red hat". Each
    piece is tokenized by itself, as in AUTOMATIC1111's web UI: a weight within a word cuts it in two, "ta(ble:1.2)" is
    read as the words "ta" and "ble".

    Args:
        pieces: text, and None for each placeholder.
        what: the prompt as messages name it.

    Raises:
        UsageError: brackets without their counterpart, an empty group, no number behind a colon, or a weight that is
            beyond ±10.
    """
    found: list[tuple[str | None, float]] = []  # characters
    groups: list[_Group] = []
    escaped = False
    for character in (one for piece in pieces for one in ([None] if piece is None else piece)):
        if escaped or character is None or character not in "\\()[]:":
            found.append((character, 1.0))
            escaped = False
        elif character == "\\":
            escaped = True
        elif character in "([":
            if groups:
                groups[-1].colon = None
            groups.append(_Group(character, len(found)))
        elif character == ":":
            if groups:
                groups[-1].colon = len(found)
            found.append((character, 1.0))
        else:
            if not groups or _CLOSING[groups[-1].bracket] != character:
                raise UsageError(f"{what} has a {character} that closes nothing", hint=HINT)
            _close(found, groups.pop(), what)
    if groups:
        raise UsageError(f"{what} has a {groups[-1].bracket} that is not closed", hint=HINT)
    if wrong := next((weight for _, weight in found if not abs(weight) <= LIMIT), None):
        raise UsageError(f"{what} has a weight of {wrong:g}; the limit is {LIMIT:g}", hint=HINT)
    return _merged(found)


def _close(found: list[tuple[str | None, float]], group: _Group, what: str) -> None:
    """Multiply the weights of a group's characters, and remove the number from them."""
    weight = STEP if group.bracket == "(" else 1 / STEP
    if group.colon is not None:
        tail = [character for character, _ in found[group.colon + 1 :]]
        # "(the title: a tale)" is text: nobody writes a weight in several words.
        number = None if None in tail else "".join(str(one) for one in tail)
        is_number = number is not None and bool(_NUMBER.fullmatch(number))
        if number is not None and is_number and group.bracket == "[":
            message = f"{what} has a number in square brackets, :{number.strip()}], and cannot change while sampling"
            raise UsageError(message, hint=f"a weight has round brackets, as (word:1.2); {HINT}")
        if number is not None and group.bracket == "(" and len(number.split()) <= 1:
            if not is_number:
                message = f"{what} has no number behind a colon in brackets, :{number.strip()})"
                raise UsageError(message, hint=f"a weight is a number, as (word:1.2); {HINT}")
            weight = float(number)
            del found[group.colon :]
    inside = found[group.begin :]
    if not any(character is None or not character.isspace() for character, _ in inside):
        raise UsageError(f"{what} has brackets without a word: {group.bracket}{_CLOSING[group.bracket]}", hint=HINT)
    found[group.begin :] = [(character, own * weight) for character, own in inside]


def _merged(found: Sequence[tuple[str | None, float]]) -> tuple[tuple[str | None, ...], tuple[float, ...]]:
    segments: list[str | None] = []
    weights: list[float] = []
    rounded = ((character, round(weight, 9) + 0.0) for character, weight in found)  # [(word)] is 1
    for (is_placeholder, weight), run in groupby(rounded, key=lambda one: (one[0] is None, one[1])):
        characters = [character for character, _ in run]
        some = characters if is_placeholder else ["".join(str(one) for one in characters)]
        segments += some
        weights += [weight] * len(some)
    return tuple(segments), tuple(weights) if any(weight != 1 for weight in weights) else ()
