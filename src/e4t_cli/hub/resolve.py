"""What there is of a base on this machine: only names of files and settings are looked at.

`--base auto`: Stable Diffusion where there is an accelerator for it, the drawn world elsewhere.

The looks are ordered by what they cost. Without an accelerator, which is seen from the machine's
devices, nothing else is asked: no library is imported, no socket opened.

A base or a pack by whatever name it was asked for: found here, or fetched.

A name of the table in `bases`, "owner/name" or "owner/name@revision" of the hub, or a folder. What
is on this machine is used without a question to anybody; otherwise the licence is accepted, the
size said, and the files fetched and checked.
"""

from __future__ import annotations

import os
import platform
import re
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from e4t_cli.errors import IntegrityError, ResourceError, WeightsUnavailable, printable
from e4t_cli.files import free_bytes, shown_size
from e4t_cli.hub.bases import ACCELERATED, EMBEDDED, PUBLISHED, Base, find_base, read_base
from e4t_cli.hub.download import SPARE_BYTES, ProgressMeter, fetch_files
from e4t_cli.hub.image_tower import (
    VIT_H_14,
    fetch_image_tower,
    has_tower,
    missing_bytes,
    tower_folder,
)
from e4t_cli.hub.inventory import Inventory, fetch_inventory, is_intact, known_commit, remembered
from e4t_cli.hub.layout import check_shape, is_complete, names_in, needed_files
from e4t_cli.hub.locations import (
    HubLocation,
    domain_weights_location,
    hub_location,
    pack_folder,
    remember_location,
)
from e4t_cli.hub.paths import (
    HubAccess,
    Terms,
    accept,
    endpoint,
    hub_cache,
    is_accepted,
    repository_folder,
    snapshot_folder,
)


def is_here(wanted: str, *, half: bool = True, tower: bool = True) -> bool:
    """Whether a base could be used without a network; only names of files are looked at."""
    address = hub_location(wanted)
    if address is None:
        return wanted in EMBEDDED or Path(wanted).is_dir()
    commit = known_commit(address.repository, address.revision)
    if commit is None:
        return False
    folder = snapshot_folder(address.repository, commit)
    own = (folder / "image_tower" / "model.safetensors").is_file()
    eye = not tower or own or has_tower() or not missing_bytes()
    return eye and is_complete(folder, half=half, safety=False)


def look_up_base(wanted: str, *, half: bool = True) -> tuple[str, int, bool]:
    """Return name, resolution (0: unknown) and whether it is here; nothing is fetched or asked.

    Raises:
        E4TError: as `find_base`, for what is not of the hub.
    """
    address = hub_location(wanted)
    if address is None:
        base = find_base(wanted)
        return base.name, base.resolution, True
    row = PUBLISHED.get(address.name)
    resolution = row.resolution if row is not None else 0
    if not is_here(wanted, half=half):
        return address.name, resolution, False
    commit = known_commit(address.repository, address.revision)
    base = base_in(snapshot_folder(address.repository, commit or ""), address, half=half)
    return base.name, base.resolution, True


def base_in(folder: Path, address: HubLocation, *, half: bool) -> Base:
    """Return the base in a snapshot folder, under the name that it has here."""
    base = read_base(folder)
    row = PUBLISHED.get(address.name)
    # A repository may name itself, but not take a name that means something here already.
    named = row is None and (folder / "base.toml").is_file()
    taken = base.name in EMBEDDED or base.name in PUBLISHED
    return replace(
        base,
        name=base.name if named and not taken else address.name,
        licence=address.licence or base.licence,
        revision=folder.name,
        identity=f"{address.repository}@{folder.name}",
        half=half,
        resolution=row.resolution if row is not None else base.resolution,
    )


_PATIENCE = 2.0  # seconds that the hub has to answer the door


def default_base_name(
    access: HubAccess,
    *,
    device: str = "auto",
    has_weights: Callable[[str], bool] = lambda base: True,
    confirm: Callable[[], bool] = lambda: True,
    what: str = "the domain",
) -> tuple[str, str]:
    """Return the base that "auto" means here and now, and a sentence that says why.

    Args:
        access: whether the network and the licence question are allowed.
        device: as the user wrote it.
        has_weights: whether the domain has weights, here or on the hub, for a base.
        confirm: asked last whether the accelerator really works; it may import torch.
        what: the domain, for the sentence.
    """
    mini, large = EMBEDDED[0], ACCELERATED
    drawings = f"base: {mini} (64 px drawings)"
    if not likely_accelerator(device):
        return mini, f"{drawings}: no accelerator; --base {large} makes photographs (slow on CPU)"
    if not has_weights(large):
        return mini, f"{drawings}: {what} has no weights for {large} yet (e4t pretrain makes them)"
    row = PUBLISHED[large]
    if not is_here(large):
        if access.cut_off:
            return mini, f"{drawings}: offline, and {large} is not on this machine"
        terms = Terms(repository=row.repository, licence=row.licence)
        if terms.asks and not access.accept_license and not is_accepted(terms):
            return mini, f"{drawings}: e4t fetch {large} asks about the licence of {large} first"
        if not _answers():
            return mini, f"{drawings}: {large} is not on this machine and the hub does not answer"
    if not confirm():
        return mini, f"{drawings}: the accelerator of this machine does not work with this torch"
    return large, f"base {large}: this machine has an accelerator; --base {mini} needs none"


def likely_accelerator(device: str = "auto") -> bool:
    """Whether there is an accelerator by the look of the machine; torch is not asked."""
    if device != "auto":
        return device != "cpu"
    if platform.system() == "Darwin":
        return platform.machine() == "arm64"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    if platform.system() == "Windows":
        return Path(os.environ.get("SYSTEMROOT", r"C:\Windows"), "System32", "nvcuda.dll").exists()
    places = [*Path("/dev").glob("nvidia[0-9]*"), Path("/dev/dxg"), Path("/dev/kfd")]
    return any(place.exists() for place in places)


def _answers() -> bool:
    """Whether the hub can be reached."""
    address = urlsplit(endpoint())
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return True  # the proxy will say
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=_PATIENCE).close()
    except OSError:
        return False
    return True


def fetch_base(
    wanted: str | os.PathLike[str],
    access: HubAccess,
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
    address = hub_location(os.fspath(wanted))
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
        folder = fetch_image_tower(access) if tower else tower_folder()
        base = replace(base, tower=folder)
    return base


def fetch_domain_weights(location: str, access: HubAccess, *, repair: bool = False) -> Path:
    """Return the folder of a pack whose location is "hub:owner/name@commit".

    Raises:
        WeightsUnavailable, IntegrityError, ResourceError: as `fetch_files`.
    """
    repository, revision = domain_weights_location(location)
    if pack_folder(location) is None and not access.cut_off:
        inventory = fetch_inventory(repository, revision, access)
        accept(Terms(repository=repository, licence=inventory.licence if inventory else ""), access)
    return fetch_files(
        repository,
        revision,
        ["domain.toml", "*.safetensors"],
        on_progress=access.on_progress,
        offline=access.offline,
        repair=repair,
    )


def _here(address: HubLocation, access: HubAccess, *, half: bool, safety: bool) -> Base | None:
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
    meter = ProgressMeter(sum(path.stat().st_size for path in paths), access.on_progress, "verify")
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


def _fetched(
    address: HubLocation, access: HubAccess, *, half: bool, safety: bool, repair: bool
) -> Base:
    inventory = fetch_inventory(address.repository, address.revision, access)
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
    remember_location(base.name, address, inventory.commit)
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
