"""A base or a pack by whatever name it was asked for: found here, or fetched.

A name of the table in `bases`, "owner/name" or "owner/name@revision" of the hub, or a folder. What
is on this machine is used without a question to anybody; otherwise the licence is accepted, the
size said, and the files fetched and checked.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from e4t_cli.bases import EMBEDDED, Base, find_base
from e4t_cli.errors import IntegrityError, ResourceError, WeightsUnavailable, printable

from .access import Access
from .addresses import Address, address_of, pack_address, pack_folder, remember_address
from .downloading import SPARE_BYTES
from .fetching import fetch_files
from .integrity import is_intact
from .inventory import Inventory, known_commit, remembered, take_inventory
from .layout import check_shape, is_complete, names_in, needed_files
from .licences import Terms, accept
from .listening import Meter
from .places import free_bytes, hub_cache, repository_folder, shown_size, snapshot_folder
from .presence import base_in
from .towers import VIT_H_14, missing_bytes, provide_tower, tower_folder


def provide_base(
    wanted: str | os.PathLike[str],
    access: Access,
    *,
    half: bool = False,
    safety: bool = True,
    tower: bool = True,
    repair: bool = False,
) -> Base:
    """Return a base that is on this machine when this function returns.

    Args:
        wanted: a name, "owner/name[@revision]" of the hub, or a folder.
        access: how the hub may be used.
        half: prefer float16 files, which are half as large.
        safety: also bring the safety checker where the base has one.
        tower: also bring the image tower: a photo is looked at, and not only drawn.
        repair: fetch again what is damaged.

    Raises:
        WeightsUnavailable: it is not here and cannot be fetched now.
        IntegrityError: it is of a kind that cannot be used, or damaged.
        ResourceError: the disk has no room.
    """
    address = address_of(os.fspath(wanted))
    if address is None:
        base = find_base(wanted)
        if base.folder == find_base(EMBEDDED[0]).folder:
            return base
        check_shape(base.folder)
    else:
        base = _here(address, access, half=half, safety=safety) if not repair else None
        try:
            base = base or _fetched(address, access, half=half, safety=safety, repair=repair)
        except WeightsUnavailable as error:
            # What is nearly complete is better than nothing on a day without a network.
            alone = replace(access, offline=True)
            base = None if repair else _here(address, alone, half=half, safety=safety)
            if base is None:
                raise
            access.note(f"{error.message}: going on with what is on this machine")
    if not (base.folder / "image_tower" / "open_clip_config.json").is_file():
        folder = provide_tower(access) if tower else tower_folder()
        base = replace(base, tower=folder)
    return base


def provide_pack(location: str, access: Access, *, repair: bool = False) -> Path:
    """Return the folder of a pack whose location is "hub:owner/name@commit".

    Raises:
        WeightsUnavailable, IntegrityError, ResourceError: as `fetch_files`.
    """
    repository, revision = pack_address(location)
    if pack_folder(location) is None and not access.cut_off:
        inventory = take_inventory(repository, revision, access)
        accept(Terms(repository=repository, licence=inventory.licence if inventory else ""), access)
    return fetch_files(
        repository,
        revision,
        ["domain.toml", "*.safetensors"],
        on_progress=access.on_progress,
        offline=access.offline,
        repair=repair,
    )


def _here(address: Address, access: Access, *, half: bool, safety: bool) -> Base | None:
    """Return the base if it is on this machine, checked; None if something has to be fetched.

    Raises:
        IntegrityError: a file has changed, or the model cannot be used.
    """
    commit = known_commit(address.repository, address.revision)
    if commit is None:
        return None
    folder = snapshot_folder(address.repository, commit)
    # Offline, float16 does for float32, and a base without its safety checker is still one.
    enough = access.cut_off and is_complete(folder, half=True, safety=False)
    if not enough and not is_complete(folder, half=half, safety=safety):
        return None
    check_shape(folder)
    if safety and not is_complete(folder, half=True, safety=True):
        access.note(f"the safety checker of {address.name} is not here: no picture is looked at")
    names = names_in(folder)
    settings, weights = needed_files(names, half=half, safety=safety, source=address.repository)
    paths = [folder / name for name in settings + weights]
    known = remembered(address.repository, commit)
    declared = {file.path: file.digest for file in known.files} if known is not None else {}
    meter = Meter(sum(path.stat().st_size for path in paths), access.on_progress, "verify")
    for path in paths:
        name = path.relative_to(folder).as_posix()
        found = is_intact(path, declared.get(name, ""), meter.add)
        if found is not None:
            raise IntegrityError(
                f"{address.repository}/{printable(name)} is damaged: its checksum is {found}, "
                "not the one it was fetched with",
                hint=f"fetch it again: {address.advice}",
            )
    meter.settle()
    return base_in(folder, address, half=half)


def _fetched(address: Address, access: Access, *, half: bool, safety: bool, repair: bool) -> Base:
    inventory = take_inventory(address.repository, address.revision, access)
    if inventory is None:
        state = "incomplete" if repository_folder(address.repository).is_dir() else "not"
        raise WeightsUnavailable(
            f"the base {address.name!r} is {state} on this machine, and e4t is offline",
            hint=f"with a network: {address.advice}",
        )
    names = [file.path for file in inventory.files]
    settings, weights = needed_files(names, half=half, safety=safety, source=address.repository)
    folder = snapshot_folder(address.repository, inventory.commit)

    def fetch(files: list[str]) -> Path:
        return fetch_files(
            address.repository,
            inventory.commit,
            # As patterns that match these names and no others.
            [re.sub(r"([*?[])", r"[\1]", name) for name in files],
            on_progress=access.on_progress,
            offline=access.offline,
            repair=repair,
            advice=address.advice,
        )

    # The licence first, then room on the disk and what the model is, and only then the gigabytes.
    if not all((folder / name).is_file() for name in weights):
        licence = address.licence if address.licence is not None else inventory.licence
        accept(Terms(repository=address.repository, licence=licence), access)
        _check_room_for_all(inventory, weights)
    check_shape(fetch(settings))
    base = base_in(fetch(settings + weights), address, half=half)
    remember_address(base.name, address, inventory.commit)
    return base


def _check_room_for_all(inventory: Inventory, weights: list[str]) -> None:
    """Refuse before the first byte what the base and its image tower will not fit.

    Raises:
        ResourceError: the disk of the hub's cache is too small.
    """
    folder = snapshot_folder(inventory.repository, inventory.commit)
    sizes = {file.path: file.size for file in inventory.files}
    needed = sum(sizes[name] for name in weights if not (folder / name).is_file())
    tower = 0 if any(name.startswith("image_tower/") for name in weights) else missing_bytes()
    free = free_bytes(hub_cache())
    if needed + tower + SPARE_BYTES > free:
        more = f" and {shown_size(tower)} for {VIT_H_14.repository}" if tower else ""
        raise ResourceError(
            f"{inventory.repository} needs {shown_size(needed)}{more}, and {shown_size(free)} "
            f"are free on the disk of {printable(str(hub_cache()))}",
            hint="make room (e4t cache ls), or set HF_HOME to a larger disk",
        )
