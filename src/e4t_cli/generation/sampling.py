"""How pictures are drawn: steps, guidance, and any scheduler of diffusers."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass, replace
from typing import Any

import diffusers

from e4t_cli.base_model import TextToImageModel
from e4t_cli.errors import UsageError

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
"""Short name -> class of diffusers and what it is to be told beyond the base's own schedule."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are drawn.

    Args:
        steps: denoising steps.
        guidance: weight of classifier-free guidance, 1 for none; None takes the base's own.
        scheduler: a key of `SCHEDULERS`, or the name of any scheduler class of diffusers.
        negative: what to steer away from. Anything but "" costs a separate feature pass.
        strength: how much of what was learned is drawn; see `TunedModel.at_strength`.
    """

    steps: int = 20
    guidance: float | None = None
    scheduler: str = "dpm++"
    negative: str = ""
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or not 1 <= self.steps <= 1000:
            raise UsageError(f"the number of denoising steps must be 1 to 1000, not {self.steps!r}")
        if self.guidance is not None and not 0 <= self.guidance <= 100:
            raise UsageError(f"the guidance must be 0 to 100, not {self.guidance!r}")
        if not 0 <= self.strength <= 2:
            raise UsageError(f"the strength must be 0 to 2, not {self.strength!r}")
        if self.scheduler not in SCHEDULERS and not _is_scheduler(self.scheduler):
            raise UsageError(
                f"there is no scheduler {self.scheduler!r}",
                hint=f"one of {', '.join(SCHEDULERS)}, or a scheduler class of diffusers",
            )

    def resolved(self, model: TextToImageModel) -> Sampling:
        """Return what will really be done with this base."""
        if self.guidance is not None:
            return self
        return replace(self, guidance=model.base.guidance)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for records."""
        return asdict(self)


def make_scheduler(model: TextToImageModel, sampling: Sampling) -> Any:
    """Return a diffusers scheduler on the base's own noise schedule, its time steps set.

    They are on the CPU, where its tables are: looked up with a number from a card, each step
    would wait for everything before it.
    """
    name, options = SCHEDULERS.get(sampling.scheduler, (sampling.scheduler, {}))
    scheduler = getattr(diffusers, name).from_config(model.noise_schedule.config, **options)
    scheduler.set_timesteps(sampling.steps)
    return scheduler


def _is_scheduler(name: str) -> bool:
    kind = getattr(diffusers, name, None) if name.isidentifier() else None
    return inspect.isclass(kind) and issubclass(kind, diffusers.SchedulerMixin)


def draws_noise(scheduler: Any) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters
