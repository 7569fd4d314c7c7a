"""Where things lie: the hub's cache, our own, and whether the network may be used at all.

The environment is read when it is asked for, not at import: what a command line switch or a test
has set counts.

What a caller allows, and where they want to hear about it: handed down as one value.

Licences of what is fetched: shown, and where they restrict or are not stated, accepted once.

Which licences need no question is a short list; everything else is asked about, so that a new
name errs on the side of asking. What was accepted is remembered in the user's data folder, per
repository and licence: a repository that changes its licence asks again.
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
_TRUE = {"1", "on", "yes", "true"}


def hub_cache() -> Path:
    """Return the folder in which huggingface_hub keeps what it fetched, for every program."""
    for name, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if folder := os.environ.get(name):
            return Path(folder).expanduser() / below
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "huggingface" / "hub"


def user_cache() -> Path:
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


AskLicence = Callable[[str], bool]
"""Puts a question to the user and returns whether they said yes."""


@dataclass(frozen=True, kw_only=True)
class HubAccess:
    """How the hub may be used.

    Args:
        offline: use what is on this machine, and open no socket; the environment can say so too.
        accept_license: True accepts the licence of what is fetched; a function is asked.
        on_progress: called with every event and remark.
    """

    offline: bool = False
    accept_license: bool | AskLicence = False
    on_progress: ProgressCallback | None = None

    @property
    def cut_off(self) -> bool:
        """Whether the network must not be touched."""
        return self.offline or is_offline()

    def remark(self, sentence: str) -> None:
        """Say something that is good to know."""
        if self.on_progress is not None:
            self.on_progress(Progress(stage="fetch", remark=sentence))

    def note(self, sentence: str) -> None:
        """Say something that may not be what the user meant."""
        if self.on_progress is not None:
            self.on_progress(Progress(stage="fetch", note=sentence))


FREE = {
    *("apache-2.0", "mit", "mit-0", "isc", "unlicense", "zlib", "bsl-1.0"),
    *("bsd", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-3.0"),
}


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Under which terms a repository is given away.

    Args:
        repository: "owner/name".
        licence: its name, "" where none is stated.
        note: what else one should know, in a few words.
    """

    repository: str
    licence: str
    note: str = ""

    @property
    def asks(self) -> bool:
        """Whether they have to be accepted."""
        return self.licence.lower() not in FREE

    @property
    def sentence(self) -> str:
        """What is shown."""
        licence = f"is under {printable(self.licence)}" if self.licence else "states no licence"
        note = f" ({printable(self.note)})" if self.note else ""
        return f"{self.repository} {licence}{note}: {endpoint()}/{self.repository}"


def accept(terms: Terms, access: HubAccess) -> None:
    """Show the terms, and have them accepted if they ask for it and were not.

    Raises:
        WeightsUnavailable: nobody accepted them.
    """
    if not terms.asks:
        return access.remark(terms.sentence)
    if is_accepted(terms):
        return None
    access.remark(terms.sentence)
    consent = access.accept_license
    if callable(consent):
        consent = consent(f"{terms.sentence}. Do you accept that?")
    if not consent:
        raise WeightsUnavailable(
            f"the licence of {terms.repository} has not been accepted",
            hint=f"read it at {endpoint()}/{terms.repository}, then add --accept-license, once",
        )
    _remember(terms)
    return None


def is_accepted(terms: Terms) -> bool:
    """Whether the user accepted these terms earlier."""
    return terms.repository in _accepted() and (
        _accepted()[terms.repository].get("licence") == terms.licence
    )


def _accepted() -> dict[str, dict[str, str]]:
    try:
        found = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(terms: Terms) -> None:
    day = time.strftime("%Y-%m-%d", time.gmtime())
    accepted = {**_accepted(), terms.repository: {"licence": terms.licence, "accepted": day}}
    with contextlib.suppress(OSError):  # then it is asked again
        _path().parent.mkdir(parents=True, exist_ok=True)
        write_atomically(_path(), json.dumps(accepted, indent=1).encode())


def _path() -> Path:
    from platformdirs import user_data_path

    return user_data_path("e4t", appauthor=False) / "licences.json"
