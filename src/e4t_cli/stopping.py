"""How long work is asked to end well: a signal asks, the work answers after its step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


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
