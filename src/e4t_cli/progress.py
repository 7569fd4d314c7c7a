"""How work below the door tells how far it is: one value, one callback, no printing.

How long work is asked to end well: a signal asks, the work answers after its step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One report from a running stage.

    Args:
        stage: "load", "prepare", "tune", "generate", "encode", "pretrain" …
        done: units finished, 0 … total.
        total: units in this stage; 0 when unknown.
        values: numbers worth showing (loss, seconds, …).
        note: a sentence for the user, "" for none: something that may not be what they meant.
        remark: a sentence that is merely good to know, "" for none.
        detail: a sentence for those who asked for more (`-v`), "" for none.
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
    """Handed by whoever receives signals to work that can save itself before it ends.

    The command line asks at the first SIGINT or SIGTERM. While the work is not listening (it is
    loading, say) nothing would be saved by waiting, and the caller interrupts it at once.
    """

    def __init__(self) -> None:
        self.asked = False
        self._listening = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Mark the part of the work that looks at `asked`, and ends soon after."""
        self._listening = True
        try:
            yield
        finally:
            self._listening = False

    def ask(self) -> bool:
        """Ask the work to end; safe in a signal handler.

        Returns:
            Whether it will. If not, interrupt it.
        """
        self.asked = self.asked or self._listening
        return self._listening
