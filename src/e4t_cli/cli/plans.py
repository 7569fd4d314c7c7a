"""Prints what `--dry-run` found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from e4t_cli.cli.console import Console
from e4t_cli.files import shown_size


def print_plan(console: Console, plan: dict[str, Any], out: Path) -> None:
    """Print a plan: one JSON object, or lines with units in place of plain numbers."""
    plan = {**plan, "folder": str(out)}
    if console.json:
        return console.details("plan", plan)
    for note in plan.pop("notes", ()):
        console.warning(note)
    download, memory, seconds = (plan.pop(key, None) for key in ("download_bytes", "memory_bytes", "seconds"))
    if plan.get("to_fetch"):
        plan["download"] = "of unknown size" if download is None else f"about {shown_size(download)}"
    if memory:
        least, fastest = shown_size(memory["least"]), shown_size(memory["fastest"])
        plan["memory"] = f"about {least}" + ("" if least == fastest else f" at least, {fastest} to be fastest")
    if seconds:
        total = _shown_time(seconds["tune"] + seconds["generate"])
        plan["time"] = f"about {total}, as measured on {seconds['on']}, without loading"
    if (before := plan.pop("tuned_before", None)) is not None:
        plan["tuning"] = "tuned before: no tuning" if before else "again, to the same bits"
    lines = {key.replace("_", " "): value for key, value in plan.items() if key != "type"}
    return console.details("plan", lines)


def _shown_time(seconds: float) -> str:
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 1):.0f} seconds"
