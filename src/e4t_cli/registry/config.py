"""The hyperparameters of tuning and of domain pre-training, as validated values.

Part of the contract with the author of a domain (`registry.domain`), who states them; domain weights bring the ones
that they were made with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


def check_number(owner: object, name: str, *, above: float = -math.inf, minimum: float = -math.inf) -> None:
    """Check that an attribute is a finite number in its range, or raise ValueError."""
    value = getattr(owner, name)
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not math.isfinite(value) or value <= above or value < minimum:
        bound = f"above {above:g}" if above > -math.inf else f"{minimum:g} or more"
        raise ValueError(f"{type(owner).__name__}.{name} must be {bound}, not {value!r}")


def check_integer(owner: object, name: str, *, minimum: int) -> None:
    """Check that an attribute is an integer of at least `minimum`, or raise ValueError."""
    value = getattr(owner, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{type(owner).__name__}.{name} must be a whole number, {minimum} or more, not {value!r}")


def check_bool(owner: object, name: str) -> None:
    """Check that an attribute is a bool, or raise ValueError."""
    if not isinstance(value := getattr(owner, name), bool):
        raise ValueError(f"{type(owner).__name__}.{name} must be True or False, not {value!r}")


# Keys and values of files since version 0.1, which stay as they are.
KEYS_IN_FILES = {"reg_weight": "embedding_penalty", "lora_rank": "adapter_rank", "lora_rate": "adapters_rate"}
METHODS_IN_FILES = {"full": "exact", "lora": "adapters"}


class _Config:
    """What both configurations, which are dataclasses, can do."""

    base_learning_rate: float
    batch_size: int

    @property
    def learning_rate(self) -> float:
        """Effective learning rate: base × batch × processes, with one process (section 3.5)."""
        return self.base_learning_rate * self.batch_size

    def as_dict(self) -> dict[str, Any]:
        """Return plain values under the keys that files use, ready for TOML or JSON."""
        values = {KEYS_IN_FILES.get(name, name): value for name, value in vars(self).items()}
        if "method" in values:
            values["method"] = METHODS_IN_FILES[values["method"]]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild a configuration from `as_dict()`; ValueError for unknown or missing keys and invalid values."""
        names = {KEYS_IN_FILES.get(name, name): name for name in cls.__annotations__}
        if unknown := sorted(set(values) - names.keys()):
            raise ValueError(f"{cls.__name__} has no field {', '.join(map(repr, unknown))}")
        arguments = {names[key]: value for key, value in values.items()}
        methods = {stored: method for method, stored in METHODS_IN_FILES.items()}
        if "method" in arguments:
            arguments["method"] = methods.get(arguments["method"], arguments["method"])
        try:
            return cls(**arguments)
        except TypeError as error:
            raise ValueError(f"{cls.__name__}: {error}") from error

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed; unknown names raise TypeError."""
        return type(self)(**{**vars(self), **changes})


TUNING_METHODS = ("full", "lora")  # the paper's first


@dataclass(frozen=True, kw_only=True)
class TuningConfig(_Config):
    """Hyperparameters of inference-time tuning (sections 3.4 and 3.5).

    Args:
        steps: optimizer steps on the one image; 0 keeps the encoder's prediction as it is.
        base_learning_rate: before scaling by the batch, as the paper states it.
        reg_weight: λ_r of eq. 5.
        batch_size: time steps per optimizer step; the paper calls 16 or more crucial (section 3.4).
        gradient_clip: maximum norm of the gradient.
        mask: whether the domain's mask restricts the diffusion loss.
        encoder_rate, offsets_rate, unet_rate: factors on the learning rate of each parameter group; 0 freezes the
            group, 1 is the paper.
        method: "full" tunes all weights, as the paper does; "lora" freezes the base and tunes LoRA adapters of its
            attention layers and of the encoder.
        lora_rank: rank of the adapters.
        lora_rate: a further factor on the learning rate of the adapters, which start at zero and need larger steps
            than weights do. Paper silent: measured on `mini` (`python -m mini_world.methods face --rates 18 36 60`),
            where 60 keeps most of a face.
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
        check_integer(self, "steps", minimum=0)
        for name in ("batch_size", "lora_rank"):
            check_integer(self, name, minimum=1)
        for name in ("base_learning_rate", "gradient_clip"):
            check_number(self, name, above=0)
        for name in ("reg_weight", "encoder_rate", "offsets_rate", "unet_rate", "lora_rate"):
            check_number(self, name, minimum=0)
        check_bool(self, "mask")
        if self.method not in TUNING_METHODS:
            methods = " or ".join(map(repr, TUNING_METHODS))
            raise ValueError(f"TuningConfig.method must be {methods}, not {self.method!r}")


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig(_Config):
    """Hyperparameters of domain pre-training (sections 3.3 and 3.5).

    Args:
        steps: optimizer steps over the domain's images.
        base_learning_rate: before scaling by the batch.
        reg_weight: λ_r of eq. 5.
        batch_size: different images per step.
        embedding_scale: s of eq. 1; tuning and generation use the same one.
        mask: whether the domain's mask restricts the diffusion loss (the paper: only in tuning).
        encoder_rate, offsets_rate: factors on the learning rate of each parameter group; 1 is the paper. Departure:
            the shipped weights for `mini` have offsets_rate = 0.01, because their encoder learns at 1e-3, and 1/100 of
            it keeps the offsets near the paper's 1.6e-5 (no comparison of rates is recorded; mini_world/domains.py).
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
        for name in ("steps", "batch_size"):
            check_integer(self, name, minimum=1)
        for name in ("base_learning_rate", "embedding_scale"):
            check_number(self, name, above=0)
        for name in ("reg_weight", "encoder_rate", "offsets_rate"):
            check_number(self, name, minimum=0)
        check_bool(self, "mask")


# Forward and backward of one 512-pixel image with W_q, W_k, W_v and the offsets trainable, counted on the configs of
# Stable Diffusion 1.4; images are encoded beforehand (pretraining/):
#   U-Net 1.768 + feature pass 0.576 + text encoder 0.027 = 2.371 TFLOP
_TFLOP_PER_IMAGE = 1.768 + 0.576 + 0.027
# bfloat16 matrix multiplications, TFLOP per second: A100 from published runs, H200 measured.
_A100, _H200 = 250.0, 790.0
_UTILIZATION = 0.5  # of that speed, in a training loop


def format_hours(config: PretrainingConfig, resolution: int = 512) -> str:
    """Return an estimate of how long pre-training on a Stable Diffusion takes: "about 2.5 hours of an A100, …".

    face: 30,000 steps × 16 × 2.371 TFLOP = 1.14e6 TFLOP; ÷ (0.5 × 250) = 9,100 s = 2.5 A100 hours.

    Args:
        config: its steps and batch size count.
        resolution: side of the images in pixels; the work is taken to grow with their area, though attention grows
            faster.
    """
    work = config.steps * config.batch_size * _TFLOP_PER_IMAGE * (resolution / 512) ** 2
    a100, h200 = (work / (_UTILIZATION * speed) / 3600 for speed in (_A100, _H200))
    return f"about {a100:.1f} hours of an A100, {h200:.1f} of an H200"
