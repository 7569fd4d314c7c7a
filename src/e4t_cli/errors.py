"""Errors with a one-sentence message, a hint with the next command, and an exit code.

The codes are stable: 0 done, 1 anything unforeseen, then one per cause as below, 130 and 143 for an
interrupt and a termination.
"""

from __future__ import annotations


class E4TError(Exception):
    """The base of all errors that are shown to the user as a message instead of a traceback.

    Args:
        message: one sentence fit for a terminal.
        hint: the next command to type or the next thing to do, if there is one.
    """

    exit_code: int = 1
    code: str = "error"
    """The `code` of `--json` errors."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        # Unpickling rebuilds exceptions from `args`, which do not hold the keyword-only hint.
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(kind: type[E4TError], message: str, hint: str | None) -> E4TError:
    return kind(message, hint=hint)


class UsageError(E4TError):
    """The request is invalid: a wrong option, a prompt without its placeholder."""

    exit_code = 2
    code = "usage"


class InputError(E4TError):
    """The input cannot be used: an unreadable image, an empty folder."""

    exit_code = 3
    code = "input"


class WeightsUnavailable(E4TError):
    """Weights that are needed are not on this machine and cannot be fetched now."""

    exit_code = 4
    code = "weights-unavailable"


class IntegrityError(E4TError):
    """A file is damaged, of another format, or does not fit the base it is used with."""

    exit_code = 5
    code = "integrity"


class ResourceError(E4TError):
    """Memory or disk ran out after every fall-back."""

    exit_code = 6
    code = "resources"


class DivergedError(E4TError):
    """Training or sampling produced a value that is not finite; nothing of it was saved."""

    exit_code = 7
    code = "diverged"


class PartialResult(E4TError):
    """Fewer images were generated than requested."""

    exit_code = 8
    code = "partial"


def printable(text: str, *, limit: int = 400) -> str:
    """Return `text` on one line, with control characters escaped and a bounded length.

    Text from foreign packages and files is printed through this, so that terminals do not execute
    an escape sequence in a name.
    """
    shown = "".join(
        character
        if character.isprintable()
        else " "
        if character in "\n\r\t"
        else character.encode("unicode_escape").decode()
        for character in text
    )
    shown = " ".join(shown.split())
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
