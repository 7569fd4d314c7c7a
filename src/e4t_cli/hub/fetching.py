"""Bringing files of the hub here: what is missing, how much that is, and whether it arrived whole.

What is there is used. What is missing is announced with its size, fetched into the hub's own cache
by huggingface_hub, and compared with the checksum that the hub declares; a file that arrived wrong
is deleted and fetched once more, and then given up.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from e4t_cli.errors import WeightsUnavailable, printable
from e4t_cli.progress import ProgressCallback

from .access import Access
from .downloading import check_content, check_room, download, total_size
from .inventory import (
    HubFile,
    Inventory,
    check_repository,
    known_commit,
    take_inventory,
)
from .places import snapshot_folder

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
    access = Access(offline=offline, on_progress=on_progress)
    advice = advice or f"e4t fetch {repository}" + (f"@{revision}" if revision else "")
    inventory = None
    if not _all_here(repository, revision, patterns):
        inventory = take_inventory(repository, revision, access)
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
