"""The child process that reads a checkpoint's pickles, without network and without children.

    python -m e4t_cli.formats.e4t_diffusion FOLDER < request.json

A `ConversionRequest` on stdin, lines of JSON on stdout, files in FOLDER.

A file of `torch.save` is a zip of raw tensor data and one pickle with their layout. It is hashed, its zip directory is
checked, and torch's weights-only loader runs the pickle: tensors, dictionaries and nothing that could be called. That
loader has had holes, and checkpoints come from strangers: code that gets through one has no sockets, cannot start
programs, and finds none of the user's tokens in its environment. On Linux, where permitted, the kernel takes the
network away as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import socket
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from e4t_cli.errors import E4TError, IntegrityError, printable
from e4t_cli.files import file_error, sha256_of
from e4t_cli.system_memory import memory_ran_out, out_of_memory

if TYPE_CHECKING:
    from torch import Tensor

GET_AGAIN = "get the file again from where it was published"
MAX_ENTRIES = 20_000
MAX_PICKLE_BYTES = 16_000_000  # the layout of 2,000 tensors takes 0.3 MB
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # CLONE_NEWUSER, CLONE_NEWNET
_FORBIDDEN = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile",
    "pty.spawn", "ftplib.", "http.", "urllib.", "smtplib.", "webbrowser.",
)  # fmt: skip


def leave_network() -> bool:
    """Move this process to an empty network namespace, before any thread is started; returns whether Linux let it."""
    if not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(OSError, AttributeError):
        unshare = ctypes.CDLL(None, use_errno=True).unshare
        return bool(unshare(_NEW_NETWORK) == 0 or unshare(_NEW_USER | _NEW_NETWORK) == 0)
    return False


def forbid_network_and_processes() -> None:
    """Make every socket and every new process an error, for good: audit hooks cannot be removed."""

    def refuse(*arguments: object, **options: object) -> NoReturn:
        raise PermissionError("a checkpoint that is being read has no network")

    for name in ("socket", "create_connection", "create_server", "socketpair", "getaddrinfo"):
        setattr(socket, name, refuse)

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event.startswith(_FORBIDDEN):
            raise PermissionError(f"a checkpoint that is being read may not use {event}")

    sys.addaudithook(audit)


def read_pickled_tensors(path: Path, sha256: str = "") -> tuple[dict[str, Tensor], str]:
    """Read a state dict of torch.save, memory-mapped: its data stays on disk until it is used.

    Args:
        sha256: what it must be; "" where none was declared.

    Returns:
        Its tensors by name, and its SHA-256.

    Raises:
        IntegrityError: it is anything else.
    """
    import torch

    found = sha256_of(path)
    if sha256 and found != sha256:
        raise IntegrityError(f"{path.name} is damaged: its SHA-256 is {found}, not {sha256}")
    _check_zip(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        # Without torch's own message: it explains how to read the file without the restriction.
        unwanted = re.search(r"GLOBAL ([\w.]{1,100})", str(error))
        asks = f": it asks for {unwanted[1]}" if unwanted else ""
        message = f"{path.name} holds more than tensors, or is damaged, and was not opened{asks}"
        raise IntegrityError(message, hint=GET_AGAIN) from error
    if not isinstance(content, dict) or not content:
        raise IntegrityError(f"{path.name} is not a table of tensors")
    for key, value in content.items():
        _check_entry(path, key, value)
    return {key: value.detach() for key, value in content.items()}, found


def _check_zip(path: Path) -> None:
    """Refuse a container that torch.save does not write, or that would grow in memory, before anything is unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        message = f"{path.name} is not a file of torch.save, or only a part of one"
        raise IntegrityError(message, hint=GET_AGAIN) from error
    pickles = [one for one in entries if one.filename.endswith(".pkl")]
    stored = all(one.compress_type == zipfile.ZIP_STORED for one in entries)
    if len(entries) > MAX_ENTRIES or not stored or len(pickles) != 1:
        raise IntegrityError(f"{path.name} is a zip file, but not one of torch.save")
    if pickles[0].file_size > MAX_PICKLE_BYTES:
        raise IntegrityError(f"{path.name} has a layout of {pickles[0].file_size:,} bytes")


def _check_entry(path: Path, key: object, value: object) -> None:
    import torch

    if not isinstance(key, str) or not isinstance(value, torch.Tensor):
        raise IntegrityError(f"{path.name} holds {printable(repr(key), limit=80)}, not a tensor")
    shown = f"{path.name}: {printable(key, limit=200)}"
    if value.layout != torch.strided or not value.is_floating_point() or value.is_meta:
        raise IntegrityError(f"{shown} is not a tensor of plain numbers")
    # A tensor can claim any size over a few bytes by repeating them.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise IntegrityError(f"{shown} claims more numbers than the file has")


def main() -> int:
    leave_network()  # before a library starts threads, after which the kernel refuses
    from e4t_cli.formats.e4t_diffusion.checkpoint import ConversionRequest
    from e4t_cli.formats.e4t_diffusion.conversion import convert_to_domain_folder

    request, target = ConversionRequest.from_json(sys.stdin.read()), Path(sys.argv[1])
    # Whatever a library prints to stdout goes to stderr.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    forbid_network_and_processes()
    failure: E4TError
    try:
        result = convert_to_domain_folder(
            request, target, read_pickled_tensors, lambda done: answer(done=done, total=100)
        )
    except E4TError as error:
        failure = error
    except Exception as error:
        if memory_ran_out(error):
            failure = out_of_memory("close other programs: it needs about as much memory as its largest file")
        elif isinstance(error, OSError):
            failure = file_error(error, target)
        else:
            raise
    else:
        answer(result=asdict(result))
        return 0
    answer(error=[failure.exit_code, failure.message, failure.hint])
    return failure.exit_code


if __name__ == "__main__":
    sys.exit(main())
