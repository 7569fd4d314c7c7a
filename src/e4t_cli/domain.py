"""What a domain is: the whole contract between this program and a domain's author.

A `Domain` is a value: a descriptor word, two recipes, where its weights are, and at most one
function, `prepare`. It is written in a few lines and found through the entry-point group
`e4t.domains` (domains/README.md). Only the standard library is imported here, so a domain file
costs nothing to import. The contract grows only by keyword-only fields with defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .names import REPOSITORY, check_location, check_name, check_which
from .recipes import PretrainingRecipe, TuningRecipe, check_whole

if TYPE_CHECKING:
    from PIL.Image import Image

    from .framing import Frame

CONTRACT_VERSION = 1
"""The version of this contract; a domain built for another one is explained, not run."""


@dataclass(frozen=True, kw_only=True)
class PreparationTarget:
    """What the base needs from a prepared picture.

    Args:
        size: side in pixels of the square the base works on (64 for `mini`, 512 for SD 1.x).
        base: name of the base, for preparations that have a part per base.
        mask: "auto" lets the domain find its mask, None asks for none.
        align: whether the domain may turn and crop; False is the centred square.
        which: of several subjects, "largest", "left", "right", or which from the left: "1", "2", …
        required: without the subject the picture is refused (`InputError`).
        device: where a network that helps may run.
        fetch: a hub repository's name in, the folder with its configs and safetensors out; raises
            `WeightsUnavailable`. None where nothing may be fetched.
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
        check_whole(self, "size", least=1)
        check_which(self.which)
        if self.mask not in ("auto", None):
            raise ValueError(f"PreparationTarget.mask must be 'auto' or None, not {self.mask!r}")


@dataclass(frozen=True, kw_only=True)
class PreparedImage:
    """What `prepare` returns: a square picture and, if the domain has one, its mask.

    Args:
        image: PIL, mode RGB, square.
        mask: PIL, mode L, of the same size; white is the concept. None means all of it.
        notes: warnings for the user, such as "no face was found".
        remarks: sentences that are good to know, such as "1 face, turned 4°".
        frame: which square of the photo the picture is; a mask that the user drew is cut with it.
    """

    image: Image
    mask: Image | None = None
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    frame: Frame | None = None

    def __post_init__(self) -> None:
        size, mode = getattr(self.image, "size", None), getattr(self.image, "mode", None)
        if size is None or mode != "RGB" or size[0] != size[1]:
            raise ValueError(f"PreparedImage.image must be a square RGB picture, not {mode} {size}")
        if self.mask is not None:
            found = getattr(self.mask, "mode", None), getattr(self.mask, "size", None)
            if found != ("L", size):
                raise ValueError(
                    f"PreparedImage.mask must be of mode L and size {size}, not {found}"
                )
        for name in ("notes", "remarks"):
            if isinstance(getattr(self, name), str):
                raise ValueError(
                    f"PreparedImage.{name} must be a tuple of sentences, not one string"
                )
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.frame is not None and not hasattr(self.frame, "apply_to_mask"):
            raise ValueError(f"PreparedImage.frame must be a Frame, not {self.frame!r}")


Prepare = Callable[["Image", PreparationTarget], PreparedImage]


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A family of concepts that one encoder knows: faces, cats, paintings, your dogs.

    Args:
        name: how users ask for it; lower-case, fit for a file name.
        descriptor: the coarse word whose embedding anchors the concept (e_domain of eq. 1).
        tuning: the numbers of personalization. A pack made for a base may bring its own.
        pretraining: the numbers of pre-training, None for the paper's usual ones.
        weights: base name → where its pack is: "package:my_package/folder" inside an installed
            package, "hub:owner/repo@<40-hex commit>", a folder, or "e4t-diffusion:owner/repo" for
            a checkpoint of that program, which is converted when it is first used.
        prepare: upright RGB picture and target in, `PreparedImage` out; None = centre square.
        prompt_templates: training sentences with "{}" in the concept's place; none = the
            generic `SUBJECT_TEMPLATES`.
        licence: of the weights and the data they were made from.
        summary: one line for `e4t domains list`.
        download_sizes: base name → bytes to fetch, for weights that are on the hub; for the list.
        mask_words: what a network that finds things by words looks for where a mask is wanted
            and `prepare` has none: "a cat".
        networks: repositories of the hub that `prepare` asks `PreparationTarget.fetch` for, on
            bases of the hub; `e4t fetch` brings them beforehand.
        contract: the contract version it was written for.
    """

    name: str
    descriptor: str
    tuning: TuningRecipe
    pretraining: PretrainingRecipe | None = None
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
            raise ValueError(
                f"it was written for version {self.contract!r} of the domain contract, "
                f"this e4t has version {CONTRACT_VERSION}"
            )
        check_name(self.name)
        if not isinstance(self.descriptor, str) or not self.descriptor.strip():
            raise ValueError(f"Domain.descriptor must be a word, not {self.descriptor!r}")
        if not isinstance(self.tuning, TuningRecipe):
            raise ValueError(f"Domain.tuning must be a TuningRecipe, not {self.tuning!r}")
        if self.tuning.steps < 1:
            raise ValueError("Domain.tuning.steps must be 1 or more")
        if self.pretraining is not None and not isinstance(self.pretraining, PretrainingRecipe):
            raise ValueError(
                f"Domain.pretraining must be a PretrainingRecipe, not {self.pretraining!r}"
            )
        if self.prepare is not None and not callable(self.prepare):
            raise ValueError(f"Domain.prepare must be a function, not {self.prepare!r}")
        if not isinstance(self.weights, Mapping):
            raise ValueError("Domain.weights must map a base's name to where its pack is")
        for base, location in self.weights.items():
            check_name(base, "base name")
            check_location(location)
        for base, size in dict(self.download_sizes).items():
            if not isinstance(size, int) or size < 0:
                raise ValueError(f"Domain.download_sizes must hold bytes, not {size!r} for {base}")
        if isinstance(self.prompt_templates, str):
            raise ValueError("Domain.prompt_templates must be a tuple of sentences")
        for template in self.prompt_templates:
            if not isinstance(template, str) or template.count("{}") != 1:
                raise ValueError(f"prompt template {template!r} must contain '{{}}' exactly once")
        for name in ("licence", "summary", "mask_words"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"Domain.{name} must be text, not {getattr(self, name)!r}")
        if isinstance(self.networks, str):
            raise ValueError("Domain.networks must be a tuple of hub repositories")
        for repository in self.networks:
            if not isinstance(repository, str) or not REPOSITORY.fullmatch(repository):
                raise ValueError(f"Domain.networks: {repository!r} must look like 'owner/name'")
        # Own copies: later changes of the author's dictionary or list do not reach the value.
        object.__setattr__(self, "weights", dict(self.weights))
        object.__setattr__(self, "download_sizes", dict(self.download_sizes))
        object.__setattr__(self, "prompt_templates", tuple(self.prompt_templates))
        object.__setattr__(self, "networks", tuple(self.networks))
