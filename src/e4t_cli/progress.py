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
