"""Progress events, and the request to stop after the current step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One report from a running stage.

    Args:
        stage: "load", "prepare", "tune", "generate", "encode", "pretrain" …
        done, total: units finished, 0 … total, and units in this stage, 0 when unknown.
        values: to be shown (loss, seconds, …).
        note, remark, detail: a warning, information, and information for `-v`; "" for none.
        unit: what is counted, where it is not steps: "bytes".
    """

    stage: str
    done: int = 0
    total: int = 0
    values: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    remark: str = ""
    detail: str = ""
    unit: str = ""


ProgressCallback = Callable[[Progress], None]


class StopRequest:
    """A request to end work that can save a checkpoint first, made at the first SIGINT or SIGTERM.

    Outside `listening` (while a model is loaded, say) waiting would save nothing: the caller interrupts the work.
    """

    def __init__(self) -> None:
        self.asked = False
        self._listening = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Mark the part of the work that checks `asked` after each step."""
        self._listening = True
        try:
            yield
        finally:
            self._listening = False

    def ask(self) -> bool:
        """Request the end of the work, safe in a signal handler; returns False if nothing checks the request."""
        self.asked = self.asked or self._listening
        return self._listening
