"""Every way this program says no: one sentence, the next command, and an exit code.

The codes are promised: 0 done, 1 anything unforeseen, then one per cause as below,
130 and 143 for an interrupt and a termination. They are never renumbered.
"""

from __future__ import annotations


class E4TError(Exception):
    """The base of every error that is explained to the user rather than traced.

    Args:
        message: one sentence fit for a terminal.
        hint: the next command to type or the next thing to do, if there is one.
    """

    exit_code: int = 1
    code: str = "error"
    """A word for machines: the `code` of `--json` errors."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions are rebuilt from `args`, which would lose the keyword-only hint
        # on the way out of a worker process.
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(kind: type[E4TError], message: str, hint: str | None) -> E4TError:
    return kind(message, hint=hint)


class UsageError(E4TError):
    """The request itself makes no sense: a wrong option, a prompt without its placeholder."""

    exit_code = 2
    code = "usage"


class InputError(E4TError):
    """What was handed in cannot be used: an unreadable picture, an empty folder."""

    exit_code = 3
    code = "input"


class WeightsUnavailable(E4TError):
    """Weights that are needed are not on this machine and cannot be fetched now."""

    exit_code = 4
    code = "weights-unavailable"


class IntegrityError(E4TError):
    """A file is not what it claims to be, or does not fit the base it is used with."""

    exit_code = 5
    code = "integrity"


class ResourceError(E4TError):
    """Memory or disk ran out after every fall-back."""

    exit_code = 6
    code = "resources"


class DivergedError(E4TError):
    """A number that is not finite came out of training or drawing; nothing of it was saved."""

    exit_code = 7
    code = "diverged"


class PartialResult(E4TError):
    """Fewer pictures came out than were asked for."""

    exit_code = 8
    code = "partial"


def printable(text: str, *, limit: int = 400) -> str:
    """Return `text` on one line, with control characters spelled out and a bounded length.

    Text from other people's packages and files reaches the terminal through this, so that
    an escape sequence in a name is shown instead of obeyed.
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
