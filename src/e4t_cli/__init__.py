"""e4t: one photo in, a personalised text-to-image model out.

    from e4t_cli import personalize

    result = personalize("face", "me.jpg", ["S* as an astronaut"])

This is the door. Every name is fetched from its module at first use, so importing the package
loads neither torch nor Pillow, and a domain's author pays nothing for `from e4t_cli import Domain`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from .api import export, generate, personalize, pretrain, rehearse
    from .concept import Concept
    from .domain import Domain, PreparationTarget, PreparedImage
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
    from .framing import Frame
    from .generation.sampling import Sampling
    from .images import center_square, open_image
    from .pretrained import PretrainedDomain
    from .progress import Progress
    from .prompts import SUBJECT_TEMPLATES
    from .recipes import PretrainingRecipe, TuningRecipe
    from .registry.finding import find_domain, installed_domains
    from .results.pictures import GeneratedImage, Personalization
    from .segmenters import load_segmenter, mask_by_words

_HOME = {
    "Concept": "concept",
    "DivergedError": "errors",
    "Domain": "domain",
    "E4TError": "errors",
    "Frame": "framing",
    "GeneratedImage": "results.pictures",
    "InputError": "errors",
    "IntegrityError": "errors",
    "PartialResult": "errors",
    "Personalization": "results.pictures",
    "PreparationTarget": "domain",
    "PreparedImage": "domain",
    "PretrainedDomain": "pretrained",
    "PretrainingRecipe": "recipes",
    "Progress": "progress",
    "ResourceError": "errors",
    "SUBJECT_TEMPLATES": "prompts",
    "Sampling": "generation.sampling",
    "TuningRecipe": "recipes",
    "UsageError": "errors",
    "WeightsUnavailable": "errors",
    "center_square": "images",
    "export": "api",
    "find_domain": "registry.finding",
    "generate": "api",
    "installed_domains": "registry.finding",
    "load_segmenter": "segmenters",
    "mask_by_words": "segmenters",
    "open_image": "images",
    "personalize": "api",
    "pretrain": "api",
    "rehearse": "api",
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
    "PretrainedDomain",
    "PretrainingRecipe",
    "Progress",
    "ResourceError",
    "SUBJECT_TEMPLATES",
    "Sampling",
    "TuningRecipe",
    "UsageError",
    "WeightsUnavailable",
    "__version__",
    "center_square",
    "export",
    "find_domain",
    "generate",
    "installed_domains",
    "load_segmenter",
    "mask_by_words",
    "open_image",
    "personalize",
    "pretrain",
    "rehearse",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return __all__
