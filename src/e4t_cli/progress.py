"""How work below the door tells how far it is: one value, one callback, no printing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One report from a running stage.

    Args:
        stage: "load", "prepare", "tune", "generate", "encode", "pretrain" …
        done: units finished, 0 … total.
        total: units in this stage; 0 when unknown.
        values: numbers worth showing (loss, seconds, …).
        note: a sentence for the user, "" for none.
    """

    stage: str
    done: int = 0
    total: int = 0
    values: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


ProgressCallback = Callable[[Progress], None]
