"""Numbers for services that draw them (TensorBoard, Weights & Biases, …), through accelerate.

A tracker is never worth a run: one that is missing, offline or failing is mentioned once, and
training goes on without it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from e4t_cli.errors import printable


class Trackers:
    """Some trackers of one run, each on its own.

    Args:
        wanted: names that accelerate knows, or `GeneralTracker`s of one's own.
        folder: for those that write files.
        project: what the run is called there.
        settings: plain values that it is filed under.
        on_note: told what goes wrong.
    """

    def __init__(
        self,
        wanted: Sequence[Any],
        folder: Path,
        project: str,
        settings: Mapping[str, Any],
        on_note: Callable[[str], None],
    ) -> None:
        self._on_note = on_note
        self._running: list[tuple[str, Any]] = []
        for one in wanted:
            name = printable(str(getattr(one, "name", one)), limit=40)
            try:
                found = _start(one, folder, project, settings)
            except Exception as error:  # whatever a service's own library raises
                self._fail(name, error)
                continue
            if found is None:
                on_note(f"the tracker {name} is not installed, and training goes on without it")
            else:
                self._running.append((name, found))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Pass numbers on."""
        self._each(lambda tracker: tracker.log(dict(values), step=step))

    def finish(self) -> None:
        """Let each of them write what it still holds."""
        self._each(lambda tracker: tracker.finish())
        self._running.clear()

    def _each(self, act: Callable[[Any], object]) -> None:
        for one in list(self._running):
            try:
                act(one[1])
            except Exception as error:
                self._running.remove(one)
                self._fail(one[0], error)

    def _fail(self, name: str, error: Exception) -> None:
        reason = printable(str(error), limit=160) or type(error).__name__
        self._on_note(f"the tracker {name} failed, and training goes on without it: {reason}")


def _start(one: Any, folder: Path, project: str, settings: Mapping[str, Any]) -> Any | None:
    """Start a tracker; None where its library is not installed.

    Raises:
        Exception: of any kind.
    """
    from accelerate import Accelerator

    # accelerate is used for its trackers alone here, and they run in one process only.
    with warnings.catch_warnings(action="ignore"):  # what it would say is said by us
        accelerator = Accelerator(
            log_with=[one], project_dir=str(folder), cpu=True, mixed_precision="no"
        )
    # wandb alone asks where to write, and would write into the folder the user happens to be in.
    options = {"wandb": {"dir": str(folder)}}
    accelerator.init_trackers(project, config=dict(settings), init_kwargs=options)
    return accelerator.trackers[0] if accelerator.trackers else None
