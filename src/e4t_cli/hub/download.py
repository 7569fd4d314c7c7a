"""How far a fetch is: huggingface_hub's progress bars and warnings as events of ours.

From the hub to the disk: room first, then several files at a time, then their checksums.

huggingface_hub brings the files; it compares lengths only. What arrived wrong is deleted and
fetched once more, and then given up, so that nothing wrong stays for anybody.

Bringing files of the hub here: what is missing, how much that is, and whether it arrived whole.

What is there is used. What is missing is announced with its size, fetched into the hub's own cache
by huggingface_hub, and compared with the checksum that the hub declares; a file that arrived wrong
is deleted and fetched once more, and then given up.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from e4t_cli.errors import E4TError, IntegrityError, ResourceError, WeightsUnavailable, printable
from e4t_cli.files import free_bytes, shown_size
from e4t_cli.hub.errors import as_e4t_error, is_broken_line
from e4t_cli.hub.inventory import (
    TRIES,
    HubFile,
    Inventory,
    check_repository,
    discard,
    fetch_inventory,
    is_intact,
    known_commit,
    with_token,
)
from e4t_cli.hub.paths import HubAccess, endpoint, hub_cache, snapshot_folder
from e4t_cli.progress import Progress, ProgressCallback

_MIN_SECONDS = 0.1  # between two events: a terminal shows no more
_MIN_BYTES = 200_000  # of a fetch that is worth telling


class ProgressMeter:
    """Counts the bytes of all files of one fetch, from whatever thread they come.

    Args:
        total: bytes expected.
        on_progress: the caller's, or None.
        stage: "fetch", or "verify" for files that are only read.
    """

    def __init__(
        self, total: int, on_progress: ProgressCallback | None, stage: str = "fetch"
    ) -> None:
        self.total, self.stage = total, stage
        self._listener = on_progress
        self._done = 0
        self._begun = self._told = time.monotonic()
        self._lock = threading.Lock()
        self._stopped = self._heard = False
        self._of_this_thread = threading.local()

    def begin(self) -> None:
        """Begin a file in this thread."""
        self._of_this_thread.count = 0

    def take_back(self) -> None:
        """Take back what was counted of this thread's file: it will come once more."""
        self.add(-getattr(self._of_this_thread, "count", 0))

    def stop(self) -> None:
        """Make every thread that still counts here give up at its next block."""
        self._stopped = True

    def add(self, count: float) -> None:
        """Count bytes that arrived; negative for those that have to come again.

        Raises:
            InterruptedError: the fetch was stopped.
        """
        if self._stopped:
            raise InterruptedError
        self._of_this_thread.count = getattr(self._of_this_thread, "count", 0) + int(count)
        with self._lock:
            self._done = max(0, self._done + int(count))
            now = time.monotonic()
            if now - self._told >= _MIN_SECONDS:
                self._told = now
                self._tell(now)

    def finish(self) -> None:
        """Say that everything is there."""
        with self._lock:
            self._done = self.total
            self._tell(time.monotonic())

    def settle(self) -> None:
        """Finish, if there was so much that anybody heard of it."""
        if self._heard:
            self.finish()

    def _tell(self, now: float) -> None:
        self._heard = True
        if self._listener is None or self.total < _MIN_BYTES:
            return
        rate = self._done / 1e6 / max(now - self._begun, 1e-3)
        done = min(self._done, self.total)
        self._listener(
            Progress(
                stage=self.stage,
                done=done,
                total=self.total,
                unit="bytes",
                values={"MB/s": rate} if self._done else {},
            )
        )

    def bar_class(self) -> type[Any]:
        """Return what huggingface_hub takes as `tqdm_class`: it draws nothing and counts here."""
        from tqdm.auto import tqdm

        meter = self

        class Bar(tqdm):
            def __init__(self, *arguments: Any, **options: Any) -> None:
                options.pop("name", None)
                options["disable"] = True
                super().__init__(*arguments, **options)

            def update(self, n: float | None = 1) -> None:
                meter.add(n or 0)

            # The hub's newer way of sending (Xet) reports what came over the line and what is on
            # the disk; who has these two methods gets both in one bar, and the disk is what counts.
            def update_transfer(self, n: float | None = 1) -> None:
                pass

            def set_transfer_postfix_str(self, *arguments: Any, **options: Any) -> None:
                pass

        return Bar


@contextlib.contextmanager
def retries_told(on_progress: ProgressCallback | None) -> Iterator[None]:
    """Turn huggingface_hub's warnings into one calm remark while a fetch runs.

    They name addresses, and there are many of them; what matters is that silence has a reason.
    """
    logger = logging.getLogger("huggingface_hub")
    handler = _RetryLogHandler(on_progress)
    before = logger.handlers[:]
    logger.handlers[:] = [handler]
    try:
        yield
    finally:
        logger.handlers[:] = before


class _RetryLogHandler(logging.Handler):
    def __init__(self, on_progress: ProgressCallback | None) -> None:
        super().__init__(logging.WARNING)
        self._listener = on_progress
        self._told = False

    def emit(self, record: logging.LogRecord) -> None:
        trying = "etrying" in record.msg or "resume" in record.msg or "Waiting" in record.msg
        if trying and not self._told and self._listener is not None:
            self._told = True
            remark = "the hub is slow to answer, or the line is bad: trying again"
            self._listener(Progress(stage="fetch", remark=remark))


WORKERS = 4
SPARE_BYTES = 100_000_000  # left free on the disk: a full one breaks more than this program


def check_room(missing: Sequence[HubFile], repository: str, access: HubAccess) -> None:
    """Say how much will be fetched, before anything is.

    Raises:
        ResourceError: there is less room on the disk than that.
    """
    needed, free = total_size(missing), free_bytes(hub_cache())
    count = f"{len(missing)} files" if len(missing) > 1 else printable(missing[0].path)
    if any(file.path.endswith(".safetensors") for file in missing):  # not of settings
        access.remark(
            f"fetching {count} of {repository}, {shown_size(needed)}, "
            f"to {printable(str(hub_cache()))}; {shown_size(free)} are free there"
        )
    if needed + SPARE_BYTES > free:
        raise ResourceError(
            f"{repository} needs {shown_size(needed)} and {shown_size(free)} are free "
            f"on the disk of {printable(str(hub_cache()))}",
            hint="make room (e4t cache ls), or set HF_HOME to a larger disk",
        )


def download(
    repository: str,
    commit: str,
    names: Sequence[str],
    access: HubAccess,
    total: int,
    *,
    force: bool = False,
) -> None:
    """Fetch files into the hub's cache, several at a time.

    Raises:
        E4TError: the first thing that went wrong; what was finished stays.
    """
    os.environ.setdefault("HF_HUB_DISABLE_SYMLINKS_WARNING", "1")
    from huggingface_hub import hf_hub_download

    meter = ProgressMeter(total, access.on_progress)
    bar = meter.bar_class()

    def fetch(name: str) -> None:
        def call(token: bool | None) -> str:
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

        for attempt in range(1, TRIES + 1):
            meter.begin()
            try:
                with_token(call, access)
                return
            except InterruptedError:
                raise
            except Exception as error:
                if attempt == TRIES or not is_broken_line(error):
                    raise as_e4t_error(error, repository, commit, name) from error
            meter.take_back()
            access.remark("the connection broke: trying again")
            time.sleep(attempt)

    with retries_told(access.on_progress), ThreadPoolExecutor(WORKERS) as pool:
        jobs = [pool.submit(fetch, name) for name in names]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            # An interrupt must not wait for gigabytes, nor an error for the other files.
            meter.stop()
            _stop_xet()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    meter.finish()


def _stop_xet() -> None:
    """Tell the hub's newer way of sending, which runs outside of Python, to give up as well."""
    with contextlib.suppress(ImportError, AttributeError, RuntimeError):
        from huggingface_hub.utils._xet import abort_xet_session

        abort_xet_session()


def check_content(
    folder: Path,
    repository: str,
    wanted: Sequence[HubFile],
    fresh: set[str],
    access: HubAccess,
    *,
    repair: bool,
    advice: str,
) -> None:
    """Compare files with what the hub declares, and fetch a wrong one once more.

    Raises:
        IntegrityError: a file is wrong that was here before, or twice in a row.
    """
    meter = ProgressMeter(total_size(wanted), access.on_progress, "verify")
    for file in wanted:
        path = folder / file.path
        found = is_intact(path, file.digest, meter.add)
        if found is None:
            continue
        if file.path not in fresh and not repair:
            raise wrong(repository, file, found, hint=f"fetch it again: {advice}")
        if access.cut_off:
            raise wrong(repository, file, found, hint=f"with a network: {advice}")
        access.note(f"{printable(file.path)} of {repository} is damaged: fetching it again")
        discard(path)
        download(repository, folder.name, [file.path], access, file.size, force=True)
        found = is_intact(path, file.digest)
        if found is not None:
            discard(path)  # what is wrong must not be found by anyone later
            raise wrong(
                repository, file, found, hint="something between the hub and here is at fault"
            )
    meter.settle()


def wrong(repository: str, file: HubFile, found: str, *, hint: str) -> E4TError:
    """Return the error for a file with another checksum than declared."""
    return IntegrityError(
        f"{repository}/{printable(file.path)} is damaged: "
        f"expected checksum {file.digest}, got {found}",
        hint=hint,
    )


def total_size(files: Sequence[HubFile]) -> int:
    """Return the bytes of files together."""
    return sum(file.size for file in files)


_NEVER = ("*.py", "*.sh", "*.exe", "*.so", "*.dll")  # code of a repository is never wanted


def fetch_files(
    repository: str,
    revision: str | None,
    patterns: Sequence[str],
    *,
    on_progress: ProgressCallback | None = None,
    offline: bool = False,
    repair: bool = False,
    advice: str = "",
) -> Path:
    """Bring files of a model repository here, or find them here, and check them.

    Args:
        repository: "owner/name".
        revision: a commit of 40 hexadecimal digits; or a branch or tag, resolved once and then
            remembered; None is the branch "main".
        patterns: names as in a shell: "unet/config.json", "*.safetensors" (also in sub-folders).
        on_progress: called with stage "fetch" and "verify", in bytes, and with remarks.
        offline: open no socket; E4T_OFFLINE and HF_HUB_OFFLINE say so too.
        repair: fetch again what was here and is damaged, rather than refuse it.
        advice: the command that fetches or repairs this, for the hints of errors.

    Returns:
        The snapshot's folder, named after the commit, with at least the wanted files.

    Raises:
        WeightsUnavailable: not here, and the network, the hub or the user's rights do not allow it.
        IntegrityError: a file is not what the hub declares.
        ResourceError: the disk has no room.
    """
    access = HubAccess(offline=offline, on_progress=on_progress)
    advice = advice or f"e4t fetch {repository}" + (f"@{revision}" if revision else "")
    inventory = None
    if not _all_here(repository, revision, patterns):
        inventory = fetch_inventory(repository, revision, access)
    if inventory is None:
        commit, wanted = _from_the_disk(repository, revision, patterns, advice)
    else:
        commit, wanted = inventory.commit, chosen(inventory, patterns)
    folder = snapshot_folder(repository, commit)
    missing = [file for file in wanted if not (folder / file.path).is_file()]
    if missing and access.cut_off:
        names = ", ".join(printable(file.path) for file in missing[:4])
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise WeightsUnavailable(
            f"{repository} is not complete on this machine and e4t is offline: {names}{more}",
            hint=f"with a network: {advice}",
        )
    if missing:
        check_room(missing, repository, access)
        download(repository, commit, [file.path for file in missing], access, total_size(missing))
    fresh = {file.path for file in missing}
    check_content(folder, repository, wanted, fresh, access, repair=repair, advice=advice)
    return folder


def chosen(inventory: Inventory, patterns: Sequence[str]) -> list[HubFile]:
    """Return the files of an inventory that match one of the patterns, and are no code.

    Raises:
        WeightsUnavailable: a pattern matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(file.path, pattern) for file in inventory.files):
            raise WeightsUnavailable(
                f"{inventory.repository} has no file {printable(pattern)!r} "
                f"at {inventory.commit[:12]}"
            )
    return [file for file in inventory.files if _matches(file.path, patterns)]


def _from_the_disk(
    repository: str, revision: str | None, patterns: Sequence[str], advice: str
) -> tuple[str, list[HubFile]]:
    """Return the commit and the files to use where the hub was not and is not asked.

    Files that have to be there and are not are in the list, with a length of 0.

    Raises:
        WeightsUnavailable: nothing of the repository is here.
    """
    check_repository(repository)
    commit = known_commit(repository, revision)
    folder = snapshot_folder(repository, commit) if commit else None
    if commit is None or folder is None or not folder.is_dir():
        raise WeightsUnavailable(
            f"{repository} is not on this machine and e4t is offline",
            hint=f"with a network: {advice}",
        )
    here = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }
    found = {
        name: HubFile(path=name, size=path.stat().st_size, digest="")
        for name, path in here.items()
        if _matches(name, patterns)
    }
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in found):
            found[pattern] = HubFile(path=pattern, size=0, digest="")
    return commit, list(found.values())


def _all_here(repository: str, revision: str | None, patterns: Sequence[str]) -> bool:
    """Whether every file is named in full and is here: then the hub has nothing to add."""
    check_repository(repository)
    commit = known_commit(repository, revision)
    if commit is None or any(set("*?[") & set(pattern) for pattern in patterns):
        return False
    folder = snapshot_folder(repository, commit)
    return all((folder / pattern).is_file() for pattern in patterns)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, one) for one in patterns) and not any(
        fnmatchcase(name, one) for one in _NEVER
    )
