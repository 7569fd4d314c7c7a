"""Taking from a process what reading numbers from a file does not need: network, children.

A checkpoint comes from strangers, and torch's restricted loader has had holes. If it has another
one, the code that slips through finds itself without sockets, without a way to start programs, and
without the user's tokens. On Linux the kernel takes the network away as well, where it may.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import sys
from typing import Any, NoReturn

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
