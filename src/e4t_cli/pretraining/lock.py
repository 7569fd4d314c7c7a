"""One pre-training of a domain at a time: a lock file in its folder of checkpoints, which says who is at it."""

from __future__ import annotations

import errno
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from e4t_cli.errors import UsageError, printable
from e4t_cli.files import make_folder, writing
from e4t_cli.temporary import has_ended, machine

NAME = "lock"


@contextmanager
def locked(folder: Path, domain: str) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it does not exist, and removed at the end if it is empty.

    The operating system's lock ends with its process, however that ends. Where a file system has none, a process of
    this machine that has ended is recognised by what the file says.

    Raises:
        UsageError: another process holds it, or the folder cannot be written to.
    """
    make_folder(folder)
    with writing(folder):
        handle = _take(folder / NAME, domain)
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / NAME).unlink()
        os.close(handle)
        with suppress(OSError):
            folder.rmdir()


def _take(path: Path, domain: str) -> int:
    """Return the open and locked file."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _lock(handle):
                raise _busy(handle, path, domain)
            # Whoever held it before may have removed the file meanwhile.
            if os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path)):
                about = {"machine": machine(), "process": os.getpid(), "host": platform.node()}
                about["since"] = time.strftime("%Y-%m-%d %H:%M")
                os.lseek(handle, 0, os.SEEK_SET)
                os.ftruncate(handle, 0)
                os.write(handle, json.dumps(about).encode())
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int) -> bool:
    """Lock an open file, until it is closed; False if another process has it locked."""
    with suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
    # Another system, or a file system without locks.
    holder = _holder(handle)
    process = holder.get("process")
    return not isinstance(process, int) or has_ended(str(holder.get("machine")), process)


def _holder(handle: int) -> dict[str, str | int]:
    with suppress(OSError, ValueError):
        os.lseek(handle, 0, os.SEEK_SET)
        if isinstance(found := json.loads(os.read(handle, 1000)), dict):
            return found
    return {}


def _busy(handle: int, path: Path, domain: str) -> UsageError:
    who, about = "another process", _holder(handle)
    if about:
        who = f"process {about.get('process')} on {about.get('host')}, since {about.get('since')}"
    message = f"the domain {domain!r} is being pre-trained already, by {printable(who)}"
    hint = "wait for it, or choose another name with --domain"
    if about.get("machine") != machine():
        hint = f"{hint}; if it has ended, remove {printable(str(path))}"
    return UsageError(message, hint=hint)
