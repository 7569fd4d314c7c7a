"""Where things lie: the hub's cache, our own, and whether the network may be used at all.

The environment is read when it is asked for, not at import: what a command line switch or a test
has set counts.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

COMMIT = re.compile(r"[0-9a-f]{40}")
REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")
_TRUE = {"1", "on", "yes", "true"}


def hub_cache() -> Path:
    """Return the folder in which huggingface_hub keeps what it fetched, for every program."""
    for name, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if folder := os.environ.get(name):
            return Path(folder).expanduser() / below
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "huggingface" / "hub"


def own_cache() -> Path:
    """Return the folder of what is derived here: deleting it costs time only."""
    if folder := os.environ.get("E4T_CACHE_DIR"):
        return Path(folder).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("e4t", appauthor=False)


def is_offline() -> bool:
    """Whether the user has forbidden the network; whatever spelling they used."""
    names = ("E4T_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").lower() in _TRUE for name in names)


def go_offline() -> None:
    """Forbid the network to this process, and to the libraries below it if not yet imported."""
    os.environ["E4T_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"


def endpoint() -> str:
    """Return the address of the hub."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def repository_folder(repository: str) -> Path:
    """Return where the hub's cache keeps a model repository, there or not."""
    return hub_cache() / f"models--{repository.replace('/', '--')}"


def snapshot_folder(repository: str, commit: str) -> Path:
    """Return where the hub's cache keeps one state of a repository, there or not."""
    return repository_folder(repository) / "snapshots" / commit


def free_bytes(folder: Path) -> int:
    """Return the room on the disk that a folder is on, or will be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def shown_size(count: float) -> str:
    """Return a number of bytes as people say it, in steps of a thousand."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
