"""What a caller allows, and where they want to hear about it: handed down as one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from e4t_cli.progress import Progress, ProgressCallback

from .places import is_offline

AskLicence = Callable[[str], bool]
"""Puts a question to the user and returns whether they said yes."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """How the hub may be used.

    Args:
        offline: use what is on this machine, and open no socket; the environment can say so too.
        accept_license: True accepts the licence of what is fetched; a function is asked.
        on_progress: called with every event and remark.
    """

    offline: bool = False
    accept_license: bool | AskLicence = False
    on_progress: ProgressCallback | None = None

    @property
    def cut_off(self) -> bool:
        """Whether the network must not be touched."""
        return self.offline or is_offline()

    def remark(self, sentence: str) -> None:
        """Say something that is good to know."""
        if self.on_progress is not None:
            self.on_progress(Progress(stage="fetch", remark=sentence))

    def note(self, sentence: str) -> None:
        """Say something that may not be what the user meant."""
        if self.on_progress is not None:
            self.on_progress(Progress(stage="fetch", note=sentence))
