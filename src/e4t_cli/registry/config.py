"""The numbers of the method as values: how a concept is tuned, how a domain is pre-trained.

Part of the contract with a domain's author (`domain`), who states them; a pack brings its own.

How long pre-training takes before anybody has started it: counted work over assumed speed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self


def check_number(
    owner: object, name: str, *, above: float = -math.inf, least: float = -math.inf
) -> None:
    """Hold a number of a value to its range; ValueError says what is wrong with it."""
    value = getattr(owner, name)
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not math.isfinite(value) or value <= above or value < least:
        bound = f"above {above:g}" if above > -math.inf else f"{least:g} or more"
        raise ValueError(f"{type(owner).__name__}.{name} must be {bound}, not {value!r}")


def check_whole(owner: object, name: str, *, least: int) -> None:
    """Hold a whole number of a value to its least; ValueError says what is wrong with it."""
    value = getattr(owner, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(
            f"{type(owner).__name__}.{name} must be a whole number, {least} or more, not {value!r}"
        )


_KEYS_IN_FILES = {
    "reg_weight": "embedding_penalty",
    "lora_rank": "adapter_rank",
    "lora_rate": "adapters_rate",
}
_METHODS_IN_FILES = {"full": "exact", "lora": "adapters"}
"""Keys and values of version 0.1 files, which stay as they are."""


class _Config:
    """What both recipes can do; the numbers are in the children."""

    base_learning_rate: float
    batch_size: int

    @property
    def learning_rate(self) -> float:
        """Effective learning rate: base × batch × processes, with one process (section 3.5)."""
        return self.base_learning_rate * self.batch_size

    def as_dict(self) -> dict[str, Any]:
        """Return plain values under the keys that files use, ready for TOML or JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        if "method" in values:
            values["method"] = _METHODS_IN_FILES[values["method"]]
        return {_KEYS_IN_FILES.get(name, name): value for name, value in values.items()}

    @classmethod
    def from_dict(cls, numbers: Mapping[str, Any]) -> Self:
        """Rebuild a recipe from `as_dict()`.

        Raises:
            ValueError: a key is unknown or missing, or a number is out of range.
        """
        names = {_KEYS_IN_FILES.get(f.name, f.name): f.name for f in fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(numbers) - names.keys())
        if unknown:
            raise ValueError(f"{cls.__name__} has no field {', '.join(map(repr, unknown))}")
        values = {names[key]: value for key, value in numbers.items()}
        methods = {stored: method for method, stored in _METHODS_IN_FILES.items()}
        if "method" in values:
            values["method"] = methods.get(values["method"], values["method"])
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"{cls.__name__}: {error}") from error

    def replace(self, **overrides: Any) -> Self:
        """Return a copy with some numbers changed; unknown names are refused."""
        return replace(self, **overrides)  # type: ignore[type-var]


TUNING_METHODS = ("full", "lora")
"""How a concept may be tuned, the paper's way first."""


@dataclass(frozen=True, kw_only=True)
class TuningConfig(_Config):
    """The numbers of inference-time personalization (section 3.4 and 3.5).

    Args:
        steps: optimiser steps on the one image; 0 keeps the encoder's guess as it is.
        base_learning_rate: before scaling by the batch, as the paper states it.
        reg_weight: λ_r of eq. 5.
        batch_size: time steps seen at once; the paper calls 16 or more crucial (section 3.4).
        gradient_clip: largest norm of the gradient.
        mask: whether the domain's mask restricts the diffusion loss.
        encoder_rate, offsets_rate, unet_rate: factors on the learning rate of each group of
            weights; 0 freezes the group. 1 is the paper; anything else is a pack's departure.
        method: "full" tunes every weight, as the paper does; "lora" leaves the base as it is
            and tunes low-rank changes of its attention layers and of the encoder.
        lora_rank: of those changes.
        lora_rate: a further factor on the learning rate of adapters, which start at nothing
            and have to go further than weights do. Paper silent: measured on `mini`
            (`python -m mini_world.methods face --rates 18 36 60`), where 60 keeps most of a face.
    """

    steps: int
    base_learning_rate: float
    reg_weight: float
    batch_size: int = 16
    gradient_clip: float = 1.0
    mask: bool = False
    encoder_rate: float = 1.0
    offsets_rate: float = 1.0
    unet_rate: float = 1.0
    method: str = "full"
    lora_rank: int = 8
    lora_rate: float = 60.0

    def __post_init__(self) -> None:
        check_whole(self, "steps", least=0)
        check_whole(self, "batch_size", least=1)
        check_whole(self, "lora_rank", least=1)
        check_number(self, "base_learning_rate", above=0)
        check_number(self, "gradient_clip", above=0)
        for name in (
            "reg_weight", "encoder_rate", "offsets_rate", "unet_rate", "lora_rate"
        ):  # fmt: skip
            check_number(self, name, least=0)
        if self.method not in TUNING_METHODS:
            methods = " or ".join(map(repr, TUNING_METHODS))
            raise ValueError(f"TuningConfig.method must be {methods}, not {self.method!r}")
        if not isinstance(self.mask, bool):
            raise ValueError(f"TuningConfig.mask must be True or False, not {self.mask!r}")


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig(_Config):
    """The numbers of domain pre-training (section 3.3 and 3.5).

    Args:
        steps: optimiser steps over the domain's images.
        base_learning_rate: before scaling by the batch.
        reg_weight: λ_r of eq. 5.
        batch_size: different images per step.
        embedding_scale: s of eq. 1; tuning and generation use the same one.
        mask: whether the domain's mask restricts the diffusion loss (the paper: only in tuning).
        encoder_rate, offsets_rate: factors on the learning rate of each group of weights.
    """

    steps: int
    base_learning_rate: float = 1e-6  # section 3.5
    reg_weight: float = 0.01  # section 3.3
    batch_size: int = 16  # section 3.5
    embedding_scale: float = 0.1  # section 3.1, eq. 1
    mask: bool = False
    encoder_rate: float = 1.0
    offsets_rate: float = 1.0

    def __post_init__(self) -> None:
        check_whole(self, "steps", least=1)
        check_whole(self, "batch_size", least=1)
        for name in ("base_learning_rate", "embedding_scale"):
            check_number(self, name, above=0)
        for name in ("reg_weight", "encoder_rate", "offsets_rate"):
            check_number(self, name, least=0)
        if not isinstance(self.mask, bool):
            raise ValueError(f"PretrainingConfig.mask must be True or False, not {self.mask!r}")


# Forward and backward of one 512-pixel picture with only W_q, W_k, W_v and offsets in training,
# counted on Stable Diffusion 1.4's configs; the pictures were looked at beforehand (pretraining/):
#   U-Net 1.768 + feature pass 0.576 + text encoder 0.027 = 2.371 TFLOP
TFLOP_PER_PICTURE = 1.768 + 0.576 + 0.027
COUNTED_AT = 512
# bfloat16 matrix products, TFLOP per second: the H200's measured, the A100's from published runs.
SPEEDS = {"A100": 250.0, "H200": 790.0}
SHARE = 0.5  # of that speed which a training loop reaches


def pretraining_hours(config: PretrainingConfig, gpu: str, resolution: int = COUNTED_AT) -> float:
    """Return the hours of one GPU that a recipe takes on a Stable Diffusion, an estimate.

    face: 30,000 steps × 16 × 2.371 TFLOP = 1.14e6 TFLOP; ÷ (0.5 × 250) = 9,100 s = 2.5 A100 hours.

    Args:
        resolution: side of the pictures; work is taken to grow with their area, though attention
            grows faster.
    """
    area = (resolution / COUNTED_AT) ** 2
    work = config.steps * config.batch_size * TFLOP_PER_PICTURE * area
    return work / (SHARE * SPEEDS[gpu]) / 3600


def shown_hours(config: PretrainingConfig, resolution: int = COUNTED_AT) -> str:
    """Return the estimate as a phrase: "about 5.1 hours of an A100, 1.6 of an H200"."""
    first, *others = (
        f"{pretraining_hours(config, gpu, resolution):.1f} of an {gpu}" for gpu in SPEEDS
    )
    return ", ".join([f"about {first.replace(' of', ' hours of')}", *others])
