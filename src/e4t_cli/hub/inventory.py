"""Whether files of the hub's cache are what the hub declared, and remembering that they were.

huggingface_hub compares lengths only: a body of the right length and the wrong content stays for
ever. Here every file is read once, its checksum compared with the hub's, and the result remembered
with the file's length and time; when either changes, it is read again. The hub's cache names a blob
after its checksum, so even files that another program fetched can be checked without a network.

What the hub says a repository contains, remembered: names, sizes and checksums of its files.

A commit never changes, so one answer is good for ever, and with it a fetched repository can be
used and verified without a network. A branch is resolved to a commit once and then stays there: no
silent upgrade. `e4t cache rm` forgets.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from e4t_cli.errors import WeightsUnavailable, printable
from e4t_cli.files import write_atomically
from e4t_cli.hub.errors import as_e4t_error, is_passing, is_refused_token, retry_after
from e4t_cli.hub.paths import COMMIT, REPOSITORY, HubAccess, endpoint, repository_folder, user_cache

_BLOCK = 1 << 22
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def is_intact(
    path: Path, declared: str = "", on_bytes: Callable[[int], None] | None = None
) -> str | None:
    """Compare a file with its declared checksum, unless that was done and it has not changed.

    Args:
        path: in a snapshot folder of the hub's cache.
        declared: SHA-256, or git's SHA-1; "" takes the name of the blob.
        on_bytes: called with the number of bytes of each block read, and of files not read again.

    Returns:
        None if it is as declared, otherwise the checksum it has. A file that nobody declared
        anything about is taken as it is.
    """
    expected = declared or blob_name(path)
    if not expected:
        return None
    stamp = _stamp(path)
    if _recall(path) == {**stamp, "digest": expected}:
        if on_bytes is not None:
            on_bytes(int(str(stamp["size"])))
        return None
    found = digest_of(path, expected, on_bytes)
    if found != expected:
        return found
    _memorise(path, {**stamp, "digest": expected})
    return None


def blob_name(path: Path) -> str:
    """Return the checksum in the name of the blob that a snapshot's link points to, or ""."""
    with contextlib.suppress(OSError):
        name = os.path.basename(os.readlink(path))
        if _DIGEST.fullmatch(name):
            return name
    return ""


def digest_of(path: Path, like: str, on_bytes: Callable[[int], None] | None = None) -> str:
    """Return the checksum of a file, of the kind of another checksum.

    Args:
        like: 64 digits for SHA-256, 40 for git's SHA-1 of a blob.
    """
    if len(like) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            if on_bytes is not None:
                on_bytes(len(block))
    return digest.hexdigest()


def discard(path: Path) -> None:
    """Delete a file of a snapshot and the blob behind it, so that it will be fetched again."""
    blob = path.parent / os.readlink(path) if path.is_symlink() else None
    path.unlink(missing_ok=True)
    if blob is not None:
        blob.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        _note(path).unlink(missing_ok=True)


def forget_gone() -> int:
    """Forget what is remembered of files that exist no more; returns how many."""
    gone = 0
    for note in (user_cache() / "verified").glob("*.json"):
        try:
            path = json.loads(note.read_text(encoding="utf-8")).get("path", "")
        except (OSError, ValueError):
            path = ""
        if not path or not os.path.exists(path):
            note.unlink(missing_ok=True)
            gone += 1
    return gone


def _stamp(path: Path) -> dict[str, object]:
    about = path.stat()
    return {"path": str(path), "size": about.st_size, "mtime_ns": about.st_mtime_ns}


def _note(path: Path) -> Path:
    name = hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return user_cache() / "verified" / f"{name}.json"


def _recall(path: Path) -> object:
    try:
        return json.loads(_note(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _memorise(path: Path, stamp: dict[str, object]) -> None:
    note = _note(path)
    with contextlib.suppress(OSError):  # read-only: the file is read again the next time
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(note, json.dumps(stamp).encode())


TRIES = 3
MAX_WAIT_SECONDS = 30.0  # seconds: longer than this the user decides whether to wait
TIMEOUT = 15.0  # seconds


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """One file of a repository, as the hub declares it.

    Args:
        path: inside the repository, with slashes.
        size: in bytes.
        digest: the SHA-256 of a large file, or git's SHA-1 of a small one.
    """

    path: str
    size: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """One state of a repository."""

    repository: str
    commit: str
    licence: str = ""
    files: tuple[HubFile, ...] = ()


def fetch_inventory(repository: str, revision: str | None, access: HubAccess) -> Inventory | None:
    """Return what is in a repository: remembered, or asked of the hub and then remembered.

    Args:
        revision: a commit, a branch or a tag; None is the branch "main".

    Returns:
        None if it is not remembered and the network must not be used.

    Raises:
        WeightsUnavailable: there is no such thing, or the hub does not answer.
    """
    check_repository(repository)
    known = remembered(repository, revision)
    if known is not None or access.cut_off:
        return known
    inventory = _ask(repository, revision or "main", access)
    _remember(inventory, revision or "main")
    return inventory


def remembered(repository: str, revision: str | None) -> Inventory | None:
    """Return what was found out earlier about a repository; nothing is asked."""
    commit = known_commit(repository, revision)
    if commit is None:
        return None
    try:
        table = json.loads((_folder(repository) / f"{commit}.json").read_text(encoding="utf-8"))
        files = tuple(HubFile(**file) for file in table.pop("files"))
        return Inventory(**table, files=files)
    except (OSError, ValueError, TypeError, KeyError):
        return None  # not there, or damaged: it will be asked for again


def known_commit(repository: str, revision: str | None) -> str | None:
    """Return the commit that a branch or tag was found at, by us or by another program."""
    name = revision or "main"
    if COMMIT.fullmatch(name):
        return name
    plain = quote(name, safe="")
    for path in (
        _folder(repository) / f"ref-{plain}",
        repository_folder(repository) / "refs" / name,
    ):
        try:
            found = path.read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            continue
        if COMMIT.fullmatch(found):
            return found
    return None


def all_remembered() -> list[Inventory]:
    """Return every inventory that this program has taken."""
    found = []
    for path in sorted((user_cache() / "hub").glob("*/*.json")):
        inventory = remembered(path.parent.name.replace("--", "/", 1), path.stem)
        if inventory is not None:
            found.append(inventory)
    return found


def check_repository(repository: str) -> None:
    """Refuse what cannot be the name of a repository, before it becomes part of a path.

    Raises:
        WeightsUnavailable: it cannot.
    """
    if not REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository:
        raise WeightsUnavailable(
            f"{printable(repository)!r} cannot be a repository of the hub", hint="owner/name"
        )


def forget(repository: str) -> None:
    """Forget everything about a repository: its branches will be looked up again."""
    for path in _folder(repository).glob("*"):
        path.unlink(missing_ok=True)


def with_token(call: Callable[[bool | None], Any], access: HubAccess) -> Any:
    """Make a call with the user's token and, where the hub does not know it, without one."""
    try:
        return call(None)
    except Exception as error:
        if not is_refused_token(error) or not has_token():
            raise
        try:
            result = call(False)
        except Exception:
            raise error from None
        access.note("the hub refuses your token (HF_TOKEN, or hf auth login): going on without it")
        return result


def has_token() -> bool:
    """Whether the user has given huggingface_hub a token; which, is nobody's business."""
    from huggingface_hub import get_token

    return get_token() is not None


def _ask(repository: str, revision: str, access: HubAccess) -> Inventory:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint())

    def call(token: bool | None) -> Any:
        return api.model_info(
            repository, revision=revision, files_metadata=True, token=token, timeout=TIMEOUT
        )

    for attempt in range(1, TRIES + 1):
        try:
            found = with_token(call, access)
            break
        except Exception as error:  # of huggingface_hub, of its HTTP library, of JSON
            wait = retry_after(error) or float(attempt)
            if attempt == TRIES or not is_passing(error) or wait > MAX_WAIT_SECONDS:
                raise as_e4t_error(error, repository, revision) from error
            access.remark(f"the hub does not answer as it should: trying again in {wait:.0f} s")
            time.sleep(wait)
    card = found.card_data.to_dict() if found.card_data is not None else {}
    licence = card.get("license") or ""
    if licence == "other":
        licence = card.get("license_name") or licence
    files = [
        HubFile(
            path=one.rfilename,
            size=int(one.size or 0),
            digest=str(one.lfs.sha256 if one.lfs is not None else one.blob_id or ""),
        )
        for one in found.siblings or ()
    ]
    if not found.sha or not COMMIT.fullmatch(found.sha):
        raise as_e4t_error(ValueError(), repository)
    return Inventory(
        repository=repository, commit=found.sha, licence=str(licence), files=tuple(files)
    )


def _remember(inventory: Inventory, revision: str) -> None:
    folder = _folder(inventory.repository)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(inventory), indent=1)
        write_atomically(folder / f"{inventory.commit}.json", text.encode())
        if not COMMIT.fullmatch(revision):
            write_atomically(folder / f"ref-{quote(revision, safe='')}", inventory.commit.encode())
    except OSError:
        return  # a cache that cannot be written to costs a question the next time, no more


def _folder(repository: str) -> Path:
    return user_cache() / "hub" / repository.replace("/", "--")
