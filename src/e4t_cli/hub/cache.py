"""Lists, verifies, prunes and removes cached files.

The hub's cache is shared by all programs: only repositories that e4t fetched, or has a name for, are touched.
Everything in e4t's own cache can be made again. What killed commands left, there and elsewhere, is listed too.

Not `huggingface_hub.scan_cache_dir` (2.4.0): one dead link hides its repository, which then could not be removed; it
reads all repositories (0.3 s for 300 of other programs), and its deletions log errors instead of raising them. Not
`HfApi.verify_repo_checksums`: it needs the network.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from e4t_cli.errors import UsageError, WeightsUnavailable, printable
from e4t_cli.hub import repo_info
from e4t_cli.hub.bases import PROGRAM, PUBLISHED, hub_location, list_converted_weights
from e4t_cli.hub.download import ProgressMeter
from e4t_cli.hub.image_tower import VIT_H_14, has_tower, tower_folder
from e4t_cli.hub.paths import matches, repository_folder, repository_of, snapshot_folder, user_cache, user_data
from e4t_cli.hub.single_file import list_converted_files
from e4t_cli.hub.tuned_files import tuned_files, tuned_folder
from e4t_cli.progress import ProgressCallback
from e4t_cli.temporary import final_path, leftovers
from e4t_cli.temporary import remove as discard

GIVEN_UP_SECONDS = 30 * 24 * 3600  # since a pre-training that was interrupted wrote anything
TUNED = "tuned concepts"


@dataclass(frozen=True, kw_only=True)
class CacheItem:
    """Something in a cache: a file or a folder, named as on the command line.

    Args:
        kind: "repository", "image tower", "converted weights", "converted base" (of a single file), "encoded images",
            "tuned concepts", "checkpoints" (of a pre-training that has not ended), "leftover" (of a killed command),
            "partial download", "published tower", "published checkpoint".
        size: in bytes, on the disk.
        revision: the commit, of a repository or of converted weights.
        count: of tuned concepts.
    """

    name: str
    kind: str
    path: Path
    size: int
    revision: str = ""
    count: int = 1

    def as_dict(self) -> dict[str, object]:
        """Return it for ``--json``."""
        values = {**asdict(self), "path": str(self.path)}
        return values if self.kind == TUNED else {key: value for key, value in values.items() if key != "count"}


@dataclass(frozen=True, kw_only=True)
class ChecksumMismatch:
    """A file that is not what it was fetched as."""

    repository: str
    file: str
    expected: str
    got: str


def _item(name: str, kind: str, path: Path, revision: str = "") -> CacheItem:
    files = path.rglob("*") if os.path.isdir(path) else (path,)
    size = sum(file.stat().st_size for file in files if os.path.isfile(file))
    return CacheItem(name=name, kind=kind, path=path, size=size, revision=revision)


def list_cache() -> list[CacheItem]:
    """Return what e4t has in the hub's cache and in its own."""
    names = {(row.repository, row.revision): row.name for row in PUBLISHED.values()}
    found = [
        _item(names.get((repository, commit), repository), "repository", snapshot_folder(repository, commit), commit)
        for repository, commit in _snapshots()
    ]
    if has_tower():
        found.append(_item(VIT_H_14.name, "image tower", tower_folder()))
    for weights in list_converted_weights():
        found.append(_item(f"{PROGRAM}:{weights.repository}", "converted weights", weights.folder, weights.commit))
    found += [_item(one.name, "converted base", one.folder) for one in list_converted_files()]
    folders = matches(user_cache() / "pretraining", "*/")
    found += [_item(f"pretraining/{folder.name}", "encoded images", folder) for folder in folders]
    if tuned := tuned_files():
        size = sum(path.stat().st_size for path in tuned if os.path.isfile(path))
        found.append(CacheItem(name="tuned", kind=TUNED, path=tuned_folder(), size=size, count=len(tuned)))
    return found + _checkpoints() + _leftovers()


def _leftovers() -> list[CacheItem]:
    """Return what killed commands left in e4t's folders, in the current one, and in the images' folder there."""
    own = [
        folder
        for top in (user_cache(), user_data())
        for folder in (top, *matches(top, "**/*"))
        if os.path.isdir(folder)
    ]
    found = [path for folder in (Path(), Path("outputs"), *own) for path in leftovers(folder)]
    outermost = [path for path in found if not any(other in path.parents for other in found)]
    return [_item(f"{final_path(path).name}~", "leftover", path) for path in dict.fromkeys(outermost)]


def _checkpoints() -> list[CacheItem]:
    """Return the states of pre-trainings that run, or were interrupted, among the user domains and in this folder."""
    found = [path for folder in (user_data() / "domains", Path()) for path in matches(folder, ".*.checkpoints")]
    return [_item(f"checkpoints/{path.name[1:-12]}", "checkpoints", path) for path in found if os.path.isdir(path)]


def _is_given_up(folder: Path) -> bool:
    times = [path.stat().st_mtime for path in (folder, *folder.rglob("*")) if os.path.exists(path)]
    return time.time() - max(times, default=0) > GIVEN_UP_SECONDS


def verify(on_progress: ProgressCallback | None = None) -> tuple[int, list[ChecksumMismatch]]:
    """Read every fetched file again; returns how many were compared with a checksum, and those that differ."""
    declared = {(info.repository, info.commit): info.digests for info in repo_info.cached_repo_infos()}
    files = []
    for repository, commit in _snapshots():
        folder = snapshot_folder(repository, commit)
        for path in sorted(path for path in folder.rglob("*") if os.path.isfile(path)):
            name = path.relative_to(folder).as_posix()
            if expected := declared.get((repository, commit), {}).get(name) or repo_info.checksum_in_name(path):
                files.append((repository, name, path, expected))
    meter = ProgressMeter(sum(path.stat().st_size for _, _, path, _ in files), on_progress, "verify")
    damaged = []
    for repository, name, path, expected in files:
        got = repo_info.checksum(path, expected, meter.add)
        if got != expected:
            damaged.append(ChecksumMismatch(repository=repository, file=name, expected=expected, got=got))
    meter.finish(if_reported=True)
    return len(files), damaged


def _repositories() -> list[tuple[str, str]]:
    """Return repositories and commits that e4t fetched or has a name for."""
    known = [(row.repository, row.revision) for row in PUBLISHED.values()]
    fetched = [(info.repository, info.commit) for info in repo_info.cached_repo_infos()]
    return list(dict.fromkeys([*known, (VIT_H_14.repository, VIT_H_14.revision), *fetched]))


def _snapshots() -> list[tuple[str, str]]:
    return [one for one in _repositories() if os.path.isdir(snapshot_folder(*one))]


def prunable() -> list[CacheItem]:
    """Return what can go: partial downloads, sources of converted files, leftovers, and pre-trainings given up.

    Of tuned concepts those that nobody used for 30 days, of converted bases also those that an older e4t made.
    """
    partial: list[tuple[str, Path]] = []
    for repository in dict.fromkeys(repository for repository, _ in _repositories()):
        partial += [(repository, path) for path in matches(repository_folder(repository), "blobs/*.incomplete")]
    found = [*_leftovers(), *(item for item in _checkpoints() if _is_given_up(item.path))]
    for name, path in partial:
        with contextlib.suppress(OSError):  # it is complete, and renamed, by now
            # A younger file may belong to a running process.
            if time.time() - path.stat().st_mtime > 3600:
                found.append(_item(name, "partial download", path))
    published = snapshot_folder(VIT_H_14.repository, VIT_H_14.revision) / VIT_H_14.file
    if has_tower() and os.path.isfile(published):
        found.append(_item(VIT_H_14.repository, "published tower", published))
    for weights in list_converted_weights():
        found += [_item(weights.repository, "published checkpoint", path) for path in weights.source_files]
    for one in list_converted_files():
        unused = one.source_exists and time.time() - one.last_used > GIVEN_UP_SECONDS
        if one.is_superseded or unused:
            found.append(_item(one.name, "converted base", one.folder))
    for path in tuned_files():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > GIVEN_UP_SECONDS:
                found.append(_item("tuned", TUNED, path))
    return found


def prune(chosen: list[CacheItem] | None = None) -> list[CacheItem]:
    """Remove what can go without a loss, or the chosen part of it; returns what was removed."""
    removed = []
    for item in prunable() if chosen is None else chosen:
        with contextlib.suppress(OSError):
            if item.kind == "leftover":
                discard(item.path)
            elif os.path.isdir(item.path):
                shutil.rmtree(item.path)
            else:
                repo_info.delete_file(item.path)
            removed.append(item)
    repo_info.forget_deleted()
    return removed


def find_items(name: str) -> list[CacheItem]:
    """Return the items that a name on the command line means; UsageError if nothing of that name is cached."""
    repository = location.repository if (location := hub_location(name)) is not None else name
    folder = repository_folder(repository)
    found = [item for item in list_cache() if item.name in (name, repository) or folder in item.path.parents]
    if not found:
        raise UsageError(f"there is nothing called {printable(name)!r} in the caches", hint="e4t cache ls")
    return found


def remove(item: CacheItem) -> None:
    """Delete a repository from the hub's cache, or something from e4t's own; WeightsUnavailable without the right."""
    path, blobs = item.path, set[Path]()
    folder = path.parent.parent  # of the repository, whose other commits stay
    if item.kind == "repository":
        repo_info.forget_repository(repository_of(folder))
        if len(list(folder.glob("snapshots/*"))) == 1:
            path = folder
        else:
            blobs = _blobs(path)
    try:
        if item.kind == "leftover":
            discard(path)
        else:
            shutil.rmtree(path)
        for blob in blobs - _blobs(folder / "snapshots"):
            blob.unlink(missing_ok=True)
    except OSError as error:
        raise WeightsUnavailable(f"{printable(str(path))} cannot be removed: {error.strerror}") from error
    repo_info.forget_deleted()


def _blobs(folder: Path) -> set[Path]:
    return {Path(os.path.realpath(link)) for link in folder.rglob("*") if os.path.islink(link)}
