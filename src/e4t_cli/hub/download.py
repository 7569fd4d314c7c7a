"""Downloads files of a repository into huggingface_hub's cache, with progress reporting, and verifies their checksums.

A file that arrived wrong is deleted, fetched once more, and deleted again if it is still wrong.

Measured with huggingface_hub 2.4.0 on the loopback (tests/hub/fake_hub.py), and why some functions are not used:
- `snapshot_download`: an interrupt waits for the files in transfer (Ctrl-C during four files of 24 MB at 4 MB/s each:
  4.1 s, here 0.6 s), and warnings come from threads that cannot be traced to the run that started them.
- `snapshot_download(dry_run=True)`, `HfApi.verify_repo_checksums`: need the network when all files are cached; the
  first returns no checksums.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextvars import ContextVar, copy_context
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from e4t_cli.errors import IntegrityError, ResourceError, WeightsUnavailable, printable
from e4t_cli.files import free_bytes, shown_size
from e4t_cli.hub.errors import as_e4t_error, is_broken_connection
from e4t_cli.hub.paths import HubAccess, endpoint, hub_cache, repository_of, snapshot_folder
from e4t_cli.hub.repo_info import (
    TRIES,
    RepoFile,
    RepoInfo,
    cached_commit,
    cached_repo_info,
    call_hub,
    check_repository,
    checksum_in_name,
    checksum_mismatch,
    delete_file,
    get_repo_info,
)
from e4t_cli.progress import Progress, ProgressCallback

WORKERS = 4
SPARE_BYTES = 100_000_000  # left free: a full disk breaks more than this program
_NEVER = ("*.py", "*.sh", "*.exe", "*.so", "*.dll")  # code of a repository is never fetched


class ProgressMeter:
    """Counts the bytes of all files of one call, `total` of them, from any thread, and reports the progress.

    The stage is "fetch", or "verify" for files that are only read.
    """

    def __init__(self, total: int, on_progress: ProgressCallback | None, stage: str = "fetch") -> None:
        self.total, self.stage, self._on_progress, self._done = total, stage, on_progress, 0
        self._started = self._last = time.monotonic()
        self._lock = threading.Lock()
        self._stopped = self._reported = False

    def stop(self) -> None:
        """Make every thread that counts here raise at its next block."""
        self._stopped = True

    def add(self, count: float) -> None:
        """Count bytes that arrived, negative for those to fetch again; InterruptedError once `stop` was called."""
        if self._stopped:
            raise InterruptedError
        with self._lock:
            self._done = max(0, self._done + int(count))
            now = time.monotonic()
            if now - self._last >= 0.1:  # seconds between two events
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
        if self._on_progress is None or self.total < 200_000:  # bytes; less is not reported
            return
        done = min(self._done, self.total)
        rate = {"MB/s": self._done / 1e6 / max(now - self._started, 1e-3)} if self._done else {}
        self._on_progress(Progress(stage=self.stage, done=done, total=self.total, unit="bytes", values=rate))

    def bar_class(self) -> type[Any]:
        """Return a `tqdm_class` for huggingface_hub that shows nothing; it counts here and in its `counted`."""
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
    """Reports the retries of one run, the records logged in this handler's context, as one remark.

    huggingface_hub logs a warning with the address for each of them, on a logger that all threads share.
    """

    def __init__(self, access: HubAccess) -> None:
        super().__init__(logging.WARNING)
        self._access, self._reported = access, False

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


def fetch_files(
    repository: str,
    revision: str | None,
    patterns: Sequence[str],
    access: HubAccess | None = None,
    *,
    repair: bool = False,
    command: str = "",
) -> Path:
    """Return a snapshot folder, named after the commit, with files of a model repository, downloaded and verified.

    Args:
        revision: a commit, or a branch or tag, resolved once and then remembered; None is the branch "main".
        patterns: names as in a shell: "unet/config.json", "*.safetensors" (also in sub-folders).
        access: whether the network may be used, and who gets progress events, in bytes.
        repair: fetch cached files that are damaged again, rather than refuse them.
        command: fetches or repairs the same files; for the hints of errors.

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
    if commit is not None and all(os.path.isfile(folder / name) for name in patterns):
        info = cached_repo_info(repository, commit)  # named in full and cached: no request
    else:
        info = get_repo_info(repository, revision, access)
    if info is not None:
        folder = snapshot_folder(repository, info.commit)
    elif commit is None or not os.path.isdir(folder):
        message = f"{repository} is not on this machine and e4t is offline"
        raise WeightsUnavailable(message, hint=f"with a network: {command}")
    wanted = _matching_files(info, folder, patterns)
    missing = [file for file in wanted if not os.path.isfile(folder / file.path)]
    if missing and access.cut_off:
        names = ", ".join(printable(file.path) for file in missing[:4])
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        message = f"{repository} is not complete on this machine and e4t is offline: {names}{more}"
        raise WeightsUnavailable(message, hint=f"with a network: {command}")
    if missing:
        needed = sum(file.size for file in missing)
        if any(file.path.endswith(".safetensors") for file in missing):  # not of config files
            count = f"{len(missing)} files" if len(missing) > 1 else printable(missing[0].path)
            cache, free = printable(str(hub_cache())), shown_size(free_bytes(hub_cache()))
            access.remark(f"fetching {count} of {repository}, {shown_size(needed)}, to {cache}; {free} are free there")
        check_room(repository, needed)
        _download(repository, folder.name, missing, access)
    _verify(wanted, missing, folder, access, repair=repair, command=command)
    return folder


def _verify(
    wanted: list[RepoFile], fetched: list[RepoFile], folder: Path, access: HubAccess, *, repair: bool, command: str
) -> None:
    """Compare files with their checksums, and fetch a wrong one once more if it is new or `repair` is set."""
    repository = repository_of(folder.parent.parent)
    meter = ProgressMeter(sum(file.size for file in wanted), access.on_progress, "verify")
    for file in wanted:
        path, name = folder / file.path, printable(file.path)
        expected = file.digest or checksum_in_name(path)
        damaged = f"{repository}/{name} is damaged: expected checksum {expected}, got "
        if (found := checksum_mismatch(path, expected, meter.add)) is None:
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
            raise IntegrityError(damaged + found, hint="something between the hub and here is at fault")
    meter.finish(if_reported=True)


def _download(repository: str, commit: str, files: list[RepoFile], access: HubAccess, *, force: bool = False) -> None:
    """Download files into the hub's cache, several at a time; after an error, files that are complete stay."""
    os.environ.setdefault("HF_HUB_DISABLE_SYMLINKS_WARNING", "1")
    from huggingface_hub import hf_hub_download

    meter = ProgressMeter(sum(file.size for file in files), access.on_progress)
    download = partial(hf_hub_download, repository, revision=commit, cache_dir=hub_cache(), endpoint=endpoint())

    def fetch(name: str) -> None:
        for attempt in range(1, TRIES + 1):
            bar = meter.bar_class()

            def call(token: bool | None, bar: type[Any] = bar) -> str:
                return download(name, token=token, tqdm_class=bar, force_download=force)

            try:
                call_hub(call, access)
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
    """Stop transfers by Xet, which run outside of Python; those of other runs in this process connect again."""
    with contextlib.suppress(ImportError, AttributeError, RuntimeError):
        from huggingface_hub.utils import _xet

        abort: Callable[[], None] = _xet.abort_xet_session
        abort()


def check_room(repository: str, needed: int, other: str = "", needed_by_other: int = 0) -> None:
    """Refuse a download that the disk of the hub's cache has no room for, with what is fetched after it; in bytes."""
    free = free_bytes(hub_cache())
    if needed + needed_by_other + SPARE_BYTES > free:
        more = f" and {shown_size(needed_by_other)} for {other}," if needed_by_other else ""
        room = f"{shown_size(free)} are free on the disk of {printable(str(hub_cache()))}"
        message = f"{repository} needs {shown_size(needed)}{more} and {room}"
        raise ResourceError(message, hint="make room (e4t cache ls), or set HF_HOME to a larger disk")


def _matching_files(info: RepoInfo | None, folder: Path, patterns: Sequence[str]) -> list[RepoFile]:
    """Return the files that match a pattern and are no code, of the repository or else of a folder.

    A pattern that matches nothing is an error of the repository, and in the list as a missing file of the folder.
    """
    if info is not None:
        files = list(info.files)
    else:
        paths = [path for path in folder.rglob("*") if os.path.isfile(path)]
        files = [RepoFile(path=path.relative_to(folder).as_posix(), size=path.stat().st_size) for path in paths]

    def matches(file: RepoFile, *patterns: str) -> bool:
        return any(fnmatchcase(file.path, pattern) for pattern in patterns)

    for pattern in patterns:
        if not any(matches(file, pattern) for file in files):
            if info is not None:
                raise WeightsUnavailable(f"{info.repository} has no file {printable(pattern)!r} at {info.commit[:12]}")
            files.append(RepoFile(path=pattern))
    return [file for file in files if matches(file, *patterns) and not matches(file, *_NEVER)]
