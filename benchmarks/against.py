"""Compares whole commands of this checkout with those of another commit, alternating: `--against REV`.

    python -m benchmarks --against main~5                    all rows but pretrain: about 45 minutes
    python -m benchmarks --against main~5 --rows demo,busy   some of them
    python -m benchmarks --against main~5 --rows pretrain --pairs 2

Both run on the same interpreter and libraries, offline, each with an empty home folder and empty caches. One run of
each comes first and does not count. A ratio is that of a pair, of this checkout to the other; the table has its median
with minimum and maximum.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.checkouts import ROOT, NoCheckout, checkout, resolve
from benchmarks.processes import STAGES, CommandFailed, Measured, ended_by_signals
from benchmarks.rows import ROWS, Side
from e4t_cli.threads import Load

GB = 1 << 30
Value = Callable[[Measured], float]
WHOLE: dict[str, Value] = {"seconds": lambda one: one.wall, "CPU seconds": lambda one: one.cpu}
DEMO: dict[str, Value] = {
    **WHOLE,
    "GB at its peak": lambda one: one.memory / GB,
    **{f"{stage}, seconds": lambda one, stage=stage: one.stages.get(stage, 0.0) for stage in STAGES},  # type: ignore[misc]
}
VALUES = {"demo": DEMO, "busy": DEMO, "starts": DEMO}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", metavar="REV", required=True, help="the other commit")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each, after one that does not count")
    usual = [name for name, row in ROWS.items() if not row.opt_in]
    parser.add_argument("--rows", default=",".join(usual), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there, after each pair")
    parser.add_argument("--cores", type=int, default=0, help="use the first cores only (Linux)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; default: the program decides")
    given = parser.parse_args(arguments)
    given.rows = [name for name in given.rows.split(",") if name]
    unknown = [name for name in given.rows if name not in ROWS]
    if unknown or not given.rows:
        parser.error(f"--rows: there is no {', '.join(unknown) or 'row'}; one of {', '.join(ROWS)}")
    if given.pairs < 1:
        parser.error("--pairs: at least 1")
    return given


def use_cores(count: int) -> int:
    """Restrict this process and those it starts to some cores; returns how many there are."""
    if not hasattr(os, "sched_setaffinity"):
        return os.cpu_count() or 1
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:count] if count > 0 else cores)
    return len(os.sched_getaffinity(0))


def others() -> float:
    """Return how many cores other programs keep busy, over one second."""
    before = Load.read()
    time.sleep(1)
    return before.others_until(Load.read(), set(before.busy))


def check_packages(side: Side) -> None:
    """Raise an error unless a process of this side imports the packages of its checkout."""
    code = "import e4t_cli, e4t_domains; print(e4t_cli.__file__); print(e4t_domains.__file__)"
    for line in side.python("-c", code, home="check").output.splitlines():
        if not Path(line).resolve().is_relative_to(side.root.resolve()):
            raise NoCheckout(f"{side.name}: {line} is imported, not {side.root}")


def compare(name: str, sides: tuple[Side, Side], pairs: int, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure one row.

    Args:
        keep: called with the figures after each pair.

    Returns:
        "skipped" with a reason, or "pairs": for each pair the values of the older and of the newer side.
    """
    row, found = ROWS[name], list[dict[str, list[float]]]()
    result: dict[str, Any] = {"title": row.title, "pairs": found}
    if reason := next((reason for side in sides if (reason := row.skipped(side))), ""):
        return {"title": row.title, "skipped": reason}
    try:
        for number in range(pairs + 1):
            both: dict[str, Measured] = {}
            for side in sides if number % 2 else reversed(sides):
                both[side.name] = row.once(side)
                told = f"{both[side.name].wall:7.1f} s  {both[side.name].cpu:7.1f} s of CPU"
                say(f"{name:9} {number or 'warm-up':>7}  {side.name:16} {told}")
            if number:
                values = VALUES.get(name, WHOLE)
                found.append({key: [value(both[side.name]) for side in sides] for key, value in values.items()})
                keep(result)
    except (CommandFailed, RuntimeError) as error:
        say(f"{name}: {error}")
        result["failed"] = str(error)
    return result


def middle(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f}" if values else ""


def table(rows: dict[str, dict[str, Any]], names: tuple[str, str]) -> str:
    """Return the figures in Markdown."""
    lines = [f"| | {names[0]} | {names[1]} | ratio: median (min … max) |", "|---|---|---|---|"]
    for name, row in rows.items():
        if reason := row.get("skipped") or row.get("failed"):
            lines.append(f"| {row['title']} | | | {'skipped' if 'skipped' in row else 'failed'}: {reason} |")
        for key in VALUES.get(name, WHOLE) if row.get("pairs") else ():
            older, newer = ([pair[key][number] for pair in row["pairs"]] for number in (0, 1))
            ratios = [new / old for old, new in zip(older, newer, strict=True) if old > 0]
            shown = f"{middle(ratios)} ({min(ratios):.2f} … {max(ratios):.2f})" if ratios else ""
            lines.append(f"| {row['title']}, {key} | {middle(older)} | {middle(newer)} | {shown} |")
    if "demo" in rows:
        for name in ("busy", "starts"):
            for number, side in enumerate(names):
                quiet, loud = (
                    [one["seconds"][number] for one in rows.get(row, {}).get("pairs", ())] for row in ("demo", name)
                )
                if quiet and loud:
                    times = statistics.median(loud) / statistics.median(quiet)
                    lines.append(f"| {side}: {ROWS[name].title}, times its own quiet time | | | {times:.2f} |")
    return "\n".join(lines)


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    making = path.with_name(f"{path.name}.making")
    making.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    making.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    try:
        with ended_by_signals(), tempfile.TemporaryDirectory(prefix="e4t-bench-") as work:
            commit = resolve(given.against)
            cores = use_cores(given.cores)
            with checkout(commit) as folder:
                return _measure(given, cores, commit, folder, Path(work))
    except NoCheckout as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("interrupted; the other checkout is removed")
        return 130


def _measure(given: argparse.Namespace, cores: int, commit: str, folder: Path, work: Path) -> int:
    older = Side(name=given.against, root=folder, work=work / "older", newer=False, threads=given.threads)
    newer = Side(name="this checkout", root=ROOT, work=work / "newer", newer=True, threads=given.threads)
    for side in (older, newer):
        check_packages(side)
    busy = others()
    about = {
        "against": given.against, "commit": commit, "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.machine(), "cores": cores, "threads": given.threads, "busy": round(busy, 2),
        "python": platform.python_version(), "torch": version("torch"),
    }  # fmt: skip
    load = f"other programs keep {busy:.2f} cores busy"
    say(f"{cores} cores, {load}{': the figures will say little' if busy > 0.3 else ''}")
    rows: dict[str, dict[str, Any]] = {}

    def keep(name: str, result: dict[str, Any]) -> None:
        rows[name] = result
        if given.json is not None:
            write(given.json, {**about, "rows": rows})

    for name in given.rows:
        keep(name, compare(name, (older, newer), given.pairs, lambda result, name=name: keep(name, result)))
    named = f"{about['date']}, {about['machine']}, {cores} cores, Python {about['python']}, torch {about['torch']}"
    print(f"{named}; {load};")
    print(f"median of {given.pairs} pairs, {given.against} is {commit[:10]}\n")
    print(table(rows, (older.name, newer.name)))
    return 1 if any("failed" in row for row in rows.values()) else 0
