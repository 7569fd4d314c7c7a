"""Taking from a process what reading numbers from a file does not need: network, children.

A checkpoint comes from strangers, and torch's restricted loader has had holes. If it has another
one, the code that slips through finds itself without sockets, without a way to start programs, and
without the user's tokens. On Linux the kernel takes the network away as well, where it may.

Asking the other process: it reads the pickle, this one sees a line of JSON and a pack.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

from e4t_cli import errors
from e4t_cli.errors import E4TError, IntegrityError, ResourceError, printable
from e4t_cli.formats.e4t_diffusion.checkpoint import ConversionRequest, ConversionResult
from e4t_cli.progress import Progress, ProgressCallback

_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # CLONE_NEWUSER, CLONE_NEWNET
_SECRET = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "API_KEY", "PROXY", "SSH_AUTH")
_FORBIDDEN = (
    *("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn"),
    *("os.startfile", "pty.spawn", "ftplib.", "http.", "urllib.", "smtplib.", "webbrowser."),
)


def clean_environment() -> dict[str, str]:
    """Return the environment for a process that reads untrusted files: no tokens, no network."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not any(word in name.upper() for word in _SECRET)
    }
    return {**kept, "HF_HUB_OFFLINE": "1", "E4T_OFFLINE": "1", "NO_PROXY": "*"}


def leave_the_network() -> bool:
    """Ask the kernel for a network of our own, with nobody in it, before any thread is started.

    Returns:
        Whether it could be had; it takes Linux and a permission that many systems give.
    """
    if not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(OSError, AttributeError):
        unshare = ctypes.CDLL(None, use_errno=True).unshare
        return unshare(_NEW_NETWORK) == 0 or unshare(_NEW_USER | _NEW_NETWORK) == 0
    return False


def forbid() -> None:
    """Make every socket and every new process an error, for the rest of this process's life.

    Python has no way to remove an audit hook.
    """

    def refuse(*arguments: Any, **options: Any) -> NoReturn:
        raise PermissionError("a checkpoint that is being read has no network")

    for name in ("socket", "create_connection", "create_server", "socketpair", "getaddrinfo"):
        setattr(socket, name, refuse)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(_FORBIDDEN):
            raise PermissionError(f"a checkpoint that is being read may not use {event}")

    sys.addaudithook(watch)


STAGE = "convert"
_SPARE_BYTES = 100_000_000
_STALE_SECONDS = 24 * 3600
_WORKING = ".converting-"


def convert(
    wish: ConversionRequest, target: Path, on_progress: ProgressCallback | None = None
) -> ConversionResult:
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


def _run(
    wish: ConversionRequest, folder: Path, on_progress: ProgressCallback | None
) -> ConversionResult:
    loud = os.environ.get("E4T_DEBUG") == "1"
    command = [sys.executable, "-m", "e4t_cli.formats.e4t_diffusion", str(folder)]
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
        return ConversionResult(**answer["report"])
    raise _told(answer.get("error"), code, wish)


def _understood(line: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        found = json.loads(line)
        if isinstance(found, dict):
            return found
    return {}


def _told(error: object, code: int, wish: ConversionRequest) -> E4TError:
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


def _check_room(wish: ConversionRequest, folder: Path) -> None:
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
