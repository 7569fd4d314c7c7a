"""A running stage, shown: a row of the live display, or a plain line now and then.

What an event says beside its numbers (notes, remarks, details) is `Console`'s to say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from e4t_cli.cli.display import PlainLines
from e4t_cli.errors import printable
from e4t_cli.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


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
