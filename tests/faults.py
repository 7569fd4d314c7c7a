"""Faults at the n-th step of the file system below a folder: an error of the operating system, or the process's end.

A step is a call that makes, opens for writing, writes, syncs, renames or removes something there. What native code
writes without Python is not seen; the steps around it are.

    for step in count():
        with faults(root, step, OSError(errno.ENOSPC, "No space left on device")) as seen:
            ...
        if not seen.reached:
            break
"""

from __future__ import annotations

import builtins
import io
import os
import threading
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from e4t_cli import files

REMOVING = ("unlink", "remove", "rmdir")
CALLS = ("open", "mkdir", "rename", "replace", "link", "symlink", "fsync", "write", "ftruncate", *REMOVING)
TWO_PATHS = ("rename", "replace", "link")


class Steps:
    """Counts steps, and acts at one of them."""

    def __init__(self, root, step, act, *, lasting=False, removing=False):
        self.root, self.step, self.act = os.path.realpath(root), step, act
        self.lasting, self.removing = lasting, removing  # every step from there on; removals count as well
        self.names, self.inside = [], threading.local()

    @property
    def reached(self):
        return len(self.names) > self.step

    def meet(self, name):
        self.names.append(name)
        if len(self.names) - 1 == self.step or (self.lasting and len(self.names) > self.step):
            self.act()

    def is_below(self, path, options=None):
        """Whether a call is about the folder; names relative to an open folder are those of `shutil.rmtree`."""
        if isinstance(path, int):
            try:
                path = os.readlink(f"/proc/self/fd/{path}")
            except OSError:
                return False
        elif (options or {}).get("dir_fd") is not None:
            return self.is_below(options["dir_fd"])
        return os.path.abspath(os.fsdecode(path)).startswith((f"{self.root}{os.sep}", self.root))


class Watched:
    """A file whose writes are steps."""

    def __init__(self, file, steps):
        self._file, self._steps = file, steps

    def write(self, data):
        self._steps.meet("write")
        return self._file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()

    def __iter__(self):
        return iter(self._file)

    def __getattr__(self, name):
        return getattr(self._file, name)


@contextmanager
def faults(root, step, error=None, *, kill=False, lasting=False):
    """Let the step of that number below a folder fail, from 0; `kill` ends this process there, as SIGKILL would."""

    def act():
        if kill:
            os._exit(137)
        raise type(error)(*error.args)

    steps = Steps(root, step, act if kill or error else lambda: None, lasting=lasting, removing=kill)

    def wrap(name, real):
        def call(*arguments, **options):
            path = arguments[0] if arguments else options.get("path")
            writes = name != "open" or (len(arguments) > 1 and arguments[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            counted = writes and (name not in REMOVING or steps.removing)
            if counted and steps.is_below(path, options):
                steps.meet(name)
            return real(*arguments, **options)

        return call

    def watched(real):
        def call(file, mode="r", *arguments, **options):
            writes = any(letter in mode for letter in "wax+") and steps.is_below(file)
            if writes and not isinstance(file, int):
                steps.meet("open")
            opened = real(file, mode, *arguments, **options)
            return Watched(opened, steps) if writes else opened

        return call

    def rename_with_flags(source, target, **options):
        if steps.is_below(target):
            steps.meet("rename")
        return real_rename(source, target, **options)

    real_rename = files.rename_with_flags
    with mock.patch.object(files, "rename_with_flags", rename_with_flags):
        patches = [mock.patch.object(os, name, wrap(name, getattr(os, name))) for name in CALLS]
        patches += [mock.patch.object(module, "open", watched(io.open)) for module in (io, builtins)]
        patches.append(mock.patch.object(os, "fdopen", watched(os.fdopen)))
        for patch in patches:
            patch.start()
        try:
            yield steps
        finally:
            for patch in reversed(patches):
                patch.stop()


def tree(folder: Path) -> dict[str, bytes | str | None]:
    """Return everything below a folder: files with their content, links with their target, folders with None."""

    def content(path):
        if path.is_symlink():
            return os.readlink(path)
        return None if path.is_dir() else path.read_bytes()

    return {path.relative_to(folder).as_posix(): content(path) for path in sorted(Path(folder).rglob("*"))}
