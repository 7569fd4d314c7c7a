"""What a call to the hub may use: cache paths, offline mode, accepted licences.

The environment is read at every call. huggingface_hub reads it once, at import (2.4.0, module `constants`), so that a
command line option or a test that sets it later would not count.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from e4t_cli.errors import WeightsUnavailable, printable
from e4t_cli.files import write_atomically
from e4t_cli.progress import Progress, ProgressCallback

COMMIT = re.compile(r"[0-9a-f]{40}")
REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")


# In place of a folder in a home that there is not, as in containers: nothing is found in it, and what is to be written
# there ends with a message that contains this name.
NO_HOME = Path(os.devnull) / "HOME-is-not-set"
# What decides on each folder: the first variable that is set, and the folder below it.
_HUB_CACHE = (
    ("HF_HUB_CACHE", ""),
    ("HUGGINGFACE_HUB_CACHE", ""),
    ("HF_HOME", "hub"),
    ("XDG_CACHE_HOME", "huggingface/hub"),
)
_USER_CACHE = (("E4T_CACHE_DIR", ""),)


def hub_cache() -> Path:
    """Return huggingface_hub's cache folder, which all programs share."""
    return _chosen(_HUB_CACHE) or _expanded("~/.cache/huggingface/hub")


def user_cache() -> Path:
    """Return e4t's cache folder; everything in it can be made again."""
    return _chosen(_USER_CACHE) or _user_folder("user_cache_path")


def user_data() -> Path:
    """Return e4t's folder for what the user made: domains, and accepted licences."""
    return _user_folder("user_data_path")


def _chosen(variables: tuple[tuple[str, str], ...]) -> Path | None:
    return next((_expanded(os.environ[name]) / below for name, below in variables if os.environ.get(name)), None)


def _expanded(folder: str) -> Path:
    path = os.path.expanduser(folder)  # Path.expanduser raises where there is no home
    return NO_HOME if path.startswith("~") else Path(path)


def _user_folder(kind: str) -> Path:
    import platformdirs

    try:
        return _expanded(getattr(platformdirs, kind)("e4t", appauthor=False))
    except RuntimeError:  # platformdirs 4.14 where there is no home; earlier ones return "~/..."
        return NO_HOME


def matches(folder: Path, pattern: str) -> list[Path]:
    """Return the sorted paths below a folder that match a pattern; none of a folder that cannot be one."""
    with contextlib.suppress(OSError):  # Path.glob raises for names that are too long, and for loops of links
        return sorted(folder.glob(pattern))
    return []


def folder_problems() -> list[str]:
    """Return a sentence for each of the three folders that cannot be used, with the variable that points to it."""
    places = (
        (hub_cache(), [name for name, _ in _HUB_CACHE]),
        (user_cache(), ["E4T_CACHE_DIR", "XDG_CACHE_HOME"]),
        (user_data(), ["XDG_DATA_HOME"]),
    )
    found = {_reason_against(folder, names): None for folder, names in places}
    return [reason for reason in found if reason]


def _reason_against(folder: Path, names: list[str]) -> str:
    """Return why nothing can be kept in a folder, which need not exist yet; "" if it can."""
    if NO_HOME in (folder, *folder.parents):
        return "there is no home folder for caches and domains: set HOME, or E4T_CACHE_DIR, HF_HOME and XDG_DATA_HOME"
    name = next((name for name in names if os.environ.get(name)), "")
    shown = printable(f"{name}={os.environ[name]}" if name else str(folder), limit=120)
    try:
        os.lstat(folder)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        return f"{shown} cannot be used: {getattr(error, 'strerror', None) or error}"
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not os.path.isdir(folder):
        return f"{shown} cannot be a folder: {printable(str(folder))} is none"
    return "" if os.access(folder, os.R_OK | os.W_OK | os.X_OK) else f"{shown} cannot be read and written"


def is_offline() -> bool:
    """Whether an environment variable forbids the network."""
    names = ("E4T_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").lower() in ("1", "on", "yes", "true") for name in names)


def go_offline() -> None:
    """Forbid the network to this process, and to libraries that it has not imported yet."""
    os.environ["E4T_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"


def endpoint() -> str:
    """Return the address of the hub."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def repository_folder(repository: str) -> Path:
    """Return the folder of a model repository in the hub's cache, whether it exists or not."""
    return hub_cache() / f"models--{repository.replace('/', '--')}"


def repository_of(folder: Path) -> str:
    """Return "owner/name" of a folder that `repository_folder` returned."""
    return folder.name.removeprefix("models--").replace("--", "/", 1)


def snapshot_folder(repository: str, commit: str) -> Path:
    """Return the folder of one commit in the hub's cache, whether it exists or not."""
    return repository_folder(repository) / "snapshots" / commit


def write_to_cache(path: Path, data: bytes) -> None:
    """Write a file that spares work the next time; if it cannot be written, that work is done again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)


AskLicence = Callable[[str], bool]  # shows a question to the user and returns whether the answer was yes


@dataclass(frozen=True, kw_only=True)
class HubAccess:
    """How the hub may be used."""

    offline: bool = False  # use cached files only and open no socket; environment variables can forbid it too
    accept_license: bool | AskLicence = False  # True accepts licences of what is fetched; a function is called to ask
    on_progress: ProgressCallback | None = None  # called with every progress event and remark

    @property
    def cut_off(self) -> bool:
        """Whether the network must not be used."""
        return self.offline or is_offline()

    def remark(self, sentence: str) -> None:
        """Report something that is good to know."""
        if self.on_progress is not None:
            self.on_progress(Progress(stage="fetch", remark=sentence))

    def note(self, sentence: str) -> None:
        """Report something that may not be what the user meant."""
        if self.on_progress is not None:
            self.on_progress(Progress(stage="fetch", note=sentence))


# Licences that need no consent; every other one does, unknown ones included.
FREE = {
    *("apache-2.0", "mit", "mit-0", "isc", "unlicense", "zlib", "bsl-1.0"),
    *("bsd", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-3.0"),
}


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The licence of a repository."""

    repository: str  # "owner/name"
    licence: str  # its identifier, "" where none is stated
    note: str = ""  # what else the user should know, in a few words

    @property
    def asks(self) -> bool:
        """Whether the licence has to be accepted."""
        return self.licence.lower() not in FREE

    @property
    def sentence(self) -> str:
        """The sentence that is shown."""
        licence = f"is under {printable(self.licence)}" if self.licence else "states no licence"
        note = f" ({printable(self.note)})" if self.note else ""
        return f"{self.repository} {licence}{note}: {endpoint()}/{self.repository}"


def accept(terms: Terms, access: HubAccess) -> None:
    """Show a licence and, unless it is free or was accepted before, obtain consent; WeightsUnavailable without.

    Consent is remembered in the user's data folder for one repository and licence: a repository that changes its
    licence needs a new one.
    """
    if is_accepted(terms):
        return
    access.remark(terms.sentence)
    if not terms.asks:
        return
    answer = access.accept_license
    if not (answer(f"{terms.sentence}. Do you accept that?") if callable(answer) else answer):
        hint = f"read it at {endpoint()}/{terms.repository}, then add --accept-license, once"
        raise WeightsUnavailable(f"the licence of {terms.repository} has not been accepted", hint=hint)
    day = time.strftime("%Y-%m-%d", time.gmtime())
    accepted = {**_accepted(), terms.repository: {"licence": terms.licence, "accepted": day}}
    write_to_cache(_consent_file(), json.dumps(accepted, indent=1).encode())


def is_accepted(terms: Terms) -> bool:
    """Whether the user accepted this licence earlier."""
    return _accepted().get(terms.repository, {}).get("licence") == terms.licence


def _accepted() -> dict[str, dict[str, str]]:
    with contextlib.suppress(OSError, ValueError):
        if isinstance(found := json.loads(_consent_file().read_text(encoding="utf-8")), dict):
            return found
    return {}


def _consent_file() -> Path:
    return user_data() / "licences.json"
