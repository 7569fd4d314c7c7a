"""Fetches a VAE of the hub: "owner/name[@revision]", at the top of a repository or in its folder `vae`.

The revision is resolved to a commit once, as that of a base, and the commit is recorded in concepts and pictures, so
that they find the same VAE again. Of the repository only the config and the weights are fetched, safetensors only, and
the weights not before the config is that of such a VAE.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

from e4t_cli.errors import IntegrityError, WeightsUnavailable, printable
from e4t_cli.hub.addons import Addon, BaseAddons
from e4t_cli.hub.architecture import read_config, wrong_size
from e4t_cli.hub.bases import weight_files
from e4t_cli.hub.download import fetch_files
from e4t_cli.hub.paths import HubAccess, Terms, accept, snapshot_folder
from e4t_cli.hub.repo_info import cached_commit, check_repository, get_repo_info

LATENT_CHANNELS = 4  # of all bases that can be used: see `check_architecture`


def wanted_source(addons: BaseAddons, recorded: Iterable[Addon] = ()) -> str:
    """Return "owner/name[@revision]" of the VAE that is wanted of the hub and was not fetched yet, "" for none.

    Args:
        recorded: of a concept. Its VAE is wanted if none was given, and its commit if the revision was not given.
    """
    if addons.vae is not None:
        return ""
    sources = [one.source for one in recorded if one.kind == "vae" and one.source]
    if not addons.vae_source:
        return sources[0] if sources else ""
    return next((one for one in sources if one.partition("@")[0] == addons.vae_source), addons.vae_source)


def fetch_addons(addons: BaseAddons, access: HubAccess, recorded: Iterable[Addon] = ()) -> BaseAddons:
    """Return the add-ons with the VAE of the hub on this machine; the other files are checked before it is fetched.

    Raises:
        WeightsUnavailable: it is not here and cannot be fetched now, or its licence was not accepted.
        IntegrityError: it is no VAE of Stable Diffusion in safetensors, or damaged; or as `BaseAddons.check`.
        ResourceError: the disk has no room.
        UsageError: as `BaseAddons.check`.
    """
    if not (source := wanted_source(addons, recorded)):
        return addons
    replace(addons, vae=None, vae_source="").check()
    folder = fetch_vae(source, access)
    return replace(addons, vae=folder, vae_source=f"{source.partition('@')[0]}@{folder.name}")


def fetch_vae(source: str, access: HubAccess, *, repair: bool = False) -> Path:
    """Return the snapshot folder, named after the commit, with a VAE of the hub; errors of `fetch_addons`.

    Args:
        source: "owner/name[@revision]".
        repair: fetch again what is damaged.
    """
    repository, _, revision = source.partition("@")
    check_repository(repository)
    command = f"e4t fetch {source}"
    info = get_repo_info(repository, revision or None, access)
    commit = info.commit if info is not None else cached_commit(repository, revision or None)
    folder = snapshot_folder(repository, commit or "")
    if info is None and (commit is None or not os.path.isdir(folder)):
        message = f"the VAE {printable(source)} is not on this machine, and e4t is offline"
        raise WeightsUnavailable(message, hint=f"with a network: {command}")
    names = {file.path for file in info.files} if info is not None else _names_in(folder)
    place, weights = find_weights(names, printable(repository))

    def fetch(*files: str) -> Path:
        patterns = [glob.escape(name) for name in files]
        return fetch_files(repository, folder.name, patterns, access, repair=repair, command=command)

    fetch(f"{place}config.json")
    _check_config(folder / place / "config.json", printable(repository))
    if not access.cut_off and not all(os.path.isfile(folder / name) for name in weights):
        accept(Terms(repository=repository, licence=info.licence if info is not None else ""), access)
    return fetch(f"{place}config.json", *weights)


def is_only_vae(names: Collection[str]) -> bool:
    """Whether a repository with these files is no base, and has what a VAE's weights are called."""
    stems = ("diffusion_pytorch_model.", "vae/diffusion_pytorch_model.")
    return not {"model_index.json", "unet/config.json"} & set(names) and any(name.startswith(stems) for name in names)


def find_weights(names: Collection[str], shown: str) -> tuple[str, list[str]]:
    """Return the folder of a VAE in a repository, "" or "vae/", and its files with weights; IntegrityError if none."""
    place = "vae/" if "vae/config.json" in names else ""
    inside = [f"vae/{name.removeprefix(place)}" for name in names if name.startswith(place)]
    if f"{place}config.json" in names and (found := weight_files(inside, "vae", half=False)):
        return place, [place + name.partition("/")[2] for name in found]
    pickle = next((name for name in sorted(names) if name.startswith(f"{place}diffusion_pytorch_model.bin")), "")
    if pickle:
        message = f"{shown} has its VAE as a pickle only, which can run any program: {printable(pickle)}"
        hint = "convert it where you trust its source: diffusers' AutoencoderKL.from_pretrained(A).save_pretrained(B)"
        raise IntegrityError(message, hint=f"{hint}, then --vae B")
    file = next((name for name in sorted(names) if name.endswith(".safetensors")), "")
    hint = "it needs config.json and diffusion_pytorch_model.safetensors, at its top or in the folder vae"
    if file:
        hint = f"if {printable(file)} is one: hf download {shown} {printable(file)} --local-dir ., then --vae FILE"
    raise IntegrityError(f"the repository {shown} has no VAE in diffusers' layout", hint=hint)


def _check_config(path: Path, shown: str) -> None:
    """Raise IntegrityError unless a config is that of a VAE whose latents a Stable Diffusion 1 or 2 denoises."""
    hint = "take a VAE of Stable Diffusion 1 or 2"
    try:
        config = read_config(path)
    except (OSError, ValueError) as error:
        raise IntegrityError(f"the config of {shown} cannot be used: {printable(str(error))}", hint=hint) from error
    kind, channels = config.get("_class_name", "AutoencoderKL"), config.get("latent_channels", LATENT_CHANNELS)
    if kind != "AutoencoderKL":
        message = f"{shown} is no VAE of Stable Diffusion but a {printable(str(kind), limit=60)}"
        raise IntegrityError(message, hint="--vae takes a repository whose config says AutoencoderKL")
    if channels != LATENT_CHANNELS:
        message = f"the VAE {shown} has latents of {printable(str(channels), limit=20)} channels"
        raise IntegrityError(f"{message}, and the bases have {LATENT_CHANNELS}", hint=hint)
    if wrong := wrong_size(config):
        raise IntegrityError(f"the VAE {shown} cannot be used: {wrong}", hint=hint)


def _names_in(folder: Path) -> set[str]:
    paths = [*folder.glob("*"), *folder.glob("vae/*")]
    return {path.relative_to(folder).as_posix() for path in paths if os.path.isfile(path)}
