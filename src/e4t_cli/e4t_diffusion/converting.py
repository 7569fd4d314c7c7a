"""Asking the other process: it reads the pickle, this one sees a line of JSON and a pack."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from e4t_cli import errors
from e4t_cli.errors import E4TError, IntegrityError, ResourceError, printable
from e4t_cli.progress import Progress, ProgressCallback

from .isolation import clean_environment
from .wish import Report, Wish

STAGE = "convert"
_SPARE_BYTES = 100_000_000
_STALE_SECONDS = 24 * 3600
_WORKING = ".converting-"


def convert(wish: Wish, target: Path, on_progress: ProgressCallback | None = None) -> Report:
    """Convert a checkpoint into a pack, in a process of its own without a network.

    Args:
        wish: what is wanted.
        target: the pack's folder; it appears whole, or not at all. One that appears meanwhile,
            made by another process from the same files, is kept.
        on_progress: called as it goes.

    Raises:
        IntegrityError: the checkpoint is hostile, damaged, or of another kind.
        ResourceError: there is no room for the result.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    _check_room(wish, target.parent)
    # Two levels down, where nobody who lists the packs looks for cards.
    around = target.parent / f"{_WORKING}{secrets.token_hex(8)}"
    made = around / "pack"
    made.mkdir(parents=True)
    try:
        report = _run(wish, made, on_progress)
        try:
            os.rename(made, target)
        except OSError:
            if not (target / "domain.toml").is_file():
                raise
        return report
    finally:
        shutil.rmtree(around, ignore_errors=True)


def _run(wish: Wish, folder: Path, on_progress: ProgressCallback | None) -> Report:
    loud = os.environ.get("E4T_DEBUG") == "1"
    command = [sys.executable, "-m", "e4t_cli.e4t_diffusion", str(folder)]
    answer: dict[str, Any] = {}
    with (
        tempfile.TemporaryFile() as asked,
        contextlib.ExitStack() as stack,
    ):
        asked.write(wish.to_json().encode())
        asked.seek(0)
        child = subprocess.Popen(
            command,
            stdin=asked,
            stdout=subprocess.PIPE,
            stderr=None if loud else subprocess.DEVNULL,
            env=clean_environment(),
            close_fds=True,
        )
        stack.enter_context(child)
        stack.callback(child.kill)  # an interrupt here must not leave it at work
        assert child.stdout is not None
        for line in child.stdout:
            answer = _understood(line) or answer
            if on_progress and "done" in answer:
                on_progress(Progress(stage=STAGE, done=answer["done"], total=answer["total"]))
        code = child.wait()
    if code == 0 and "report" in answer:
        return Report(**answer["report"])
    raise _told(answer.get("error"), code, wish)


def _understood(line: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        found = json.loads(line)
        if isinstance(found, dict):
            return found
    return {}


def _told(error: object, code: int, wish: Wish) -> E4TError:
    """Return the child's error as one of ours."""
    if isinstance(error, dict):
        kinds = {
            kind.exit_code: kind
            for kind in vars(errors).values()
            if isinstance(kind, type) and issubclass(kind, E4TError)
        }
        kind = kinds.get(error.get("exit", 5), IntegrityError)
        return kind(printable(str(error.get("message"))), hint=error.get("hint"))
    if code == -9:
        return ResourceError(
            "the conversion was killed, probably because memory ran out",
            hint="close other programs: it needs about as much memory as its largest file",
        )
    return IntegrityError(
        f"{printable(wish.folder)} could not be converted: reading it ended with code {code}",
        hint="E4T_DEBUG=1 shows what that process said",
    )


def _check_room(wish: Wish, folder: Path) -> None:
    # Half precision takes half the bytes; the offsets, next to nothing.
    needed = sum(path.stat().st_size for path in Path(wish.folder).glob("*.pt")) // 2
    free = shutil.disk_usage(folder).free
    if needed + _SPARE_BYTES > free:
        raise ResourceError(
            f"the converted weights need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free "
            f"on the disk of {printable(str(folder))}",
            hint="make room: e4t cache ls shows what is kept",
        )


def _remove_leftovers(target: Path) -> None:
    """Remove what a killed conversion left; a young one may be at work."""
    for path in target.parent.glob(f"{_WORKING}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
