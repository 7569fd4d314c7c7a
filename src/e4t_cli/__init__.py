"""e4t: one photo in, a personalised text-to-image model out.

    from e4t_cli import personalize

    result = personalize("face", "me.jpg", ["S* as an astronaut"])

The public names. Each is imported from its module at first use (PEP 562), so that importing the
package loads neither torch nor Pillow.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from .api.batch import personalize_many
    from .api.dry_run import plan_pretraining
    from .api.exporting import export
    from .api.jobs import Job
    from .api.personalization import generate, personalize
    from .api.pretraining import pretrain
    from .errors import (
        DivergedError,
        E4TError,
        InputError,
        IntegrityError,
        PartialResult,
        ResourceError,
        UsageError,
        WeightsUnavailable,
    )
    from .formats.concept import Concept
    from .hub.addons import BaseAddons
    from .hub.bases import find_base
    from .images.framing import Frame
    from .images.loading import center_square, open_image
    from .images.preparation import load_segmenter, mask_by_words
    from .images.results import GeneratedImage, Personalization
    from .models.domain_weights import DomainWeights
    from .models.text_to_image import TextToImageModel
    from .progress import Progress
    from .prompts import SUBJECT_TEMPLATES, PromptRequest
    from .registry.config import PretrainingConfig, TuningConfig
    from .registry.discovery import find_domain, installed_domains
    from .registry.domain import Domain, FoundSubject, PreparationTarget, PreparedImage
    from .registry.testing import check_domain
    from .schedulers import SamplingConfig

_IMPORT_STRUCTURE = {
    "api.batch": ["personalize_many"],
    "api.dry_run": ["plan_pretraining"],
    "api.exporting": ["export"],
    "api.jobs": ["Job"],
    "api.personalization": ["generate", "personalize"],
    "api.pretraining": ["pretrain"],
    "errors": [
        "DivergedError",
        "E4TError",
        "InputError",
        "IntegrityError",
        "PartialResult",
        "ResourceError",
        "UsageError",
        "WeightsUnavailable",
    ],
    "formats.concept": ["Concept"],
    "hub.addons": ["BaseAddons"],
    "hub.bases": ["find_base"],
    "images.framing": ["Frame"],
    "images.loading": ["center_square", "open_image"],
    "images.preparation": ["load_segmenter", "mask_by_words"],
    "images.results": ["GeneratedImage", "Personalization"],
    "models.domain_weights": ["DomainWeights"],
    "models.text_to_image": ["TextToImageModel"],
    "progress": ["Progress"],
    "prompts": ["PromptRequest", "SUBJECT_TEMPLATES"],
    "registry.config": ["PretrainingConfig", "TuningConfig"],
    "registry.discovery": ["find_domain", "installed_domains"],
    "registry.domain": ["Domain", "FoundSubject", "PreparationTarget", "PreparedImage"],
    "registry.testing": ["check_domain"],
    "schedulers": ["SamplingConfig"],
}
_HOME = {name: module for module, names in _IMPORT_STRUCTURE.items() for name in names}

__all__ = [
    "BaseAddons", "Concept", "DivergedError", "Domain", "DomainWeights", "E4TError", "FoundSubject", "Frame",
    "GeneratedImage", "InputError", "IntegrityError", "Job", "PartialResult", "Personalization", "PreparationTarget",
    "PreparedImage", "PretrainingConfig", "Progress", "PromptRequest", "ResourceError", "SUBJECT_TEMPLATES",
    "SamplingConfig", "TextToImageModel", "TuningConfig", "UsageError", "WeightsUnavailable", "__version__",
    "center_square", "check_domain", "export", "find_base", "find_domain", "generate", "installed_domains",
    "load_segmenter", "mask_by_words", "open_image", "personalize", "personalize_many", "plan_pretraining", "pretrain",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value  # the next lookup bypasses this function
    return value


def __dir__() -> list[str]:
    return __all__
