"""Runs the parts of the GPU benchmark, each in a process of its own, within a time limit.

    python -m benchmarks.gpu --out DIR                        ≤ 9 minutes on one H100 or H200
    python -m benchmarks.gpu --out DIR --tiny --device cpu    a rehearsal: the same code on a small model, 2 minutes
    python -m benchmarks.gpu --out DIR --parts draw,cold      some parts, after the others
    python -m benchmarks.gpu --table DIR                      write DIR's figures into benchmarks/README.md

DIR/results.json is written after each figure, so nothing is lost if the run is stopped; DIR/log.txt has what the parts
print. A part that fails or takes too long does not stop the others. The weights are random: Stable Diffusion 1.4's
shapes take the same time whatever the values.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.checkouts import ROOT
from benchmarks.gpu.results import Results, update_readme
from benchmarks.processes import ended_by_signals

# The most seconds that a part may take, in order of importance.
PARTS = {
    "facts": 60, "tune": 120, "draw": 80, "warm": 80, "cold": 150, "memory": 100, "tests": 100, "compile": 150,
}  # fmt: skip
LIMIT = 540
MAX_LOG = 900_000  # bytes


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the results")
    parser.add_argument("--tiny", action="store_true", help="a small model")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu for a rehearsal")
    parser.add_argument("--limit", type=int, default=LIMIT, metavar="SECONDS", help="of all parts together")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--table", type=Path, metavar="DIR", help="write the table of a finished run")
    given = parser.parse_args(arguments)
    given.parts = [name for name in given.parts.split(",") if name]
    if unknown := [name for name in given.parts if name not in PARTS]:
        parser.error(f"--parts: there is no {', '.join(unknown)}; one of {', '.join(PARTS)}")
    if (given.out is None) == (given.table is None):
        parser.error("--out DIR measures, --table DIR writes a table: one of them is needed")
    return given


def run_part(name: str, given: argparse.Namespace, seconds: float, log: Path) -> str:
    """Run one part in a process; returns what went wrong, "" if nothing."""
    with tempfile.TemporaryDirectory(prefix="e4t-bench-") as folder:  # a part that is stopped cannot remove its own
        return _run_part(name, given, seconds, log, folder)


def _run_part(name: str, given: argparse.Namespace, seconds: float, log: Path, folder: str) -> str:
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--out", str(given.out.resolve())]
    command += ["--device", given.device, *(["--tiny"] if given.tiny else [])]
    with log.open("ab") as file:
        file.write(f"── {name}\n".encode())
        file.flush()
        # A group of its own, which ends with the processes that the part has started.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "TMPDIR": folder},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds)
            return "" if code == 0 else f"ended with the code {code}, see log.txt"
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def shorten(log: Path) -> None:
    """Keep the beginning and the end of a long log."""
    data = log.read_bytes()
    if len(data) > MAX_LOG:
        log.write_bytes(data[: MAX_LOG // 2] + b"\n...\n" + data[-MAX_LOG // 2 :])


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    if given.table is not None:
        update_readme(Results(given.table))
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    results = Results(given.out)
    if given.part:
        from benchmarks.gpu import parts

        parts.run_part(given.part, results, given.device, tiny=given.tiny)
        return 0
    begun, log = time.monotonic(), given.out / "log.txt"
    if given.parts == list(PARTS):
        results.clear()
        log.unlink(missing_ok=True)
    wrong = 0
    with ended_by_signals():
        for name in (name for name in PARTS if name in given.parts):
            left, now = given.limit - (time.monotonic() - begun), time.monotonic()
            trouble = run_part(name, given, min(PARTS[name], left), log) if left > 15 else "no time was left"
            results.note(name, trouble, seconds=time.monotonic() - now)
            shorten(log)
            print(f"{time.monotonic() - begun:5.0f} s  {name:8} {trouble or 'done'}", flush=True)
            wrong += bool(trouble)
    print(results.table())
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
