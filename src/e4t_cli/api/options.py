"""Options of the public functions: frozen dataclasses, filled from flat, typed keywords.

`personalize(..., device="cpu", mask="none")` is typed by `PersonalizeKeywords` (PEP 692), and
`PersonalizeOptions(**options)` is the value: it holds the defaults, refuses an unknown keyword, and
is passed on as the group that a callee needs (`RunOptions`, `PhotoOptions`, ...).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from e4t_cli.hub.addons import BaseAddons

if TYPE_CHECKING:
    from e4t_cli.formats.concept import Concept
    from e4t_cli.hub.paths import AskLicence
    from e4t_cli.images.loading import ImageInputs
    from e4t_cli.images.results import GeneratedImage
    from e4t_cli.models.text_to_image import TextToImageModel
    from e4t_cli.progress import ProgressCallback, StopRequest
    from e4t_cli.registry.domain import PreparedImage

ImageCallback = Callable[["GeneratedImage"], None]
PreparedCallback = Callable[["PreparedImage"], None]
ConceptCallback = Callable[["Concept"], None]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The base, the device, and what may be fetched.

    Args:
        base: a name, "owner/name[@revision]" of the hub, a folder in diffusers' layout, a .safetensors file with a
            whole Stable Diffusion, or a loaded model. "auto" is Stable Diffusion where there is an accelerator; for a
            concept, the base it was made with.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        dtype: "auto", "fp32", "bf16", "fp16".
        offline: use only what is on this machine, and open no socket.
        accept_license: True accepts the licence of what has to be fetched; a function is called with the question.
        on_progress: called with the progress of every stage.
        addons: LoRAs, textual inversions and a VAE that are added to the loaded base; not in pre-training.
    """

    base: str | os.PathLike[str] | TextToImageModel = "auto"
    device: str = "auto"
    dtype: str = "auto"
    offline: bool = False
    accept_license: bool | AskLicence = False
    on_progress: ProgressCallback | None = None
    addons: BaseAddons = BaseAddons()  # it is frozen


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(RunOptions):
    """Options of functions that generate images.

    Args:
        vram: gigabytes that may be used, as "8", or "auto" for what is free.
        safety_checker: withhold what the base's safety checker flags, if the base has one.
        on_image: called with each image as soon as it is generated.
    """

    vram: str = "auto"
    safety_checker: bool = True
    on_image: ImageCallback | None = None


@dataclass(frozen=True, kw_only=True)
class PhotoOptions:
    """What in the photo is the concept.

    Args:
        mask: "auto" as the domain does, "none", "words:a cat" for text-prompted segmentation
            ("words" alone: the domain's prompt), "face-ellipse" around a face, by eyes and mouth, or an image that is
            white on the concept. Of several photos a word is for all; images are a sequence, one for each photo.
        align: let the domain rotate and crop the photo; False takes its centred square.
        face: of several in a photo, "largest", "left", "right", "center", or a number from the left.
        require_face: refuse a photo without a face instead of continuing without a mask.
        strict: refuse a photo (`InputError`) wherever a note would cast doubt on it: no face where the domain looks
            for one, a face that is not clear, an unused mask, too few pixels, a photograph on a base for drawings.
    """

    mask: ImageInputs = "auto"
    align: bool = True
    face: str | int = "largest"
    require_face: bool = False
    strict: bool = False


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(RunOptions, PhotoOptions):
    """Options of `prepare`."""


@dataclass(frozen=True, kw_only=True)
class PersonalizeOptions(GenerateOptions, PhotoOptions):
    """Options of `personalize`.

    Args:
        tuning: "full" as the paper does, or "lora": less memory and a small concept, a departure
            from the paper; None as the domain weights' config.
        tune_steps: instead of the config's; 0 keeps the encoder's first estimate.
        keep_weights: keep the tuned tensors in the concept: larger, but usable without tuning.
        domain_base: take the domain weights that were trained for this base, as "sd14" with a base of the same shapes;
            None takes those for the base itself.
        on_prepared: called with the prepared image and its mask, before tuning; with each, of several photos.
        on_concept: called with the concept after tuning, before the first image.
    """

    tuning: str | None = None
    tune_steps: int | None = None
    keep_weights: bool = False
    domain_base: str | None = None
    on_prepared: PreparedCallback | None = None
    on_concept: ConceptCallback | None = None


@dataclass(frozen=True, kw_only=True)
class DomainTrainingOptions(RunOptions):
    """What a domain is pre-trained with; None is the config's value.

    Args:
        descriptor: the everyday word for such things; the installed domain's, or the longest word of a new name that
            is one token of the base.
        steps, batch_size, base_learning_rate, reg_weight: fields of `PretrainingConfig`.
        micro_batch: samples that are in memory at once; None is the whole batch.
        cache: "on" encodes each image once and keeps the result in the user's cache, "off" encodes it each time;
            "auto" is on if training passes over the images more than once.
        strict: stop at the first image that cannot be used; otherwise they are left out, counted and named in a log.
        force: replace the domain that was pre-trained there before.
    """

    descriptor: str | None = None
    steps: int | None = None
    batch_size: int | None = None
    base_learning_rate: float | None = None
    reg_weight: float | None = None
    micro_batch: int | None = None
    cache: str = "auto"
    strict: bool = False
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(DomainTrainingOptions):
    """Options of `pretrain`.

    Args:
        sample_every: steps between two contact sheets of a few held-out images; 0: none.
        trackers: names that accelerate knows, such as "tensorboard".
        checkpoint_every: steps between two checkpoints; None is the loop's default.
        resume: continue from the last checkpoint of an interrupted run with the same arguments.
        resume_changed: continue also if settings differ.
        stop: its request makes the run save a checkpoint and raise KeyboardInterrupt.
    """

    sample_every: int = 0
    trackers: Sequence[str] = ()
    checkpoint_every: int | None = None
    resume: bool = True
    resume_changed: bool = False
    stop: StopRequest | None = None


@dataclass(frozen=True, kw_only=True)
class ImportOptions(RunOptions):
    """Options of imported checkpoints of e4t-diffusion.

    Args:
        base: the model it was trained on; "auto" is what the checkpoint's config names.
        name: of the domain; by default the installed one with its descriptor, or the descriptor.
        licence: of the weights, for the manifest.
        normalised_patches: see `PatchTower`; for an open_clip from 2024 on.
        force: replace the domain of that name, and the concept's file.
    """

    name: str | None = None
    licence: str = ""
    normalised_patches: bool = False
    force: bool = False


# The keywords of these options, for type checkers.


class RunKeywords(TypedDict, total=False):
    base: str | os.PathLike[str] | TextToImageModel
    device: str
    dtype: str
    offline: bool
    accept_license: bool | AskLicence
    on_progress: ProgressCallback | None
    addons: BaseAddons


class GenerateKeywords(RunKeywords, total=False):
    vram: str
    safety_checker: bool
    on_image: ImageCallback | None


class PhotoKeywords(TypedDict, total=False):
    mask: ImageInputs
    align: bool
    face: str | int
    require_face: bool
    strict: bool


class PrepareKeywords(RunKeywords, PhotoKeywords, total=False):
    pass


class PersonalizeKeywords(GenerateKeywords, PhotoKeywords, total=False):
    tuning: str | None
    tune_steps: int | None
    keep_weights: bool
    domain_base: str | None
    on_prepared: PreparedCallback | None
    on_concept: ConceptCallback | None


class DomainTrainingKeywords(RunKeywords, total=False):
    descriptor: str | None
    steps: int | None
    batch_size: int | None
    base_learning_rate: float | None
    reg_weight: float | None
    micro_batch: int | None
    cache: str
    strict: bool
    force: bool


class PretrainKeywords(DomainTrainingKeywords, total=False):
    sample_every: int
    trackers: Sequence[str]
    checkpoint_every: int | None
    resume: bool
    resume_changed: bool
    stop: StopRequest | None


class ImportKeywords(RunKeywords, total=False):
    name: str | None
    licence: str
    normalised_patches: bool
    force: bool
