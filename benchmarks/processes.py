"""Runs whole commands and reads what each one took; keeps a core busy beside them.

Imports nothing heavy: a process begins with its parent's peak memory as its own.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

STAGES = ("imports", "load", "prepare", "tune", "generate")
_STAGE = re.compile(rf"\b({'|'.join(STAGES)}) (\d+\.\d+)")
# Variables of the user that would decide what is compared here.
_OURS = ("E4T_", "OMP_", "KMP_", "GOMP_", "MKL_", "HF_", "TRANSFORMERS_", "PYTHON")

# Both end with the process that started them, whatever ended that one; its number is their argument.
NEIGHBOURS = {
    "loop": "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    sum(range(100_000))",
    "starts": (
        "import os, subprocess, sys\nwhile os.getppid() == int(sys.argv[1]):\n"
        "    subprocess.run([sys.executable, '-I', '-S', '-c', ''])"
    ),
}


def start_neighbour(kind: str) -> subprocess.Popen[bytes]:
    """Start a process that keeps one core busy until it is killed or this process ends."""
    command = [sys.executable, "-I", "-c", NEIGHBOURS[kind], str(os.getpid())]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class CommandFailed(Exception):
    """A measured command ended with an error; the text is its last line."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a command took.

    Args:
        wall: seconds.
        cpu: seconds of all cores, in user and system mode, with the processes that it started.
        memory: its peak in bytes; 0 where nothing counts it.
        stages: the seconds that it reports for each of its stages.
        output: its stdout.
    """

    wall: float
    cpu: float
    memory: int = 0
    stages: Mapping[str, float] = field(default_factory=dict)
    output: str = ""


def stages_of(text: str) -> dict[str, float]:
    """Return the seconds of each stage from the last line of `e4t personalize` on stderr."""
    lines = [line for line in text.splitlines() if re.match(r"seed \d+; \d", line)]
    return {name: float(value) for name, value in _STAGE.findall(lines[-1])} if lines else {}


def environment_of(root: Path, home: Path, threads: int = 0) -> dict[str, str]:
    """Return an environment that imports the packages of a checkout, with a home folder and caches of its own.

    Args:
        threads: an explicit number of CPU threads; with 0 the program decides.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    places = {name: str(home) for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")}
    paths = os.pathsep.join(str(root / part) for part in ("src", "domains", "."))
    chosen = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    return {**kept, **places, **chosen, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "COLUMNS": "500"}


def run(command: Sequence[str], environment: Mapping[str, str], cwd: Path) -> Measured:
    """Run a command to its end.

    Raises:
        CommandFailed: it did not end with the exit code 0.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        begun = time.perf_counter()
        process = subprocess.Popen(
            command, env=dict(environment), cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        wall = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        output, errors = (file.read().decode("utf-8", "replace") for file in (out, err))
    if process.returncode:
        lines = errors.strip().splitlines() or ["no message"]
        told = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])
        raise CommandFailed(f"exit code {process.returncode}: {told}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Measured(
        wall=wall, cpu=used.ru_utime + used.ru_stime, memory=used.ru_maxrss * unit,
        stages=stages_of(errors), output=output,
    )  # fmt: skip


@contextmanager
def neighbour(kind: str) -> Iterator[None]:
    """Have another process keep one core busy in a `with` block: a key of `NEIGHBOURS`, or "" for none."""
    if not kind:
        yield
        return
    process = start_neighbour(kind)
    try:
        time.sleep(0.5)  # until it runs
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a `with` block as Ctrl-C does, so that what it made is removed."""

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
