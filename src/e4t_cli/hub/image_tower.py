"""The image tower of Stable Diffusion bases: the visual half of open_clip's ViT-H/14, in float16.

The published file holds both towers in float32, 3.9 GB. The visual tower in float16 has 1.3 GB; it is written once
into e4t's cache, in the layout of a base's `image_tower/`, and the published file can then be deleted (`e4t cache
prune`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e4t_cli.errors import E4TError, IntegrityError, ResourceError
from e4t_cli.files import free_bytes, rename_folder_to_free_name, shown_size, sync_tree, writing
from e4t_cli.hub.download import fetch_files
from e4t_cli.hub.paths import HubAccess, Terms, accept, snapshot_folder, user_cache
from e4t_cli.hub.repo_info import cached_repo_info, checksum
from e4t_cli.temporary import sweep, temporary_path


@dataclass(frozen=True, kw_only=True)
class PublishedTower:
    """A CLIP model of the hub, and the architecture of its visual tower."""

    name: str  # of the folder of the slim copy
    repository: str
    revision: str
    file: str
    sha256: str
    size: int  # of the published file, in bytes
    licence: str
    config: dict[str, Any]  # open_clip_config.json of the slim copy


# open_clip's ViT-H-14.json, and OpenAI's mean and deviation, with which it was trained.
VIT_H_14 = PublishedTower(
    name="vit-h-14-laion2b-s32b-b79k",
    repository="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    revision="1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    file="open_clip_model.safetensors",
    sha256="0084e75319a50ad85ef45377bad5bc38f2f58824459eb690048d51c9f8863be5",
    size=3_944_517_836,
    licence="mit",
    config={
        "model_cfg": {
            "embed_dim": 1024,
            "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
        },
        "preprocess_cfg": {
            "mean": [0.48145466, 0.4578275, 0.40821073],
            "std": [0.26862954, 0.26130258, 0.27577711],
            "size": 224,
        },
    },
)


def tower_folder(tower: PublishedTower = VIT_H_14) -> Path:
    """Return the folder of the slim copy, whether it exists or not."""
    return user_cache() / "towers" / tower.name


def has_tower(tower: PublishedTower = VIT_H_14) -> bool:
    """Whether there is a slim copy; it appears whole or not at all."""
    return os.path.isfile(tower_folder(tower) / "model.safetensors")


def missing_bytes(tower: PublishedTower = VIT_H_14) -> int:
    """Return how much would have to be fetched."""
    published = snapshot_folder(tower.repository, tower.revision) / tower.file
    return 0 if has_tower(tower) or os.path.isfile(published) else tower.size


def fetch_image_tower(access: HubAccess, tower: PublishedTower = VIT_H_14) -> Path:
    """Return the folder of the slim copy, made now if it was not.

    Raises:
        WeightsUnavailable: the published file is neither cached nor can it be fetched.
        IntegrityError: it is not the file that was published.
        ResourceError: the disk has no room for the copy.
    """
    folder, repository, revision = tower_folder(tower), tower.repository, tower.revision
    if has_tower(tower):
        return folder
    if missing_bytes(tower) and not access.cut_off:
        accept(Terms(repository=repository, licence=tower.licence), access)
    snapshot = fetch_files(repository, revision, [tower.file], access, command="e4t fetch sd14")
    # What the hub declares today must be what it declared when the revision was pinned.
    known = cached_repo_info(repository, revision)
    found = (known and known.digests.get(tower.file)) or checksum(snapshot / tower.file, tower.sha256)
    if found != tower.sha256:
        different = f"expected checksum {tower.sha256}, got {found}"
        message = f"{repository}/{tower.file} is not the file that e4t knows: {different}"
        raise IntegrityError(message, hint=f"e4t cache rm {repository}")
    access.remark(f"keeping a slim copy of the image tower in {folder}")
    _write_visual_tower(snapshot / tower.file, folder, tower.config)
    return folder


def _write_visual_tower(published: Path, folder: Path, config: dict[str, Any]) -> None:
    """Write the visual tower of an open_clip file, in float16, as a base's `image_tower/`."""
    import numpy
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import save_file

    tensors = {}
    try:
        with safe_open(published, framework="numpy") as file, numpy.errstate(over="ignore"):
            for key in (key for key in file.keys() if key.startswith("visual.")):  # noqa: SIM118
                tensor = file.get_tensor(key).astype(numpy.float16)
                if not numpy.isfinite(tensor).all():
                    raise IntegrityError(f"{published.name}: {key} has no finite float16")
                tensors[key.removeprefix("visual.")] = tensor
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{published.name} is not a usable safetensors file") from error
    if not tensors:
        raise IntegrityError(f"{published.name} holds no visual tower")
    needed, free = sum(tensor.nbytes for tensor in tensors.values()), free_bytes(folder)
    if needed > free:
        message = f"the image tower needs {shown_size(needed)} and {shown_size(free)} are free"
        raise ResourceError(message, hint="make room, or set E4T_CACHE_DIR to a larger disk")
    sweep(folder)
    temporary = temporary_path(folder)
    try:
        with writing(folder):
            temporary.mkdir(parents=True)
            (temporary / "open_clip_config.json").write_text(json.dumps(config, indent=1))
            save_file(tensors, temporary / "model.safetensors")
            sync_tree(temporary)
            with contextlib.suppress(FileExistsError):  # another process was faster; its copy is the same
                rename_folder_to_free_name(temporary, folder)
    except E4TError as error:
        hint = "set E4T_CACHE_DIR to a folder of yours that has room"
        raise type(error)(f"the image tower cannot be kept: {error.message}", hint=hint) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
