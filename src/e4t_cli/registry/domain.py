"""The contract with the author of a domain: `Domain`, and what its `prepare` takes and returns.

A `Domain` is a value: a descriptor word, two configurations, where its weights are, and at most one function,
`prepare`. It is found through the entry-point group `e4t.domains` (domains/README.md). Only the standard library is
imported here, so a domain's module costs nothing to import. The contract grows only by keyword-only fields with
defaults.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from e4t_cli.registry.config import PretrainingConfig, TuningConfig, check_integer

if TYPE_CHECKING:
    from PIL.Image import Image

    from e4t_cli.images.framing import Frame

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
# Device names that Windows reserves in every folder.
_RESERVED = {"con", "prn", "aux", "nul"} | {f"{d}{i}" for d in ("com", "lpt") for i in range(1, 10)}
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}\.(safetensors|json)")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # of the hub: owner/name
_HUB_LOCATION = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}")


def check_name(name: object, what: str = "domain name") -> str:
    """Return `name` if it can safely be a file name and a command-line word, or raise ValueError."""
    if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name) or name in _RESERVED:
        allowed = "1 to 64 of a-z, 0-9, '-' and '_', start with a letter or a digit"
        raise ValueError(f"{what} {name!r} must be {allowed}, and not be a reserved device name")
    return name


def check_file_name(name: object) -> str:
    """Return `name` if a domain folder may have a file of that name, or raise ValueError.

    It must not leave the folder, nor be of a kind that can hold code: safetensors and JSON, never pickles.
    """
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name) or name.partition(".")[0].lower() in _RESERVED:
        raise ValueError(f"file name {name!r} must be a plain name that ends in .safetensors or .json")
    return name


def check_which(which: object) -> str:
    """Return `which` if it selects one of several subjects, or raise ValueError."""
    if which in ("largest", "left", "right", "center") or re.fullmatch(r"[1-9]\d{0,3}", str(which)):
        return str(which)
    raise ValueError(f"{which!r} must be largest, left, right, center, or a number: 1 is the leftmost")


def check_location(location: object) -> str:
    """Return `location` if it is a well-formed location of weights (see `Domain.weights`), or raise ValueError."""
    if not isinstance(location, str) or not location.strip() or "\0" in location:
        raise ValueError(f"a location of weights must be text, not {location!r}")
    kind, _, rest = location.partition(":")
    if kind == "package":
        package, *parts = rest.split("/")
        proper = all(part not in ("", ".", "..") and "\\" not in part for part in parts)
        if not all(word.isidentifier() for word in package.split(".")) or not proper:
            raise ValueError(f"{location!r} must look like 'package:my_package/folder'")
    elif kind == "hub" and not _HUB_LOCATION.fullmatch(rest):
        raise ValueError(f"{location!r} must look like 'hub:owner/repo@<40-hex commit>'")
    elif kind == "e4t-diffusion" and not REPOSITORY.fullmatch(rest):
        raise ValueError(f"{location!r} must look like 'e4t-diffusion:owner/repo'")
    return location


def check_template(template: object) -> str:
    """Return `template` if it is a prompt with "{}" exactly once, or raise ValueError."""
    if not isinstance(template, str) or template.count("{}") != 1:
        raise ValueError(f"prompt template {template!r} must contain '{{}}' exactly once")
    return template


def is_remote(location: str) -> bool:
    """Whether a well-formed location of weights is on the hub."""
    return location.partition(":")[0] in ("hub", "e4t-diffusion")


CONTRACT_VERSION = 1  # a domain written for another version of this contract is refused


@dataclass(frozen=True, kw_only=True)
class PreparationTarget:
    """What the base needs from a prepared image.

    Args:
        size: side in pixels of the square the base works on (64 for `mini`, 512 for SD 1.x).
        base: name of the base, for preparations that have a part per base.
        mask: "auto" lets the domain compute its mask, None asks for none; "face-ellipse" is for domains of faces,
            others may take it for "auto".
        align: whether the domain may turn and crop; False is the centred square.
        which: of several subjects, "largest", "left", "right", "center", or its number from the left: "1", …
        required: an image without the subject is refused (`InputError`).
        device: where a segmentation network may run.
        fetch: returns the folder with a hub repository's configs and safetensors; raises `WeightsUnavailable`. None
            where nothing may be fetched.
    """

    size: int
    base: str
    mask: str | None = "auto"
    align: bool = True
    which: str = "largest"
    required: bool = False
    device: str = "cpu"
    fetch: Callable[[str], Path] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_integer(self, "size", minimum=1)
        check_which(self.which)
        if self.mask not in ("auto", "face-ellipse", None):
            raise ValueError(f"PreparationTarget.mask must be 'auto', 'face-ellipse' or None, not {self.mask!r}")


@dataclass(frozen=True, kw_only=True)
class FoundSubject:
    """One of the subjects that `prepare` found in a photo, in pixels of the photo.

    Args:
        box: left, top, width and height.
        points: such as eyes, nose and corners of the mouth.
        score: how sure it is, 0 to 1.
        chosen: whether the prepared image shows this one.
    """

    box: tuple[float, float, float, float]
    points: tuple[tuple[float, float], ...] = ()
    score: float = 1.0
    chosen: bool = False


@dataclass(frozen=True, kw_only=True)
class PreparedImage:
    """What `prepare` returns: a square image and, if the domain has one, its mask.

    Args:
        image: PIL, mode RGB, square.
        mask: PIL, mode L, of the same size; white is the concept. None means all of it.
        notes: warnings for the user, such as "no face was found".
        remarks: further information for the user, such as "1 face, turned 4°".
        frame: the square of the photo that the image shows; the user's mask is cut with it.
        found: what `PreparationTarget.which` chooses among, from left to right.
        name: of the photo's file, without its ending; set by the caller of `prepare`, "" if there is none.
    """

    image: Image
    mask: Image | None = None
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    frame: Frame | None = None
    found: tuple[FoundSubject, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        size, mode = getattr(self.image, "size", None), getattr(self.image, "mode", None)
        if size is None or mode != "RGB" or size[0] != size[1]:
            raise ValueError(f"PreparedImage.image must be a square RGB image, not {mode} {size}")
        found = getattr(self.mask, "mode", None), getattr(self.mask, "size", None)
        if self.mask is not None and found != ("L", size):
            raise ValueError(f"PreparedImage.mask must be of mode L and size {size}, not {found}")
        for name in ("notes", "remarks"):
            if isinstance(value := getattr(self, name), str):
                raise ValueError(f"PreparedImage.{name} must be a tuple of strings, not a string")
            object.__setattr__(self, name, tuple(value))
        if self.frame is not None and not hasattr(self.frame, "apply_to_mask"):
            raise ValueError(f"PreparedImage.frame must be a Frame, not {self.frame!r}")


Prepare = Callable[["Image", PreparationTarget], PreparedImage]


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A family of concepts that one encoder serves: faces, cats, paintings, your dogs.

    Args:
        name: how users ask for it; lower-case, fit for a file name.
        descriptor: the coarse word whose embedding anchors the concept (e_domain of eq. 1).
        tuning: hyperparameters of tuning. Weights made for a base may bring their own.
        pretraining: hyperparameters of pre-training, None for the paper's usual ones.
        weights: base name → location: "package:my_package/folder" inside an installed package, "hub:owner/repo@<40-hex
            commit>", a folder, or "e4t-diffusion:owner/repo" for a checkpoint of that program, which is converted when
            it is first used.
        prepare: takes an upright RGB image and a target; None is the centred square.
        prompt_templates: prompts of training with "{}" in the place of the concept; none is the generic
            `SUBJECT_TEMPLATES`.
        licence: of the weights and the data they were made from.
        summary: one line for `e4t domains list`.
        download_sizes: base name → bytes to fetch, for weights on the hub; shown in the list.
        mask_words: the text prompt of the segmentation network, such as "a cat", where a mask is needed and `prepare`
            returns none.
        networks: hub repositories that `prepare` passes to `PreparationTarget.fetch` on bases of the hub; `e4t fetch`
            fetches them beforehand.
        contract: the contract version it was written for.
    """

    name: str
    descriptor: str
    tuning: TuningConfig
    pretraining: PretrainingConfig | None = None
    weights: Mapping[str, str] = field(default_factory=dict, hash=False)
    prepare: Prepare | None = None
    prompt_templates: tuple[str, ...] = ()
    licence: str = ""
    summary: str = ""
    download_sizes: Mapping[str, int] = field(default_factory=dict, hash=False)
    mask_words: str = ""
    networks: tuple[str, ...] = ()
    contract: int = CONTRACT_VERSION

    def __post_init__(self) -> None:
        if self.contract != CONTRACT_VERSION:
            written = f"it was written for version {self.contract!r} of the domain contract"
            raise ValueError(f"{written}, this e4t has version {CONTRACT_VERSION}")
        check_name(self.name)
        for name, kind, valid in (
            ("descriptor", "a word", isinstance(self.descriptor, str) and bool(self.descriptor.strip())),
            ("tuning", "a TuningConfig", isinstance(self.tuning, TuningConfig)),
            ("pretraining", "a PretrainingConfig", isinstance(self.pretraining, PretrainingConfig | None)),
            ("prepare", "a function", self.prepare is None or callable(self.prepare)),
            ("weights", "a mapping of base names to locations", isinstance(self.weights, Mapping)),
            *((name, "text", isinstance(getattr(self, name), str)) for name in ("licence", "summary", "mask_words")),
            ("prompt_templates", "a tuple of prompts", not isinstance(self.prompt_templates, str)),
            ("networks", "a tuple of hub repositories", not isinstance(self.networks, str)),
        ):
            if not valid:
                raise ValueError(f"Domain.{name} must be {kind}, not {getattr(self, name)!r}")
        if self.tuning.steps < 1:
            raise ValueError("Domain.tuning.steps must be 1 or more")
        for base, location in self.weights.items():
            check_name(base, "base name")
            check_location(location)
        for base, size in dict(self.download_sizes).items():
            if not isinstance(size, int) or size < 0:
                raise ValueError(f"Domain.download_sizes must hold bytes, not {size!r} for {base}")
        for template in self.prompt_templates:
            check_template(template)
        for repository in self.networks:
            if not isinstance(repository, str) or not REPOSITORY.fullmatch(repository):
                raise ValueError(f"Domain.networks: {repository!r} must look like 'owner/name'")
        # Copies: later changes of the author's dictionary or list do not reach this value.
        for name in ("weights", "download_sizes"):
            object.__setattr__(self, name, dict(getattr(self, name)))
        for name in ("prompt_templates", "networks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
