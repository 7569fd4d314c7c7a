"""What the user hears of a run, and the clock."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from e4t_cli.progress import Progress, ProgressCallback


class Listened:
    """Work that reports its stages and times them.

    Args:
        on_progress: the caller's; notes pass through it too.
    """

    def __init__(self, on_progress: ProgressCallback | None) -> None:
        self._listener = on_progress
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []

    def report(self, event: Progress) -> None:
        """Pass an event on, and remember its note for the result."""
        if event.note and event.note not in self.notes:
            self.notes.append(event.note)
        if self._listener is not None:
            self._listener(event)

    def note(self, stage: str, sentence: str) -> None:
        """Tell the user something without any progress."""
        self.report(Progress(stage=stage, note=sentence))

    def remark(self, stage: str, sentence: str) -> None:
        """Tell the user something that is good to know."""
        self.report(Progress(stage=stage, remark=sentence))

    def detail(self, stage: str, sentence: str) -> None:
        """Tell those who asked for more."""
        self.report(Progress(stage=stage, detail=sentence))

    @contextlib.contextmanager
    def stage(self, name: str, *, counted: bool = False) -> Iterator[None]:
        """Measure a stage; unless its own code counts steps, also report its start and end."""
        if not counted:
            self.report(Progress(stage=name, done=0, total=1))
        begun = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - begun
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
        if not counted:
            self.report(Progress(stage=name, done=1, total=1))
