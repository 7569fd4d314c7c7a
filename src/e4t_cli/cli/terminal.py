"""Terminals, and the progress of stages: rich's live bars on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from e4t_cli.errors import printable
from e4t_cli.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID
    from rich.text import Text

# Between two plain lines of a stage PLAIN_SECONDS pass and PLAIN_SHARE of it is done, or PLAIN_MAX_SECONDS pass.
PLAIN_SECONDS, PLAIN_SHARE, PLAIN_MAX_SECONDS = 10.0, 0.1, 60.0
LONG_STAGE = 10.0  # seconds after which a stage also shows its remaining time


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream, which may be closed, is a terminal."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # None or closed
        return False


def stderr_is_terminal() -> bool:
    """Whether stderr is a terminal that can redraw a line."""
    return is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb"


def show_cursor() -> None:
    """Show the terminal's cursor again, in a signal handler that ends the process."""
    if stderr_is_terminal():
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), b"\x1b[?25h")


def plain_text(line: str, label: str = "", style: str = "") -> Text:
    """Return text that rich prints unchanged: no markup, no emoji codes."""
    from rich.text import Text

    return Text.assemble((label, style), line)


def rich_console() -> RichConsole:
    """Return rich's console on stderr."""
    from rich.console import Console as RichConsole

    # rich still emits bold under NO_COLOR with FORCE_COLOR set, so colour is decided here.
    no_color = bool(os.environ.get("NO_COLOR"))
    return RichConsole(stderr=True, no_color=no_color, highlight=False, markup=False, emoji=False)


def live_display() -> RichProgress:
    """Return a display with a row for each stage: bar, count, time, and values such as the loss."""
    from rich.progress import BarColumn, MofNCompleteColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class Remaining(TimeRemainingColumn):
        """The remaining time, of long stages only."""

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
        redirect_stdout=False,  # rich would move stdout to stderr
        redirect_stderr=False,
        speed_estimate_period=300,  # seconds: some stages report once a minute
    )


class Rows:
    """A row of rich's display for each stage; `parts` also shows each part of a loss, and each step's own."""

    def __init__(self, display: RichProgress, *, parts: bool) -> None:
        self.display, self.parts = display, parts
        self.stages: dict[str, TaskID] = {}

    def show(self, event: Progress) -> None:
        """Update the row of the event's stage."""
        if event.stage not in self.stages:
            self.stages[event.stage] = self.display.add_task(printable(event.stage), values="")
        scale, unit = (1e-6, "MB  ") if event.unit == "bytes" else (1, "")
        if event.total and event.done < event.total and self.display.tasks[self.stages[event.stage]].finished:
            self.display.reset(self.stages[event.stage])  # the stage of the next photo
        self.display.update(
            self.stages[event.stage],
            completed=int(event.done * scale),
            total=int(event.total * scale) or None,
            values=unit + _shown_values(event, parts=self.parts),
        )


class Lines:
    """A few plain lines for each stage, where stderr is no terminal; `write` writes one to stderr."""

    def __init__(self, write: Callable[[str], None], *, parts: bool) -> None:
        self.write, self.parts = write, parts
        self.stage = ""
        self.finished: set[str] = set()
        self.shown_at = self.shown_share = 0.0

    def show(self, event: Progress) -> None:
        """Write a line, if one is due."""
        if not self._is_due(event):
            return
        counted = f" {event.done}/{event.total}" if event.total > 1 else ""
        if event.unit == "bytes":
            counted = f" {event.done / 1e6:.1f}/{event.total / 1e6:.1f} MB"
        values = _shown_values(event, parts=self.parts)
        self.write(printable(f"{event.stage}{counted} {values}".rstrip()))

    def _is_due(self, event: Progress) -> bool:
        now, share = time.monotonic(), event.done / max(event.total, 1)
        if event.stage != self.stage:
            self.stage = event.stage
        elif share < 1:
            waited, advanced = now - self.shown_at, share - self.shown_share
            if waited < PLAIN_SECONDS or (advanced < PLAIN_SHARE and waited < PLAIN_MAX_SECONDS):
                return False
        elif event.stage in self.finished:
            return False
        if share >= 1:
            self.finished.add(event.stage)
        self.shown_at, self.shown_share = now, share
        return share > 0 or event.total > 1  # a stage of one unit gets one line, its last


def _shown_values(event: Progress, *, parts: bool) -> str:
    shown = event.values
    if "loss" in shown and not parts:
        # The smoothed loss, which jumps less from step to step.
        speed = {"it/s": shown["it/s"]} if "it/s" in shown else {}
        shown = {"loss": shown.get("smoothed", shown["loss"]), **speed}
    return "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
