"""From the hub to the disk: room first, then several files at a time, then their checksums.

huggingface_hub brings the files; it compares lengths only. What arrived wrong is deleted and
fetched once more, and then given up, so that nothing wrong stays for anybody.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from e4t_cli.errors import E4TError, IntegrityError, ResourceError, printable

from .access import Access
from .integrity import discard, is_intact
from .inventory import TRIES, HubFile, with_token
from .listening import Meter, retries_told
from .places import endpoint, free_bytes, hub_cache, shown_size
from .trouble import explain, is_broken_line

WORKERS = 4
SPARE_BYTES = 100_000_000  # left free on the disk: a full one breaks more than this program


def check_room(missing: Sequence[HubFile], repository: str, access: Access) -> None:
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
    access: Access,
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

    meter = Meter(total, access.on_progress)
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
                    raise explain(error, repository, commit, name) from error
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
    access: Access,
    *,
    repair: bool,
    advice: str,
) -> None:
    """Compare files with what the hub declares, and fetch a wrong one once more.

    Raises:
        IntegrityError: a file is wrong that was here before, or twice in a row.
    """
    meter = Meter(total_size(wanted), access.on_progress, "verify")
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
