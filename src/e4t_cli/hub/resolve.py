"""Finds a base or domain weights by name: in the cache, or downloaded.

A name is one of `PUBLISHED`, "owner/name[@revision]" of the hub, a folder, or a single file that was converted. Cached
files are used without a request. Otherwise the licence is accepted, room on the disk and the model's configs are
checked, and only then the weights are fetched: safetensors only, one precision only, about 3 of the 45 GB of a Stable
Diffusion repository.
"""

from __future__ import annotations

import contextlib
import glob
import os
import socket
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from e4t_cli.errors import IntegrityError, WeightsUnavailable
from e4t_cli.hub.architecture import check_architecture, no_safetensors, read_config, shard_names
from e4t_cli.hub.bases import (
    EMBEDDED,
    PUBLISHED,
    Base,
    HubLocation,
    domain_weights_location,
    find_base,
    hub_location,
    hub_weights_folder,
    name_of_file,
    read_base,
    remember_location,
    weight_files,
    weight_stem,
)
from e4t_cli.hub.download import check_room, fetch_files
from e4t_cli.hub.image_tower import VIT_H_14, fetch_image_tower, has_tower, missing_bytes, tower_folder
from e4t_cli.hub.paths import HubAccess, Terms, accept, endpoint, repository_folder, snapshot_folder
from e4t_cli.hub.repo_info import cached_commit, get_repo_info
from e4t_cli.hub.single_file import find_converted, is_file_name, recognize_file

_REQUIRED = {"unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"}
# Fetched before any weights, to see what the model is.
_CONFIGS = {
    *_REQUIRED,
    *("model_index.json", "base.toml", "safety_checker/config.json", "feature_extractor/preprocessor_config.json"),
    *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"),
    *("tokenizer/special_tokens_map.json", "image_tower/open_clip_config.json"),
}


def needed_files(names: Collection[str], *, half: bool, safety: bool, source: str) -> tuple[list[str], list[str]]:
    """Return the configs and the weights that are needed of `source`; IntegrityError if a part has no safetensors."""
    required = ("unet", "vae", "text_encoder")
    weights = []
    for part in (*required, "safety_checker", "image_tower") if safety else (*required, "image_tower"):
        found = weight_files(names, part, half=half)
        if part in required and not found:
            raise no_safetensors(names, weight_stem(part), source)
        weights += found
    return [name for name in names if name in _CONFIGS], weights


def is_complete(folder: Path, *, half: bool, safety: bool) -> bool:
    """Whether everything that is needed of a base is in a folder; float32 serves where float16 is preferred."""
    names = _names_in(folder)
    try:
        index = read_config(folder / "model_index.json")
        _, weights = needed_files(names, half=half, safety=False, source="")
    except (OSError, ValueError, IntegrityError):
        return False
    if not half and any(".fp16." in name for name in weights):
        return False  # float32 was asked for, and there is only float16
    listed = index.get("safety_checker")
    if safety and isinstance(listed, list) and any(listed) and not weight_files(names, "safety_checker", half=half):
        return False
    tokenizer = {"tokenizer/vocab.json", "tokenizer/merges.txt"} <= names or "tokenizer/tokenizer.json" in names
    shards = all(_has_shards(folder / name) for name in weights if name.endswith(".json"))
    return tokenizer and names >= _REQUIRED and shards


def _names_in(folder: Path) -> set[str]:
    paths = [*folder.glob("*"), *folder.glob("*/*")]
    return {path.relative_to(folder).as_posix() for path in paths if os.path.isfile(path)}


def _has_shards(index: Path) -> bool:
    """Whether all files that an index names are beside it."""
    try:
        return all(os.path.isfile(index.parent / name) for name in shard_names(index))
    except (OSError, ValueError):
        return False


def is_cached(wanted: str, *, half: bool = True, tower: bool = True) -> bool:
    """Whether a base could be used without a network, by the names of cached files."""
    location = hub_location(wanted)
    if location is None:
        return wanted in EMBEDDED or os.path.exists(wanted) or find_converted(wanted) is not None
    folder = _cached_snapshot(location)
    if folder is None or not is_complete(folder, half=half, safety=False):
        return False
    own = os.path.isfile(folder / "image_tower" / "model.safetensors")
    return not tower or own or has_tower() or not missing_bytes()


def look_up_base(wanted: str, *, half: bool = True) -> tuple[str, int, bool]:
    """Return name, resolution (0: unknown) and whether it is cached; no network. Errors as of `find_base`."""
    location, base = hub_location(wanted), find_cached_base(wanted, half=half)
    if base is None and location is None:  # a single file, before its conversion
        file = recognize_file(wanted)
        return name_of_file(file.path), file.resolution, True
    if base is None:
        assert location is not None
        return location.name, location.resolution, False
    return base.name, base.resolution, True


def find_cached_base(wanted: str, *, half: bool = True) -> Base | None:
    """Return a base that is complete on this machine, else None; no network. Errors as of `find_base`."""
    location = hub_location(wanted)
    if location is None:
        return find_base(wanted) if not is_file_name(wanted) or find_converted(wanted) else None
    folder = _cached_snapshot(location)
    return _base_in(folder, location, half=half) if folder is not None and is_cached(wanted, half=half) else None


def _cached_snapshot(location: HubLocation) -> Path | None:
    """Return the snapshot folder of a base, if its revision is known here."""
    commit = cached_commit(location.repository, location.revision)
    return snapshot_folder(location.repository, commit) if commit else None


def _base_in(folder: Path, location: HubLocation, *, half: bool) -> Base:
    """Return the base in a snapshot folder, under the name that it has here."""
    base = read_base(folder)
    # A repository may name itself, but not take a name that means something here already.
    named = location.name not in PUBLISHED and os.path.isfile(folder / "base.toml")
    return replace(
        base,
        name=base.name if named and base.name not in (*EMBEDDED, *PUBLISHED) else location.name,
        licence=location.licence or base.licence,
        revision=folder.name,
        identity=f"{location.repository}@{folder.name}",
        half=half,
        resolution=location.resolution or base.resolution,
    )


def is_reachable() -> bool:
    """Whether the hub accepts a connection; through a proxy this is not known beforehand."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return True
    url = urlsplit(endpoint())
    address = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=2.0):
        return True
    return False


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
        half: prefer float16 files, which are half as large.
        safety: also fetch the safety checker where the base has one.
        tower: also fetch the image tower, which encodes photos.
        repair: fetch again what is damaged.

    Raises:
        WeightsUnavailable: it is not here and cannot be fetched now.
        IntegrityError: it is of a kind that cannot be used, or damaged.
        ResourceError: the disk has no room.
    """
    location = hub_location(os.fspath(wanted))
    if location is None:
        base = find_base(wanted)
        if base.folder == find_base(EMBEDDED[0]).folder:
            return base
        check_architecture(base.folder)
        needed_files(_names_in(base.folder), half=half, safety=False, source=os.fspath(wanted))
    else:
        cached = None if repair else _cached_base(location, access, half=half, safety=safety)
        try:
            base = cached or _download_base(location, access, half=half, safety=safety, repair=repair)
        except WeightsUnavailable as error:
            # Without a network, a base that is nearly complete is better than none.
            alone = replace(access, offline=True)
            cached = None if repair else _cached_base(location, alone, half=half, safety=safety)
            if cached is None:
                raise
            base = cached
            access.note(f"{error.message}: going on with what is on this machine")
    if os.path.isfile(base.folder / "image_tower" / "open_clip_config.json"):
        return base
    return replace(base, tower=fetch_image_tower(access) if tower else tower_folder())


def fetch_domain_weights(location: str, access: HubAccess, *, repair: bool = False) -> Path:
    """Return the folder of domain weights whose location is "hub:owner/name@commit"; errors as of `fetch_files`."""
    repository, revision = domain_weights_location(location)
    if hub_weights_folder(location) is None and not access.cut_off:
        info = get_repo_info(repository, revision, access)
        accept(Terms(repository=repository, licence=info.licence if info else ""), access)
    return fetch_files(repository, revision, ["domain.toml", "*.safetensors"], access, repair=repair)


def _cached_base(location: HubLocation, access: HubAccess, *, half: bool, safety: bool) -> Base | None:
    """Return the base, verified, if it is cached; None if something has to be fetched."""
    folder = _cached_snapshot(location)
    if folder is None:
        return None
    # Offline, float16 does for float32, and a base without its safety checker is still one.
    enough = access.cut_off and is_complete(folder, half=True, safety=False)
    if not enough and not is_complete(folder, half=half, safety=safety):
        return None
    check_architecture(folder)
    if safety and not is_complete(folder, half=True, safety=True):
        access.note(f"the safety checker of {location.name} is not here: no image is checked")
    configs, weights = needed_files(_names_in(folder), half=half, safety=safety, source=location.repository)
    _fetch_exactly(configs + weights, folder.name, location, replace(access, offline=True))
    return _base_in(folder, location, half=half)


def _download_base(location: HubLocation, access: HubAccess, *, half: bool, safety: bool, repair: bool) -> Base:
    info = get_repo_info(location.repository, location.revision, access)
    if info is None:
        state = "incomplete" if os.path.isdir(repository_folder(location.repository)) else "not"
        message = f"the base {location.name!r} is {state} on this machine, and e4t is offline"
        raise WeightsUnavailable(message, hint=f"with a network: {location.fetch_command}")
    names = [file.path for file in info.files]
    configs, weights = needed_files(names, half=half, safety=safety, source=info.repository)
    folder = snapshot_folder(info.repository, info.commit)
    missing = [name for name in weights if not os.path.isfile(folder / name)]
    if missing and not access.cut_off:
        accept(Terms(repository=info.repository, licence=location.licence or info.licence), access)
        # Room for the base and its image tower together, before the first byte.
        needed = sum(file.size for file in info.files if file.path in missing)
        own = any(name.startswith("image_tower/") for name in weights)
        check_room(info.repository, needed, VIT_H_14.repository, 0 if own else missing_bytes())
    _fetch_exactly(configs, info.commit, location, access, repair=repair)
    check_architecture(folder)
    _fetch_exactly(configs + weights, info.commit, location, access, repair=repair)
    base = _base_in(folder, location, half=half)
    remember_location(base.name, location, info.commit)
    return base


def _fetch_exactly(
    names: list[str], commit: str, location: HubLocation, access: HubAccess, *, repair: bool = False
) -> None:
    patterns = [glob.escape(name) for name in names]
    fetch_files(location.repository, commit, patterns, access, repair=repair, command=location.fetch_command)
