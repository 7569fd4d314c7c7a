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
    from .api.dry_run import plan_pretraining
    from .api.exporting import export
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
    from .hub.bases import find_base
    from .images.framing import Frame
    from .images.loading import center_square, open_image
    from .images.preparation import load_segmenter, mask_by_words
    from .images.results import GeneratedImage, Personalization
    from .models.domain_weights import DomainWeights
    from .models.text_to_image import TextToImageModel
    from .progress import Progress
    from .prompts import SUBJECT_TEMPLATES
    from .registry.config import PretrainingConfig, TuningConfig
    from .registry.discovery import find_domain, installed_domains
    from .registry.domain import Domain, PreparationTarget, PreparedImage
    from .registry.testing import check_domain
    from .sampling import SamplingConfig

_HOME = {
    "Concept": "formats.concept",
    "DivergedError": "errors",
    "Domain": "registry.domain",
    "E4TError": "errors",
    "Frame": "images.framing",
    "GeneratedImage": "images.results",
    "InputError": "errors",
    "IntegrityError": "errors",
    "PartialResult": "errors",
    "Personalization": "images.results",
    "PreparationTarget": "registry.domain",
    "PreparedImage": "registry.domain",
    "DomainWeights": "models.domain_weights",
    "PretrainingConfig": "registry.config",
    "Progress": "progress",
    "ResourceError": "errors",
    "SUBJECT_TEMPLATES": "prompts",
    "SamplingConfig": "sampling",
    "TextToImageModel": "models.text_to_image",
    "TuningConfig": "registry.config",
    "UsageError": "errors",
    "WeightsUnavailable": "errors",
    "center_square": "images.loading",
    "check_domain": "registry.testing",
    "export": "api.exporting",
    "find_base": "hub.bases",
    "find_domain": "registry.discovery",
    "generate": "api.personalization",
    "installed_domains": "registry.discovery",
    "load_segmenter": "images.preparation",
    "mask_by_words": "images.preparation",
    "open_image": "images.loading",
    "personalize": "api.personalization",
    "pretrain": "api.pretraining",
    "plan_pretraining": "api.dry_run",
}

__all__ = [
    "Concept",
    "DivergedError",
    "Domain",
    "E4TError",
    "Frame",
    "GeneratedImage",
    "InputError",
    "IntegrityError",
    "PartialResult",
    "Personalization",
    "PreparationTarget",
    "PreparedImage",
    "DomainWeights",
    "PretrainingConfig",
    "Progress",
    "ResourceError",
    "SUBJECT_TEMPLATES",
    "SamplingConfig",
    "TextToImageModel",
    "TuningConfig",
    "UsageError",
    "WeightsUnavailable",
    "__version__",
    "center_square",
    "check_domain",
    "export",
    "find_base",
    "find_domain",
    "generate",
    "installed_domains",
    "load_segmenter",
    "mask_by_words",
    "open_image",
    "personalize",
    "pretrain",
    "plan_pretraining",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value  # the next lookup bypasses this function
    return value


def __dir__() -> list[str]:
    return __all__
