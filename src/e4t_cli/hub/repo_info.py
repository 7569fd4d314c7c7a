"""What the hub declares about the files of a repository, and whether cached files are as declared.

What the hub declares about a commit never changes, so it is remembered: cached files are found and verified without a
network. A branch is resolved once and stays at that commit until `e4t cache rm`: there is no silent upgrade.

huggingface_hub compares sizes only: a body of the right size with wrong bytes stays in the cache for good. Here each
file is also compared with the SHA-256 that the hub declares. The result is remembered with the file's size and time
of modification; a file of which either changed is read again.
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
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

from e4t_cli.errors import WeightsUnavailable, printable
from e4t_cli.hub.errors import as_e4t_error, is_refused_token, is_transient, retry_after
from e4t_cli.hub.paths import (
    COMMIT,
    REPOSITORY,
    HubAccess,
    endpoint,
    matches,
    repository_folder,
    user_cache,
    write_to_cache,
)

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

_R = TypeVar("_R")

TRIES = 3
TIMEOUT = 15.0  # seconds
MAX_WAIT = 30.0  # seconds: how long to wait before a retry is the user's decision above this


@dataclass(frozen=True, kw_only=True)
class RepoFile:
    """One file of a repository, as the hub declares it."""

    path: str  # inside the repository, with slashes
    size: int = 0  # bytes
    digest: str = ""  # the SHA-256 of a large file, or git's SHA-1 of a small one


@dataclass(frozen=True, kw_only=True)
class RepoInfo:
    """One commit of a repository."""

    repository: str
    commit: str
    licence: str = ""
    files: tuple[RepoFile, ...] = ()

    @property
    def digests(self) -> dict[str, str]:
        """The declared checksums by path."""
        return {file.path: file.digest for file in self.files}


def get_repo_info(repository: str, revision: str | None, access: HubAccess) -> RepoInfo | None:
    """Return what is in a repository, as remembered or requested; None if that needs the network and it is forbidden.

    Args:
        revision: a commit, a branch or a tag; None is the branch "main".

    Raises:
        WeightsUnavailable: there is no such revision, or the hub does not answer.
    """
    check_repository(repository)
    known = cached_repo_info(repository, revision)
    if known is not None or access.cut_off:
        return known
    name = revision or "main"
    info = _request_repo_info(repository, name, access)
    write_to_cache(_info_folder(repository) / f"{info.commit}.json", json.dumps(asdict(info), indent=1).encode())
    if not COMMIT.fullmatch(name):
        write_to_cache(_resolved_revision(repository, name), info.commit.encode())
    return info


def cached_repo_info(repository: str, revision: str | None) -> RepoInfo | None:
    """Return what is remembered about a repository; no network."""
    commit = cached_commit(repository, revision)
    if commit is None:
        return None
    try:
        table = json.loads((_info_folder(repository) / f"{commit}.json").read_text(encoding="utf-8"))
        files = tuple(RepoFile(**file) for file in table.pop("files"))
        return RepoInfo(**table, files=files)
    except (OSError, ValueError, TypeError, KeyError):
        return None  # absent or damaged: it will be requested again


def cached_commit(repository: str, revision: str | None) -> str | None:
    """Return the commit that a branch or tag was resolved to, by e4t or by another program."""
    name = revision or "main"
    if COMMIT.fullmatch(name):
        return name
    for path in (_resolved_revision(repository, name), repository_folder(repository) / "refs" / name):
        with contextlib.suppress(OSError, ValueError):
            found = path.read_text(encoding="utf-8").strip()
            if COMMIT.fullmatch(found):
                return found
    return None


def cached_repo_infos() -> list[RepoInfo]:
    """Return everything that is remembered about repositories."""
    paths = matches(user_cache() / "hub", "*/*.json")
    found = [cached_repo_info(path.parent.name.replace("--", "/", 1), path.stem) for path in paths]
    return [info for info in found if info is not None]


def forget_repository(repository: str) -> None:
    """Forget everything about a repository: its branches will be resolved again."""
    for path in matches(_info_folder(repository), "*"):
        path.unlink(missing_ok=True)


def check_repository(repository: str) -> None:
    """Raise WeightsUnavailable for what cannot be a repository, before it becomes part of a path."""
    if not REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository:
        raise WeightsUnavailable(f"{printable(repository)!r} cannot be a repository of the hub", hint="owner/name")


def has_token() -> bool:
    """Whether huggingface_hub has a token of the user."""
    from huggingface_hub import get_token

    return get_token() is not None


def call_hub(call: Callable[[bool | None], _R], access: HubAccess) -> _R:
    """Call with the user's token and, where the hub does not know it, without one.

    Every request of this package passes here; offline, none does.
    """
    if access.cut_off:
        from huggingface_hub.errors import OfflineModeIsEnabled

        raise OfflineModeIsEnabled
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


def _request_repo_info(repository: str, revision: str, access: HubAccess) -> RepoInfo:
    from huggingface_hub import HfApi

    def call(token: bool | None) -> ModelInfo:
        api = HfApi(endpoint=endpoint(), token=token)
        return api.model_info(repository, revision=revision, files_metadata=True, timeout=TIMEOUT)

    for attempt in range(1, TRIES + 1):  # huggingface_hub 2.4.0 retries transfers of files, not this call
        try:
            found = call_hub(call, access)
            break
        except Exception as error:  # of huggingface_hub, of its HTTP library, of JSON
            wait = retry_after(error) or float(attempt)
            if attempt == TRIES or not is_transient(error) or wait > MAX_WAIT:
                raise as_e4t_error(error, repository, revision) from error
            access.remark(f"the hub does not answer as it should: trying again in {wait:.0f} s")
            time.sleep(wait)
    if not found.sha or not COMMIT.fullmatch(found.sha):
        raise as_e4t_error(ValueError(), repository)
    licence = getattr(found.card_data, "license", None) or ""
    if licence == "other":
        licence = getattr(found.card_data, "license_name", None) or licence
    files = []
    for one in found.siblings or ():
        digest = one.lfs.sha256 if one.lfs is not None else one.blob_id or ""
        files.append(RepoFile(path=one.rfilename, size=int(one.size or 0), digest=str(digest)))
    return RepoInfo(repository=repository, commit=found.sha, licence=str(licence), files=tuple(files))


def _info_folder(repository: str) -> Path:
    return user_cache() / "hub" / repository.replace("/", "--")


def _resolved_revision(repository: str, name: str) -> Path:
    return _info_folder(repository) / f"ref-{quote(name, safe='')}"


def checksum_mismatch(path: Path, declared: str = "", on_bytes: Callable[[int], None] | None = None) -> str | None:
    """Return the checksum of a file if it is not the declared one; a file that has not changed is not read again.

    Args:
        path: in a snapshot folder of the hub's cache.
        declared: SHA-256, or git's SHA-1; "" takes the name of the blob, if that is one.
        on_bytes: called with the number of bytes of each block read, and of a file not read again.
    """
    expected = declared or checksum_in_name(path)
    if not expected:
        return None
    about, verified = path.stat(), _verified_record(path)
    record = {"path": str(path), "size": about.st_size, "mtime_ns": about.st_mtime_ns, "digest": expected}
    with contextlib.suppress(OSError, ValueError):
        if json.loads(verified.read_text(encoding="utf-8")) == record:
            if on_bytes is not None:
                on_bytes(about.st_size)
            return None
    if (found := checksum(path, expected, on_bytes)) != expected:
        return found
    write_to_cache(verified, json.dumps(record).encode())
    return None


def checksum_in_name(path: Path) -> str:
    """Return the checksum in the name of the blob that a snapshot's link points to, or ""."""
    name = os.path.basename(os.readlink(path)) if os.path.islink(path) else ""
    return name if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name) else ""


def checksum(path: Path, like: str, on_bytes: Callable[[int], None] | None = None) -> str:
    """Return the checksum of a file: SHA-256 where `like` has 64 digits, git's SHA-1 of a blob where it has 40."""
    if len(like) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            if on_bytes is not None:
                on_bytes(len(block))
    return digest.hexdigest()


def delete_file(path: Path) -> None:
    """Delete a file of a snapshot and the blob behind it."""
    blob = path.parent / os.readlink(path) if os.path.islink(path) else None
    path.unlink(missing_ok=True)
    if blob is not None:
        blob.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        _verified_record(path).unlink(missing_ok=True)


def forget_deleted() -> None:
    """Forget the verification of files that no longer exist."""
    for record in matches(user_cache() / "verified", "*.json"):
        path = ""
        with contextlib.suppress(OSError, ValueError):
            path = json.loads(record.read_text(encoding="utf-8")).get("path", "")
        if not path or not os.path.exists(path):
            record.unlink(missing_ok=True)


def _verified_record(path: Path) -> Path:
    name = hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return user_cache() / "verified" / f"{name}.json"
