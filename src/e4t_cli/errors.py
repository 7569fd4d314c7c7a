"""Errors with a one-sentence message, a hint with the next command, and an exit code.

The exit codes are stable: 0 done, 1 anything unforeseen, then one per cause as below, 130 and 143 for an interrupt and
a termination. `code` names the cause in errors of `--json`.
"""

from __future__ import annotations

from functools import partial


class E4TError(Exception):
    """The base of all errors that are shown to the user as a message instead of a traceback.

    Args:
        message: one sentence fit for a terminal.
        hint: the next command to type or the next thing to do, if there is one.
    """

    exit_code, code = 1, "error"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        # Unpickling rebuilds exceptions from `args`, which do not hold the keyword-only hint.
        return partial(type(self), self.message, hint=self.hint), ()


class UsageError(E4TError):
    """The request is invalid: a wrong option, a prompt without its placeholder."""

    exit_code, code = 2, "usage"


class InputError(E4TError):
    """The input cannot be used: an unreadable image, an empty folder."""

    exit_code, code = 3, "input"


class WeightsUnavailable(E4TError):
    """Weights that are needed are not on this machine and cannot be fetched now."""

    exit_code, code = 4, "weights-unavailable"


class IntegrityError(E4TError):
    """A file is damaged, of another format, or does not fit the base it is used with."""

    exit_code, code = 5, "integrity"


class ResourceError(E4TError):
    """Memory or disk ran out after every fall-back."""

    exit_code, code = 6, "resources"


class DivergedError(E4TError):
    """Training or sampling produced a value that is not finite; nothing of it was saved."""

    exit_code, code = 7, "diverged"


class PartialResult(E4TError):
    """Fewer images were generated than requested."""

    exit_code, code = 8, "partial"


def printable(text: str, *, limit: int = 400) -> str:
    """Return `text` on one line, with control characters escaped and a bounded length.

    Text from foreign packages and files is printed through this, so that a name cannot send escape sequences to the
    terminal.
    """
    escaped = (c if c.isprintable() or c in "\n\r\t" else c.encode("unicode_escape").decode() for c in text)
    shown = " ".join("".join(escaped).split())
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
