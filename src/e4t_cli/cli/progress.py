"""How progress looks: one live display on a terminal, a few plain lines elsewhere.

`console` decides what is shown, `showing` puts it into words, this module how it looks.

A running stage, shown: a row of the live display, or a plain line now and then.

What an event says beside its numbers (notes, remarks, details) is `Console`'s to say.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from e4t_cli.errors import printable
from e4t_cli.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

PLAIN_SECONDS = 10.0  # off a terminal, at least this long between two lines of one stage ...
PLAIN_SHARE = 0.1  # ... and at least this much more of it done, or a minute gone
PLAIN_PATIENCE = 60.0
LONG_STAGE = 10.0  # after these seconds of a stage, it also shows how long it will take


class PlainLines:
    """Decides which events deserve a line where there is no terminal."""

    def __init__(self) -> None:
        self.stage = ""
        self.finished: set[str] = set()
        self.shown_at = 0.0
        self.shown_share = 0.0

    def due(self, event: Progress) -> bool:
        """Whether to print this one."""
        now, share = time.monotonic(), event.done / max(event.total, 1)
        if event.stage != self.stage:
            self.stage, self.shown_at, self.shown_share = event.stage, now, share
        elif share < 1:
            waited, advanced = now - self.shown_at, share - self.shown_share
            if waited < PLAIN_SECONDS or (advanced < PLAIN_SHARE and waited < PLAIN_PATIENCE):
                return False
        elif event.stage in self.finished:
            return False
        if share >= 1:
            self.finished.add(event.stage)
        self.shown_at, self.shown_share = now, share
        # The last event of a stage says all its first one would have said, so a stage costs one
        # line unless it is long enough to be waited for.
        return share >= 1 or share > 0 or event.total > 1


def plain_text(line: str, label: str = "", style: str = "") -> Any:
    """Text that rich shows as it is: no markup, no emoji codes."""
    from rich.text import Text

    return Text.assemble((label, style), line)


def rich_console() -> Any:
    """rich's console on stderr."""
    from rich.console import Console as RichConsole

    # rich still emits bold under NO_COLOR with FORCE_COLOR set, so colour is decided here.
    return RichConsole(
        stderr=True, no_color=_no_color(), highlight=False, markup=False, emoji=False
    )


def live_display() -> RichProgress:
    """A row for each stage: bar, count, time, and numbers such as the loss."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class Remaining(TimeRemainingColumn):
        """How long a long stage still takes; of a short one nobody asks."""

        def render(self, task: Task) -> Text:
            if task.finished or (task.elapsed or 0) < LONG_STAGE or task.time_remaining is None:
                return Text("")
            return Text.assemble(super().render(task), " left")

    return RichProgress(
        TextColumn("{task.description:<8}", markup=False),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        Remaining(),
        TextColumn("{task.fields[values]}", markup=False),
        console=rich_console(),
        # stdout is not rich's to take: it would arrive on stderr.
        redirect_stdout=False,
        redirect_stderr=False,
        speed_estimate_period=300,  # seconds: some stages report once a minute
    )


def _no_color() -> bool:
    return bool(os.environ.get("NO_COLOR"))


def stderr_is_terminal() -> bool:
    """Whether someone is watching stderr on something that can redraw a line."""
    return is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb"


def is_terminal(stream: Any) -> bool:
    """Whether a stream, which may be closed, is a terminal."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # closed, or replaced by something that is no stream
        return False


def show_cursor() -> None:
    """Give the terminal its cursor back when there is no time for anything else."""
    if stderr_is_terminal():
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), b"\x1b[?25h")


class Rows:
    """A row for each stage, on a terminal.

    Args:
        display: rich's.
        parts: show each part of a loss, and each step's own.
    """

    def __init__(self, display: RichProgress, *, parts: bool) -> None:
        self.display, self.parts = display, parts
        self.stages: dict[str, TaskID] = {}

    def show(self, event: Progress) -> None:
        """Bring the row of a stage up to date."""
        if event.stage not in self.stages:
            self.stages[event.stage] = self.display.add_task(printable(event.stage), values="")
        scale, unit = (1e-6, "MB  ") if event.unit == "bytes" else (1, "")
        self.display.update(
            self.stages[event.stage],
            completed=int(event.done * scale),
            total=int(event.total * scale) or None,
            values=unit + _numbers(event, parts=self.parts),
        )


class Lines:
    """A few plain lines a stage, anywhere else.

    Args:
        write: puts a line on stderr.
        parts: as for `Rows`.
    """

    def __init__(self, write: Callable[[str], None], *, parts: bool) -> None:
        self.write, self.parts, self.lines = write, parts, PlainLines()

    def show(self, event: Progress) -> None:
        """Write a line, if it is time for one."""
        if not self.lines.due(event):
            return
        counted = f" {event.done}/{event.total}" if event.total > 1 else ""
        if event.unit == "bytes":
            counted = f" {event.done / 1e6:.1f}/{event.total / 1e6:.1f} MB"
        numbers = _numbers(event, parts=self.parts)
        self.write(printable(f"{event.stage}{counted} {numbers}".rstrip()))


def _numbers(event: Progress, *, parts: bool) -> str:
    shown = event.values
    if "loss" in shown and not parts:
        # Smoothed where it jumps from step to step.
        speed = {"it/s": shown["it/s"]} if "it/s" in shown else {}
        shown = {"loss": shown.get("smoothed", shown["loss"]), **speed}
    return "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
