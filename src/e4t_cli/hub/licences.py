"""Licences of what is fetched: shown, and where they restrict or are not stated, accepted once.

Which licences need no question is a short list; everything else is asked about, so that a new
name errs on the side of asking. What was accepted is remembered in the user's data folder, per
repository and licence: a repository that changes its licence asks again.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

from e4t_cli.errors import WeightsUnavailable, printable
from e4t_cli.files import write_atomically

from .access import Access
from .places import endpoint

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


def accept(terms: Terms, access: Access) -> None:
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
