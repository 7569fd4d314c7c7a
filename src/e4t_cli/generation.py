"""Drawing a concept: a denoising loop with a fresh word embedding at every time step (section 3.1).

    z_t ─ U-Net encoder, "" ─> pooled features ─> E ─> e_c ─ text encoder ─> prompt ─> ε_θ

Under classifier-free guidance with an empty negative prompt the first arrow is half of the
unconditional branch, so the refinement costs 1 % of plain Stable Diffusion's work, not 33 %:
unconditional way down -> features -> embedding -> text -> conditional way down -> both ways up
in one batch. Everything about the picture and ΔW was folded into constants before the loop.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import diffusers
import torch
from PIL.Image import Image
from torch import Tensor

from .base_model import TextToImageModel, Tokens
from .concept import TunedModel
from .devices import free_memory
from .errors import UsageError
from .nn.unet_features import UNetState, decoder_half, encoder_half, pooled_features, stem
from .progress import Progress, ProgressCallback
from .prompts import Prompt

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

BATCH = 8
"""Pictures drawn together on an accelerator."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are drawn.

    Args:
        steps: denoising steps.
        guidance: weight of classifier-free guidance, 1 for none; None takes the base's own.
        scheduler: a key of `SCHEDULERS`, or the name of any scheduler class of diffusers.
        negative: what to steer away from. Anything but "" costs a separate feature pass.
    """

    steps: int = 20
    guidance: float | None = None
    scheduler: str = "dpm++"
    negative: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or not 1 <= self.steps <= 1000:
            raise UsageError(f"the number of denoising steps must be 1 to 1000, not {self.steps!r}")
        if self.guidance is not None and not 0 <= self.guidance <= 100:
            raise UsageError(f"the guidance must be 0 to 100, not {self.guidance!r}")
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


def sample(
    model: TextToImageModel,
    tuned: TunedModel,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    sampling: Sampling | None = None,
    *,
    batch: int | None = None,
    on_progress: ProgressCallback | None = None,
) -> Iterator[Image]:
    """Draw one picture for each prompt and its seed, in order, each as soon as it is done.

    A picture depends on its own prompt and seed only. On the CPU in float32 it is the same to the
    last bit alone and in any company, because pictures are drawn one by one: the products of
    matrices of other heights round differently. On accelerators `batch` pictures are drawn
    together, and company may change a picture by what rounding does.

    Args:
        model: the base that `tuned` was made from.
        tuned: from `tune`, or `TunedModel.plain(model, "face")` for the base's own idea of a face.
        prompts, seeds: of equal length.
        sampling: how.
        batch: pictures at a time; None is 1 on the CPU and 8 elsewhere.
        on_progress: called after each denoising step; done and total count steps of all pictures.
    """
    sampling = (sampling or Sampling()).resolved(model)
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts for {len(seeds)} seeds")
    size = batch or (1 if model.device.type == "cpu" else BATCH)
    # All at once, so that a prompt that cannot be read stops the first picture, not the last.
    tokens = model.tokenize(prompts, tuned.descriptor_id)
    return _pictures(model, tuned, tokens, list(seeds), sampling, size, on_progress)


def _pictures(
    model: TextToImageModel,
    tuned: TunedModel,
    tokens: Tokens,
    seeds: list[int],
    sampling: Sampling,
    size: int,
    on_progress: ProgressCallback | None,
) -> Iterator[Image]:
    # Some schedulers look twice in a step.
    steps = len(make_scheduler(model, sampling).timesteps)
    first = 0
    while first < len(seeds):
        some = slice(first, first + size)
        together = len(seeds[some])

        def report(done: int, before: int = first, together: int = together) -> None:
            if on_progress:
                on_progress(
                    Progress(
                        stage="generate",
                        done=before * steps + together * done,
                        total=len(seeds) * steps,
                    )
                )

        try:
            latents = _denoise(model, tuned, tokens[some], seeds[some], sampling, report)
            pictures = model.decode(latents)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = (size + 1) // 2
            free_memory(model.device)
            if on_progress:
                note = f"memory ran out: {size} pictures at a time from now on"
                on_progress(Progress(stage="generate", note=note))
            continue
        yield from pictures
        first += together


def generate_latents(
    model: TextToImageModel,
    tuned: TunedModel,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    sampling: Sampling | None = None,
) -> Tensor:
    """Return z_0 of pictures drawn as one batch, (batch, channels, height, width), in float32."""
    sampling = (sampling or Sampling()).resolved(model)
    tokens = model.tokenize(prompts, tuned.descriptor_id)
    return _denoise(model, tuned, tokens, seeds, sampling)


@torch.no_grad()
def _denoise(
    model: TextToImageModel,
    tuned: TunedModel,
    tokens: Tokens,
    seeds: Sequence[int],
    sampling: Sampling,
    report: Callable[[int], None] | None = None,
) -> Tensor:
    scheduler = make_scheduler(model, sampling)
    # On the CPU and one for each picture, so that a seed means the same everywhere.
    sources = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = [torch.randn(model.latent_shape, generator=source) for source in sources]
    z_t = torch.stack(noise).to(model.device) * scheduler.init_noise_sigma
    random = {"generator": sources} if _draws_noise(scheduler) else {}
    predict = _Predictor(model, tuned, tokens, sampling)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else it looks for t in its list, and a device has to stop
    for done, t in enumerate(scheduler.timesteps, start=1):
        prediction = predict(scheduler.scale_model_input(z_t, t).to(model.dtype), t)
        z_t = scheduler.step(prediction.float(), t, z_t, **random).prev_sample
        if report:
            report(done)
    return z_t


class _Predictor:
    """ε_θ of one batch of prompts under guidance, with e_c predicted anew from every z_t."""

    def __init__(
        self, model: TextToImageModel, tuned: TunedModel, tokens: Tokens, sampling: Sampling
    ) -> None:
        assert sampling.guidance is not None
        self.model, self.tuned, self.tokens = model, tuned, tokens
        self.guidance = sampling.guidance
        self.count = len(tokens.ids)
        self.empty = self._repeated(model.empty_text)
        if sampling.negative.strip():
            negative = model.tokenize([sampling.negative], tuned.descriptor_id)
            self.negative = self._repeated(model.embed_prompts(negative))
        else:
            self.negative = self.empty
        self.text = None if tuned.encoder.reads_unet else self._text(None)

    def __call__(self, z_t: Tensor, t: Tensor) -> Tensor:
        unet = self.tuned.unet
        # The stem sees no text: every pass below begins with it.
        start = stem(unet, z_t, t)
        unconditional = None
        if self.guidance != 1:
            unconditional = encoder_half(unet, start, self.negative)
        text = self.text if self.text is not None else self._refined(start, unconditional)
        conditional = encoder_half(unet, start, text)
        if unconditional is None:
            return decoder_half(unet, conditional, text)
        both = decoder_half(
            unet,
            UNetState.cat((unconditional, conditional)),
            torch.cat((self.negative, text)),
        )
        without, with_text = both.chunk(2)
        return without + self.guidance * (with_text - without)

    def _refined(self, start: UNetState, unconditional: UNetState | None) -> Tensor:
        """Look at z_t, predict e_c (eq. 1), and read the prompts with it."""
        looked = unconditional if self.negative is self.empty else None
        if looked is None:
            looked = encoder_half(self.tuned.unet, start, self.empty)
        return self._text(pooled_features(looked).float())

    def _text(self, features: Tensor | None) -> Tensor:
        e_c = self.tuned.embedding(features).expand(self.count, -1)
        return self.model.embed_prompts(self.tokens, e_c)

    def _repeated(self, text: Tensor) -> Tensor:
        return text.expand(self.count, -1, -1)


def make_scheduler(model: TextToImageModel, sampling: Sampling) -> Any:
    """Return a diffusers scheduler on the base's own noise schedule, its time steps set."""
    name, options = SCHEDULERS.get(sampling.scheduler, (sampling.scheduler, {}))
    scheduler = getattr(diffusers, name).from_config(model.noise_schedule.config, **options)
    scheduler.set_timesteps(sampling.steps, device=model.device)
    return scheduler


def _is_scheduler(name: str) -> bool:
    kind = getattr(diffusers, name, None) if name.isidentifier() else None
    return inspect.isclass(kind) and issubclass(kind, diffusers.SchedulerMixin)


def _draws_noise(scheduler: Any) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters
