"""Downloads files of a repository into huggingface_hub's cache and verifies their checksums.

huggingface_hub transfers the files and compares their sizes only: a body of the right size with wrong bytes stays in
the cache for good. Here each file is also compared with the SHA-256 that the hub declares. The result is remembered
with the file's size and time of modification; a file of which either changed is read again. A file that arrived wrong
is deleted, fetched once more, and deleted again if it is still wrong.

What the hub declares about a commit never changes, so it is remembered too, and cached files are found and verified
without a network. A branch is resolved once and stays at that commit until `e4t cache rm`: there is no silent upgrade.

Measured with huggingface_hub 2.4.0 on the loopback (tests/hub/fake_hub.py), and why some of its functions are not
used:
- `snapshot_download`: an interrupt waits for the files in transfer (Ctrl-C during four files of 24 MB at 4 MB/s each:
  4.1 s, here 0.6 s), and warnings come from threads that cannot be traced to the run that started them.
- `snapshot_download(dry_run=True)`, `HfApi.verify_repo_checksums`: need the network when all files are cached; the
  first returns no checksums.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextvars import ContextVar, copy_context
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from e4t_cli.errors import IntegrityError, ResourceError, WeightsUnavailable, printable
from e4t_cli.files import free_bytes, shown_size, write_atomically
from e4t_cli.hub.errors import as_e4t_error, is_broken_connection, is_refused_token, is_transient, retry_after
from e4t_cli.hub.paths import (
    COMMIT,
    REPOSITORY,
    HubAccess,
    endpoint,
    hub_cache,
    repository_folder,
    repository_of,
    snapshot_folder,
    user_cache,
)
from e4t_cli.progress import Progress, ProgressCallback

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

_R = TypeVar("_R")

WORKERS = 4
TRIES = 3
TIMEOUT = 15.0  # seconds
MAX_WAIT = 30.0  # seconds: how long to wait before a retry is the user's decision above this
SPARE_BYTES = 100_000_000  # left free: a full disk breaks more than this program
_NEVER = ("*.py", "*.sh", "*.exe", "*.so", "*.dll")  # code of a repository is never fetched
_BLOCK = 1 << 22
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


# ── what a repository contains ──


@dataclass(frozen=True, kw_only=True)
class RepoFile:
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
    """Return what is in a repository, remembered or requested from the hub.

    Args:
        revision: a commit, a branch or a tag; None is the branch "main".

    Returns:
        None if it is not remembered and the network must not be used.

    Raises:
        WeightsUnavailable: there is no such revision, or the hub does not answer.
    """
    check_repository(repository)
    known = cached_repo_info(repository, revision)
    if known is not None or access.cut_off:
        return known
    info = _request_repo_info(repository, revision or "main", access)
    folder = _info_folder(repository)
    with contextlib.suppress(OSError):  # a cache that is read-only costs a request the next time
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{info.commit}.json", json.dumps(asdict(info), indent=1).encode())
        if not COMMIT.fullmatch(revision or "main"):
            name = f"ref-{quote(revision or 'main', safe='')}"
            write_atomically(folder / name, info.commit.encode())
    return info


def cached_repo_info(repository: str, revision: str | None) -> RepoInfo | None:
    """Return what is remembered about a repository; no network."""
    commit = cached_commit(repository, revision)
    if commit is None:
        return None
    try:
        path = _info_folder(repository) / f"{commit}.json"
        table = json.loads(path.read_text(encoding="utf-8"))
        files = tuple(RepoFile(**file) for file in table.pop("files"))
        return RepoInfo(**table, files=files)
    except (OSError, ValueError, TypeError, KeyError):
        return None  # absent or damaged: it will be requested again


def cached_commit(repository: str, revision: str | None) -> str | None:
    """Return the commit that a branch or tag was resolved to, by e4t or by another program."""
    name = revision or "main"
    if COMMIT.fullmatch(name):
        return name
    for path in (
        _info_folder(repository) / f"ref-{quote(name, safe='')}",
        repository_folder(repository) / "refs" / name,
    ):
        with contextlib.suppress(OSError, ValueError):
            found = path.read_text(encoding="utf-8").strip()
            if COMMIT.fullmatch(found):
                return found
    return None


def cached_repo_infos() -> list[RepoInfo]:
    """Return everything that is remembered about repositories."""
    found = [
        cached_repo_info(path.parent.name.replace("--", "/", 1), path.stem)
        for path in sorted((user_cache() / "hub").glob("*/*.json"))
    ]
    return [info for info in found if info is not None]


def forget_repository(repository: str) -> None:
    """Forget everything about a repository: its branches will be resolved again."""
    for path in _info_folder(repository).glob("*"):
        path.unlink(missing_ok=True)


def check_repository(repository: str) -> None:
    """Refuse what cannot be the name of a repository, before it becomes part of a path.

    Raises:
        WeightsUnavailable: it cannot.
    """
    if not REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository:
        raise WeightsUnavailable(f"{printable(repository)!r} cannot be a repository of the hub", hint="owner/name")


def has_token() -> bool:
    """Whether huggingface_hub has a token of the user."""
    from huggingface_hub import get_token

    return get_token() is not None


def _call_hub(call: Callable[[bool | None], _R], access: HubAccess) -> _R:
    """Call with the user's token and, where the hub does not know it, without one.

    Every request of this module passes here; offline, none does.
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
        # huggingface_hub 2.4.0 retries transfers of files, not this call.
        return HfApi(endpoint=endpoint()).model_info(
            repository, revision=revision, files_metadata=True, token=token, timeout=TIMEOUT
        )

    for attempt in range(1, TRIES + 1):
        try:
            found = _call_hub(call, access)
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
    files = [
        RepoFile(
            path=one.rfilename,
            size=int(one.size or 0),
            digest=str(one.lfs.sha256 if one.lfs is not None else one.blob_id or ""),
        )
        for one in found.siblings or ()
    ]
    return RepoInfo(repository=repository, commit=found.sha, licence=str(licence), files=tuple(files))


def _info_folder(repository: str) -> Path:
    return user_cache() / "hub" / repository.replace("/", "--")


# ── checksums ──


def checksum_mismatch(path: Path, declared: str = "", on_bytes: Callable[[int], None] | None = None) -> str | None:
    """Compare a file with its declared checksum, unless that was done and it has not changed.

    Args:
        path: in a snapshot folder of the hub's cache.
        declared: SHA-256, or git's SHA-1; "" takes the name of the blob.
        on_bytes: called with the number of bytes of each block read, and of a file not read again.

    Returns:
        None if it is as declared or nothing was declared, otherwise the checksum it has.
    """
    expected = declared or checksum_in_name(path)
    if not expected:
        return None
    about = path.stat()
    record = {"path": str(path), "size": about.st_size, "mtime_ns": about.st_mtime_ns}
    record["digest"] = expected
    verified = _verified_record(path)
    with contextlib.suppress(OSError, ValueError):
        if json.loads(verified.read_text(encoding="utf-8")) == record:
            if on_bytes is not None:
                on_bytes(about.st_size)
            return None
    found = checksum(path, expected, on_bytes)
    if found != expected:
        return found
    with contextlib.suppress(OSError):  # read-only: the file is read again the next time
        verified.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(verified, json.dumps(record).encode())
    return None


def checksum_in_name(path: Path) -> str:
    """Return the checksum in the name of the blob that a snapshot's link points to, or ""."""
    with contextlib.suppress(OSError):
        name = os.path.basename(os.readlink(path))
        if _DIGEST.fullmatch(name):
            return name
    return ""


def checksum(path: Path, like: str, on_bytes: Callable[[int], None] | None = None) -> str:
    """Return the checksum of a file, of the same kind as another one.

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


def delete_file(path: Path) -> None:
    """Delete a file of a snapshot and the blob behind it."""
    blob = path.parent / os.readlink(path) if path.is_symlink() else None
    path.unlink(missing_ok=True)
    if blob is not None:
        blob.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        _verified_record(path).unlink(missing_ok=True)


def forget_deleted() -> None:
    """Forget the verification of files that no longer exist."""
    for record in (user_cache() / "verified").glob("*.json"):
        path = ""
        with contextlib.suppress(OSError, ValueError):
            path = json.loads(record.read_text(encoding="utf-8")).get("path", "")
        if not path or not os.path.exists(path):
            record.unlink(missing_ok=True)


def _verified_record(path: Path) -> Path:
    name = hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return user_cache() / "verified" / f"{name}.json"


# ── progress ──

_MIN_SECONDS = 0.1  # between two events
_MIN_BYTES = 200_000  # less than this is not reported


class ProgressMeter:
    """Counts the bytes of all files of one call, from any thread.

    Args:
        total: bytes expected.
        on_progress: the caller's, or None.
        stage: "fetch", or "verify" for files that are only read.
    """

    def __init__(self, total: int, on_progress: ProgressCallback | None, stage: str = "fetch") -> None:
        self.total, self.stage = total, stage
        self._on_progress = on_progress
        self._done = 0
        self._started = self._last = time.monotonic()
        self._lock = threading.Lock()
        self._stopped = self._reported = False

    def stop(self) -> None:
        """Make every thread that counts here raise at its next block."""
        self._stopped = True

    def add(self, count: float) -> None:
        """Count bytes that arrived; negative for those that have to be fetched again.

        Raises:
            InterruptedError: `stop` was called.
        """
        if self._stopped:
            raise InterruptedError
        with self._lock:
            self._done = max(0, self._done + int(count))
            now = time.monotonic()
            if now - self._last >= _MIN_SECONDS:
                self._last = now
                self._report(now)

    def finish(self, *, if_reported: bool = False) -> None:
        """Report that everything is done; with `if_reported` only after an earlier report."""
        with self._lock:
            if self._reported or not if_reported:
                self._done = self.total
                self._report(time.monotonic())

    def _report(self, now: float) -> None:
        self._reported = True
        if self._on_progress is None or self.total < _MIN_BYTES:
            return
        rate = self._done / 1e6 / max(now - self._started, 1e-3)
        self._on_progress(
            Progress(
                stage=self.stage,
                done=min(self._done, self.total),
                total=self.total,
                unit="bytes",
                values={"MB/s": rate} if self._done else {},
            )
        )

    def bar_class(self) -> type[Any]:
        """Return a `tqdm_class` for huggingface_hub that shows nothing and counts here.

        Its attribute `counted` is what its bars have counted.
        """
        meter = self

        class Bar:
            counted = 0

            def __init__(self, *args: object, **kwargs: object) -> None:
                pass

            def __enter__(self) -> Bar:
                return self

            def update(self, n: float | None = 1) -> None:
                Bar.counted += int(n or 0)
                meter.add(n or 0)

            def ignore(self, *args: object, **kwargs: object) -> None:
                pass

            __exit__ = close = refresh = set_postfix_str = ignore
            # Xet reports bytes received and bytes written; a class with these two methods gets both in one bar, and
            # the bytes written are what counts.
            update_transfer = set_transfer_postfix_str = ignore

        return Bar


_RETRY_HANDLER: ContextVar[_RetryHandler | None] = ContextVar("retry_handler", default=None)


class _RetryHandler(logging.Handler):
    """Reports the retries of one run as one remark.

    huggingface_hub logs a warning with the address for each of them, on a logger that all threads share. Only records
    logged in this handler's context are of its run.
    """

    def __init__(self, access: HubAccess) -> None:
        super().__init__(logging.WARNING)
        self._access = access
        self._reported = False

    def is_of_another_run(self, record: logging.LogRecord) -> bool:
        return _RETRY_HANDLER.get() is not self

    def emit(self, record: logging.LogRecord) -> None:
        if self._reported or self.is_of_another_run(record):
            return
        if any(word in record.msg for word in ("etrying", "resume", "Waiting")):
            self._reported = True
            self._access.remark("the hub is slow to answer, or the line is bad: trying again")


@contextlib.contextmanager
def _report_retries(access: HubAccess) -> Iterator[None]:
    """Report huggingface_hub's retries in this context, instead of logging them as warnings."""
    logger, handler = logging.getLogger("huggingface_hub"), _RetryHandler(access)
    others = logger.handlers[:]
    token = _RETRY_HANDLER.set(handler)
    for other in others:
        other.addFilter(handler.is_of_another_run)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        for other in others:
            other.removeFilter(handler.is_of_another_run)
        _RETRY_HANDLER.reset(token)


# ── download ──


def fetch_files(
    repository: str,
    revision: str | None,
    patterns: Sequence[str],
    access: HubAccess | None = None,
    *,
    repair: bool = False,
    command: str = "",
) -> Path:
    """Return a folder with files of a model repository, cached or downloaded, and verified.

    Args:
        repository: "owner/name".
        revision: a commit of 40 hexadecimal digits; or a branch or tag, resolved once and then remembered; None is the
            branch "main".
        patterns: names as in a shell: "unet/config.json", "*.safetensors" (also in sub-folders).
        access: whether the network may be used, and who gets progress events, in bytes.
        repair: fetch cached files that are damaged again, rather than refuse them.
        command: fetches or repairs the same files; for the hints of errors.

    Returns:
        The snapshot's folder, named after the commit, with at least the wanted files.

    Raises:
        WeightsUnavailable: not cached, and the network, the hub or the user's rights forbid it.
        IntegrityError: a file is not what the hub declares.
        ResourceError: the disk has no room.
    """
    access = access or HubAccess()
    command = command or f"e4t fetch {repository}" + (f"@{revision}" if revision else "")
    check_repository(repository)
    commit = cached_commit(repository, revision)
    folder = snapshot_folder(repository, commit or "")
    if commit is not None and all((folder / name).is_file() for name in patterns):
        info = cached_repo_info(repository, commit)  # named in full and cached: no request
    else:
        info = get_repo_info(repository, revision, access)
    if info is not None:
        folder = snapshot_folder(repository, info.commit)
    elif commit is None or not folder.is_dir():
        raise WeightsUnavailable(
            f"{repository} is not on this machine and e4t is offline", hint=f"with a network: {command}"
        )
    wanted = _matching_files(info, folder, patterns)
    missing = [file for file in wanted if not (folder / file.path).is_file()]
    if missing and access.cut_off:
        names = ", ".join(printable(file.path) for file in missing[:4])
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise WeightsUnavailable(
            f"{repository} is not complete on this machine and e4t is offline: {names}{more}",
            hint=f"with a network: {command}",
        )
    if missing:
        needed = total_size(missing)
        if any(file.path.endswith(".safetensors") for file in missing):  # not of config files
            count = f"{len(missing)} files" if len(missing) > 1 else printable(missing[0].path)
            cache, free = printable(str(hub_cache())), shown_size(free_bytes(hub_cache()))
            access.remark(f"fetching {count} of {repository}, {shown_size(needed)}, to {cache}; {free} are free there")
        check_room(repository, needed)
        _download(repository, folder.name, missing, access)
    _verify(wanted, missing, folder, access, repair=repair, command=command)
    return folder


def _verify(
    wanted: Sequence[RepoFile],
    fetched: Sequence[RepoFile],
    folder: Path,
    access: HubAccess,
    *,
    repair: bool,
    command: str,
) -> None:
    """Compare files with their checksums, and fetch a wrong one once more.

    Raises:
        IntegrityError: a file is wrong that was cached before, or wrong twice in a row.
    """
    repository = repository_of(folder.parent.parent)
    meter = ProgressMeter(total_size(wanted), access.on_progress, "verify")
    for file in wanted:
        path, name = folder / file.path, printable(file.path)
        expected = file.digest or checksum_in_name(path)
        damaged = f"{repository}/{name} is damaged: expected checksum {expected}, got "
        found = checksum_mismatch(path, expected, meter.add)
        if found is None:
            continue
        if file not in fetched and not repair:
            raise IntegrityError(damaged + found, hint=f"fetch it again: {command}")
        if access.cut_off:
            raise IntegrityError(damaged + found, hint=f"with a network: {command}")
        access.note(f"{name} of {repository} is damaged: fetching it again")
        delete_file(path)
        _download(repository, folder.name, [file], access, force=True)
        found = checksum_mismatch(path, expected)
        if found is not None:
            delete_file(path)  # no program may find it later
            hint = "something between the hub and here is at fault"
            raise IntegrityError(damaged + found, hint=hint)
    meter.finish(if_reported=True)


def total_size(files: Sequence[RepoFile]) -> int:
    """Return the bytes of files together."""
    return sum(file.size for file in files)


def _download(
    repository: str, commit: str, files: Sequence[RepoFile], access: HubAccess, *, force: bool = False
) -> None:
    """Download files into the hub's cache, several at a time.

    Raises:
        E4TError: the first error; files that are complete stay.
    """
    os.environ.setdefault("HF_HUB_DISABLE_SYMLINKS_WARNING", "1")
    from huggingface_hub import hf_hub_download

    meter = ProgressMeter(total_size(files), access.on_progress)

    def fetch(name: str) -> None:
        for attempt in range(1, TRIES + 1):
            bar = meter.bar_class()

            def call(token: bool | None, bar: type[Any] = bar) -> str:
                return hf_hub_download(
                    repository,
                    name,
                    revision=commit,
                    cache_dir=hub_cache(),
                    endpoint=endpoint(),
                    token=token,
                    tqdm_class=bar,
                    force_download=force,
                )

            try:
                _call_hub(call, access)
                return
            except InterruptedError:
                raise
            except Exception as error:
                if attempt == TRIES or not is_broken_connection(error):
                    raise as_e4t_error(error, repository, commit, name) from error
            meter.add(-bar.counted)
            access.remark("the connection broke: trying again")
            time.sleep(attempt)

    with _report_retries(access), ThreadPoolExecutor(WORKERS) as pool:
        jobs = [pool.submit(copy_context().run, fetch, file.path) for file in files]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            # Neither an interrupt nor an error waits for the other files.
            meter.stop()
            _stop_xet()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    meter.finish()


def _stop_xet() -> None:
    """Stop transfers by Xet, which run outside of Python.

    Those of other runs in this process break as well; such runs connect again.
    """
    with contextlib.suppress(ImportError, AttributeError, RuntimeError):
        from huggingface_hub.utils import _xet

        abort: Callable[[], None] = _xet.abort_xet_session
        abort()


def check_room(repository: str, needed: int, other: str = "", needed_by_other: int = 0) -> None:
    """Refuse a download that the disk of the hub's cache has no room for.

    Args:
        needed: bytes of the repository.
        other, needed_by_other: a repository that will be fetched afterwards, and its bytes.

    Raises:
        ResourceError: the disk is too small.
    """
    free = free_bytes(hub_cache())
    if needed + needed_by_other + SPARE_BYTES > free:
        more = f" and {shown_size(needed_by_other)} for {other}," if needed_by_other else ""
        raise ResourceError(
            f"{repository} needs {shown_size(needed)}{more} and {shown_size(free)} are free "
            f"on the disk of {printable(str(hub_cache()))}",
            hint="make room (e4t cache ls), or set HF_HOME to a larger disk",
        )


def _matching_files(info: RepoInfo | None, folder: Path, patterns: Sequence[str]) -> list[RepoFile]:
    """Return the files that match a pattern and are no code, of the repository or of a folder.

    A pattern that nothing in the folder matches is in the list, as a file that is missing.

    Raises:
        WeightsUnavailable: nothing in the repository matches a pattern.
    """
    if info is not None:
        files = list(info.files)
    else:
        files = [
            RepoFile(path=path.relative_to(folder).as_posix(), size=path.stat().st_size, digest="")
            for path in folder.rglob("*")
            if path.is_file()
        ]
    for pattern in patterns:
        if not any(fnmatchcase(file.path, pattern) for file in files):
            if info is not None:
                raise WeightsUnavailable(f"{info.repository} has no file {printable(pattern)!r} at {info.commit[:12]}")
            files.append(RepoFile(path=pattern, size=0, digest=""))
    return [
        file
        for file in files
        if any(fnmatchcase(file.path, one) for one in patterns)
        and not any(fnmatchcase(file.path, one) for one in _NEVER)
    ]
