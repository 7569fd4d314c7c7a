"""Ends a stage of `make mini` early with its state saved: at a moment given beforehand, or at SIGTERM.

Loops ask `stop_requested()` after every step, save, and raise `Stopped`.
"""

from __future__ import annotations

import os
import signal
import time

STOP_AT = "MINI_STOP_AT"  # environment variable: seconds since the epoch
STOPPED = 75  # exit status of a stage that was stopped and can be resumed, EX_TEMPFAIL of sysexits.h
_signalled = False


class Stopped(Exception):
    """A stage was stopped; its state is saved."""


def stop_requested() -> bool:
    """Whether the time is up or the process was asked to end."""
    return _signalled or time.time() >= float(os.environ.get(STOP_AT) or "inf")


def stop_at_signals() -> None:
    """Let SIGTERM and SIGINT end this process after the current step; a second one ends it at once."""

    def note(number: int, frame: object) -> None:
        global _signalled
        if _signalled:
            raise KeyboardInterrupt
        _signalled = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
