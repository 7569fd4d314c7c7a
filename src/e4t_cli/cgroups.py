"""The control groups of Linux around this process, whose limits containers and service managers set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def cgroup_folders(controller: str, root: Path = Path("/")) -> Iterator[tuple[int, Path]]:
    """Yield the version of a controller's hierarchy, 1 or 2, and the folder of each group, the innermost first.

    A limit counts for all groups below, so those above this process's own are there as well, as far as they can be
    seen.

    Args:
        controller: "memory" or "cpu".
        root: the folder with the system's /proc and /sys.
    """
    with suppress(OSError, ValueError):
        mounts = [line.split() for line in (root / "proc/self/mountinfo").read_text().splitlines()]
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
        for _, controllers, group in groups:
            version = 1 if controller in controllers.split(",") else 2
            if controllers and version == 2:
                continue  # another controller of version 1
            for fields in mounts:
                after = fields.index("-")
                kind = "cgroup" if version == 1 else "cgroup2"
                if fields[after + 1] == kind and (version == 2 or controller in fields[after + 3].split(",")):
                    # A container sees its own group as the mount's root, under its name outside or as "/".
                    inside = os.path.relpath(group, fields[3]) if group.startswith(fields[3]) else "."
                    mount = root / fields[4].lstrip("/")
                    for folder in _upwards(mount, Path(os.path.normpath(mount / inside))):
                        yield version, folder


def _upwards(mount: Path, folder: Path) -> Iterator[Path]:
    while True:
        yield folder
        if folder == mount or mount not in folder.parents:
            return
        folder = folder.parent
