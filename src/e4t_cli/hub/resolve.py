"""Finds a base or domain weights by name: in the cache, or downloaded.

A name is one of `PUBLISHED`, "owner/name[@revision]" of the hub, or a folder. Cached files are used without a request.
Otherwise the licence is accepted, room on the disk and the model's configs are checked, and only then the weights are
fetched: safetensors only, one precision only, about 3 of the 45 GB of a Stable Diffusion repository.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from e4t_cli.errors import IntegrityError, WeightsUnavailable, printable
from e4t_cli.hub.bases import (
    EMBEDDED,
    PUBLISHED,
    Base,
    HubLocation,
    PublishedBase,
    domain_weights_location,
    find_base,
    hub_location,
    hub_weights_folder,
    read_base,
    remember_location,
)
from e4t_cli.hub.download import cached_commit, check_room, fetch_files, get_repo_info
from e4t_cli.hub.image_tower import VIT_H_14, fetch_image_tower, has_tower, missing_bytes, tower_folder
from e4t_cli.hub.paths import HubAccess, Terms, accept, endpoint, repository_folder, snapshot_folder

# ── what a base needs of a folder or repository in diffusers' layout ──

_USABLE = "Stable Diffusion 1 and 2 in diffusers' layout can be used"
_CONFIGS = (
    *("model_index.json", "base.toml", "scheduler/scheduler_config.json"),
    *("unet/config.json", "vae/config.json", "text_encoder/config.json"),
    *("safety_checker/config.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
    *("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/special_tokens_map.json"),
    *("feature_extractor/preprocessor_config.json", "image_tower/open_clip_config.json"),
)
"""Fetched before any weights, to see what the model is."""
_STEMS = {"text_encoder": "model", "safety_checker": "model", "image_tower": "model"}


def weight_files(names: Collection[str], part: str, *, half: bool) -> list[str]:
    """Return the files with the weights of one part.

    Args:
        names: of all files of the repository.
        part: "unet", "vae", "text_encoder", "safety_checker" or "image_tower".
        half: prefer float16 where it was published.

    Returns:
        One file, or an index with its shards; none if there are no safetensors.
    """
    stem = f"{part}/{_STEMS.get(part, 'diffusion_pytorch_model')}"
    for variant in (".fp16", "") if half else ("", ".fp16"):
        if (whole := f"{stem}{variant}.safetensors") in names:
            return [whole]
        if (index := f"{stem}.safetensors.index{variant}.json") in names:
            # diffusers writes stem.fp16-00001-of-00002.safetensors, transformers the same.
            shards = f"{re.escape(stem + variant)}-.*\\.safetensors"
            return [index, *(name for name in names if re.fullmatch(shards, name))]
    return []


def needed_files(names: Collection[str], *, half: bool, safety: bool, source: str) -> tuple[list[str], list[str]]:
    """Return the configs and the weights that are needed of a repository.

    Args:
        safety: also the safety checker, where there is one.
        source: the repository's name, for the error.

    Raises:
        IntegrityError: a part has no safetensors, or is missing.
    """
    weights = []
    for part in ("unet", "vae", "text_encoder"):
        found = weight_files(names, part, half=half)
        if not found:
            raise IntegrityError(
                f"{printable(source)} has no safetensors for its {part}, and pickles are refused", hint=_USABLE
            )
        weights += found
    for part in ("safety_checker", "image_tower") if safety else ("image_tower",):
        weights += weight_files(names, part, half=half)
    return [name for name in names if name in _CONFIGS], weights


def is_complete(folder: Path, *, half: bool, safety: bool) -> bool:
    """Whether everything that is needed of a base is in a folder.

    A float32 copy serves where float16 is preferred: it is not fetched again.
    """
    names = _names_in(folder)
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        _, weights = needed_files(names, half=half, safety=False, source="")
    except (OSError, ValueError, IntegrityError):
        return False
    if not half and any(".fp16." in name for name in weights):
        return False  # float32 was asked for, and there is only float16
    listed = index.get("safety_checker") if isinstance(index, dict) else None
    if safety and listed and listed[0] and not weight_files(names, "safety_checker", half=half):
        return False
    tokenizer = {"tokenizer/vocab.json", "tokenizer/merges.txt"} <= names
    configs = {*("unet/config.json", "vae/config.json", "text_encoder/config.json"), "scheduler/scheduler_config.json"}
    return (
        configs <= names
        and (tokenizer or "tokenizer/tokenizer.json" in names)
        and all(_has_shards(folder / name) for name in weights if name.endswith(".json"))
    )


def _names_in(folder: Path) -> set[str]:
    paths = [*folder.glob("*"), *folder.glob("*/*")]
    return {path.relative_to(folder).as_posix() for path in paths if path.is_file()}


def _has_shards(index: Path) -> bool:
    """Whether all files that an index names are beside it."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return all((index.parent / Path(name).name).is_file() for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def check_architecture(folder: Path) -> None:
    """Refuse a model that is not built like Stable Diffusion 1 or 2, by its configs alone.

    Raises:
        IntegrityError: it is of another kind; the error message names it.
    """
    shown = printable(str(folder))
    try:
        unet, schedule = (
            json.loads((folder / name).read_text(encoding="utf-8"))
            for name in ("unet/config.json", "scheduler/scheduler_config.json")
        )
        channels = unet["in_channels"]
        kind = unet.get("_class_name", "UNet2DConditionModel")
        predicts = schedule.get("prediction_type", "epsilon")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"{shown} is not a base: it has no U-Net or no noise schedule that can be read", hint=_USABLE
        ) from error
    wrong = (
        f"its denoiser is a {printable(str(kind))}"
        if kind != "UNet2DConditionModel"
        else f"its U-Net takes {channels} channels, as those for inpainting do"
        if channels != 4
        else "it is a Stable Diffusion XL"
        if unet.get("addition_embed_type")
        else f"it predicts {printable(str(predicts))}"
        if predicts not in ("epsilon", "v_prediction")
        else ""
    )
    if wrong:
        raise IntegrityError(f"{shown} cannot be used: {wrong}", hint="Stable Diffusion 1 and 2 can be used")


# ── bases in the cache ──


def is_cached(wanted: str, *, half: bool = True, tower: bool = True) -> bool:
    """Whether a base could be used without a network, by the names of cached files."""
    location = hub_location(wanted)
    if location is None:
        return wanted in EMBEDDED or Path(wanted).is_dir()
    commit = cached_commit(location.repository, location.revision)
    folder = snapshot_folder(location.repository, commit or "")
    own = (folder / "image_tower" / "model.safetensors").is_file()
    has_encoder = not tower or own or has_tower() or not missing_bytes()
    return commit is not None and has_encoder and is_complete(folder, half=half, safety=False)


def look_up_base(wanted: str, *, half: bool = True) -> tuple[str, int, bool]:
    """Return name, resolution (0: unknown) and whether it is cached; no network.

    Raises:
        E4TError: as `find_base`, for what is not of the hub.
    """
    location = hub_location(wanted)
    if location is None:
        base = find_base(wanted)
        return base.name, base.resolution, True
    if not is_cached(wanted, half=half):
        resolution = location.resolution if isinstance(location, PublishedBase) else 0
        return location.name, resolution, False
    commit = cached_commit(location.repository, location.revision)
    base = _base_in(snapshot_folder(location.repository, commit or ""), location, half=half)
    return base.name, base.resolution, True


def _base_in(folder: Path, location: HubLocation, *, half: bool) -> Base:
    """Return the base in a snapshot folder, under the name that it has here."""
    base = read_base(folder)
    row = location if isinstance(location, PublishedBase) else None
    # A repository may name itself, but not take a name that means something here already.
    named = row is None and (folder / "base.toml").is_file()
    taken = base.name in EMBEDDED or base.name in PUBLISHED
    return replace(
        base,
        name=base.name if named and not taken else location.name,
        licence=location.licence or base.licence,
        revision=folder.name,
        identity=f"{location.repository}@{folder.name}",
        half=half,
        resolution=row.resolution if row is not None else base.resolution,
    )


def is_reachable() -> bool:
    """Whether the hub accepts a connection; through a proxy this is not known beforehand."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return True
    url = urlsplit(endpoint())
    address = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection(address, timeout=2.0).close()
    except OSError:
        return False
    return True


# ── fetching ──


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
    if not (base.folder / "image_tower" / "open_clip_config.json").is_file():
        folder = fetch_image_tower(access) if tower else tower_folder()
        base = replace(base, tower=folder)
    return base


def fetch_domain_weights(location: str, access: HubAccess, *, repair: bool = False) -> Path:
    """Return the folder of domain weights whose location is "hub:owner/name@commit".

    Raises:
        WeightsUnavailable, IntegrityError, ResourceError: as `fetch_files`.
    """
    repository, revision = domain_weights_location(location)
    if hub_weights_folder(location) is None and not access.cut_off:
        info = get_repo_info(repository, revision, access)
        accept(Terms(repository=repository, licence=info.licence if info else ""), access)
    patterns = ["domain.toml", "*.safetensors"]
    return fetch_files(repository, revision, patterns, access, repair=repair)


def _cached_base(location: HubLocation, access: HubAccess, *, half: bool, safety: bool) -> Base | None:
    """Return the base, verified, if it is cached; None if something has to be fetched.

    Raises:
        IntegrityError: a file has changed, or the model cannot be used.
    """
    commit = cached_commit(location.repository, location.revision)
    if commit is None:
        return None
    folder = snapshot_folder(location.repository, commit)
    # Offline, float16 does for float32, and a base without its safety checker is still one.
    enough = access.cut_off and is_complete(folder, half=True, safety=False)
    if not enough and not is_complete(folder, half=half, safety=safety):
        return None
    check_architecture(folder)
    if safety and not is_complete(folder, half=True, safety=True):
        access.note(f"the safety checker of {location.name} is not here: no image is checked")
    names, source = _names_in(folder), location.repository
    configs, weights = needed_files(names, half=half, safety=safety, source=source)
    _fetch_exactly(configs + weights, commit, location, replace(access, offline=True))
    return _base_in(folder, location, half=half)


def _download_base(location: HubLocation, access: HubAccess, *, half: bool, safety: bool, repair: bool) -> Base:
    info = get_repo_info(location.repository, location.revision, access)
    if info is None:
        state = "incomplete" if repository_folder(location.repository).is_dir() else "not"
        raise WeightsUnavailable(
            f"the base {location.name!r} is {state} on this machine, and e4t is offline",
            hint=f"with a network: {location.fetch_command}",
        )
    configs, weights = needed_files(
        [file.path for file in info.files], half=half, safety=safety, source=info.repository
    )
    folder = snapshot_folder(info.repository, info.commit)
    missing = [name for name in weights if not (folder / name).is_file()]
    if missing and not access.cut_off:
        licence = location.licence if location.licence is not None else info.licence
        accept(Terms(repository=info.repository, licence=licence), access)
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
    patterns = [re.sub(r"([*?[])", r"[\1]", name) for name in names]
    command = location.fetch_command
    fetch_files(location.repository, commit, patterns, access, repair=repair, command=command)
