"""How images are sampled: steps, guidance and the scheduler, all checked without torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from e4t_cli.errors import UsageError, printable

# Short name -> class of diffusers, and options beyond the base's noise schedule.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
# Further classes that diffusers lists as compatible with the noise schedule of Stable Diffusion, and options.
FURTHER: dict[str, dict[str, Any]] = {
    "LMSDiscreteScheduler": {},
    "DPMSolverSinglestepScheduler": {"lower_order_final": True},  # else it changes that itself, with a warning
    "KDPM2DiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "DEISMultistepScheduler": {},
}
# It lists these too, which cannot sample here.
UNUSABLE = {
    "DPMSolverSDEScheduler": "its noise is not drawn from the image's seed, and it needs torchsde",
    "EDMEulerScheduler": "it is for models trained with the preconditioning of EDM",
}
# Classes by name, with the options of the short name.
CLASSES = dict(SCHEDULERS.values()) | {"DPMSolverMultistepScheduler": {}} | FURTHER
NAMES = (*SCHEDULERS, *CLASSES)  # all that `--scheduler` takes
# Steps of these are a whole number of time steps long: of 600, each leaves two fifths of its noise in the image, of
# 334 (2.99 time steps, taken for 2) a third.
WHOLE_STRIDES = ("DDIMScheduler", "PNDMScheduler")
# With fewer steps these, which extrapolate from other steps, give noise on `mini` (judged on 16 pictures each).
LEAST = {
    "dpm++-karras": 5,
    "PNDMScheduler": 16,
    "HeunDiscreteScheduler": 4,
    "KDPM2DiscreteScheduler": 4,
    "KDPM2AncestralDiscreteScheduler": 10,
}
# The signal-to-noise ratio of the last time step can be zero in these only.
ZERO_SNR = (
    "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
TRAIN_TIMESTEPS = 1000  # of Stable Diffusion's noise schedule


def scheduler_class(name: str) -> tuple[str, dict[str, Any]]:
    """Return the class of diffusers, and its options.

    Raises:
        UsageError: there is no such scheduler, or it cannot sample here.
    """
    if name in SCHEDULERS:
        return SCHEDULERS[name]
    if name in CLASSES:
        return name, CLASSES[name]
    if name in UNUSABLE:
        raise UsageError(f"the scheduler {name} cannot be used: {UNUSABLE[name]}", hint="--scheduler dpm++")
    names = {one.casefold(): one for one in NAMES}
    near = difflib.get_close_matches(str(name).casefold(), names, n=1)
    guess = f"did you mean {names[near[0]]!r}? " if near else ""
    listed = f"one of {', '.join([*SCHEDULERS, *FURTHER])}"
    raise UsageError(f"there is no scheduler {printable(str(name))!r}", hint=guess + listed)


def has_zero_snr(noise_schedule: Mapping[str, Any]) -> bool:
    """Whether the last time step of a base's noise schedule (a scheduler's config) is pure noise."""
    return bool(noise_schedule.get("rescale_betas_zero_snr"))


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How images are sampled."""

    steps: int = 20  # of denoising
    guidance: float | None = None  # scale of classifier-free guidance, 1 for none; None takes the base's default
    scheduler: str = "dpm++"  # one of `NAMES`
    negative_prompt: str = ""  # in place of "" in the unconditional pass; costs a separate feature pass
    concept_scale: float = 1.0  # see `TunedModel.at_concept_scale`
    prompt_weights: bool = False  # read (word:1.2) and [word] as weights, in negative prompts too

    def __post_init__(self) -> None:
        name, _ = scheduler_class(self.scheduler)
        if not isinstance(self.steps, int) or not 1 <= self.steps <= TRAIN_TIMESTEPS:
            reason = f"the number of denoising steps must be 1 to {TRAIN_TIMESTEPS}, not {self.steps!r}"
            raise UsageError(reason, hint="--steps 20")
        self._check_steps(name, TRAIN_TIMESTEPS)
        if self.guidance is not None and not 0 <= self.guidance <= 100:
            raise UsageError(f"the guidance must be 0 to 100, not {self.guidance!r}", hint="--guidance 7.5")
        if not 0 <= self.concept_scale <= 2:
            raise UsageError(f"the concept scale must be 0 to 2, not {self.concept_scale!r}")
        if not isinstance(self.prompt_weights, bool):
            raise UsageError(f"prompt weights are on or off (True or False), not {self.prompt_weights!r}")

    def _check_steps(self, name: str, train_timesteps: int) -> None:
        least = LEAST.get(self.scheduler, LEAST.get(name, 1))
        most = train_timesteps // 2 if name in WHOLE_STRIDES else train_timesteps
        if not least <= self.steps <= most:
            bound = f"at least {least}" if self.steps < least else f"at most {most}"
            other = ", or another --scheduler" if least > 1 or name in WHOLE_STRIDES else ""
            message = f"the scheduler {self.scheduler} takes {bound} denoising steps here, not {self.steps}"
            raise UsageError(message, hint=f"--steps {bound.split()[-1]}{other}")
        stride = train_timesteps // self.steps
        if name in WHOLE_STRIDES and self.steps > 10 and self.steps * stride < 0.9 * train_timesteps:
            message = f"the scheduler {self.scheduler} cannot take {self.steps} denoising steps here: each would be"
            near = f"--steps {train_timesteps // (stride + 1)} or {train_timesteps // stride}"
            raise UsageError(f"{message} {train_timesteps / self.steps:.1f} time steps long", hint=near)

    def check_schedule(self, noise_schedule: Mapping[str, Any]) -> None:
        """Compare with the noise schedule of a base, the config of its scheduler.

        Raises:
            UsageError: it has fewer time steps, or the scheduler cannot follow it.
        """
        name, _ = scheduler_class(self.scheduler)
        self._check_steps(name, int(noise_schedule.get("num_train_timesteps", TRAIN_TIMESTEPS)))
        if has_zero_snr(noise_schedule) and name not in ZERO_SNR:
            shorts = [short for short, (kind, _) in SCHEDULERS.items() if kind in ZERO_SNR]
            message = f"the scheduler {self.scheduler} cannot follow this base, which begins at pure noise"
            raise UsageError(message, hint=f"--scheduler {', '.join(shorts[:-1])} or {shorts[-1]}")

    def resolved(self, model: Any) -> SamplingConfig:
        """Return the config with the guidance of a `TextToImageModel` where none is given, compared with its schedule.

        Raises:
            UsageError: as `check_schedule`.
        """
        self.check_schedule(model.noise_schedule.config)
        return replace(self, guidance=model.base.guidance) if self.guidance is None else self

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for records."""
        return asdict(self)
