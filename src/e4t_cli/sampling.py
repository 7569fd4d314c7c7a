"""Samples images of a concept, with any scheduler of diffusers (section 3.1).

The denoising loop is diffusers'; the concept's embedding is predicted anew at every time step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import diffusers
import torch
from PIL.Image import Image
from torch import Tensor

from e4t_cli.devices import captures_graphs, free_memory, memory_ran_out
from e4t_cli.errors import UsageError
from e4t_cli.models.denoiser import CFGDenoiser, TunedModel
from e4t_cli.models.prompt_embedding import Tokens
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.prompts import Prompt
from e4t_cli.training.cuda_graphs import CudaGraphRunner

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
BATCH = 8  # images sampled together on an accelerator


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How images are sampled."""

    steps: int = 20  # of denoising
    guidance: float | None = None  # scale of classifier-free guidance, 1 for none; None takes the base's default
    scheduler: str = "dpm++"  # a key of `SCHEDULERS`, or the name of any scheduler class of diffusers
    negative_prompt: str = ""  # in place of "" in the unconditional pass; costs a separate feature pass
    concept_scale: float = 1.0  # see `TunedModel.at_concept_scale`

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or not 1 <= self.steps <= 1000:
            raise UsageError(f"the number of denoising steps must be 1 to 1000, not {self.steps!r}")
        if self.guidance is not None and not 0 <= self.guidance <= 100:
            raise UsageError(f"the guidance must be 0 to 100, not {self.guidance!r}")
        if not 0 <= self.concept_scale <= 2:
            raise UsageError(f"the concept scale must be 0 to 2, not {self.concept_scale!r}")
        if self.scheduler not in SCHEDULERS and not _is_scheduler(self.scheduler):
            hint = f"one of {', '.join(SCHEDULERS)}, or a scheduler class of diffusers"
            raise UsageError(f"there is no scheduler {self.scheduler!r}", hint=hint)

    def resolved(self, model: TextToImageModel) -> SamplingConfig:
        """Return the config with the base's guidance where none is given."""
        return replace(self, guidance=model.base.guidance) if self.guidance is None else self

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for records."""
        return asdict(self)


def make_scheduler(model: TextToImageModel, sampling: SamplingConfig) -> Any:
    """Return a diffusers scheduler on the base's noise schedule, its time steps set.

    They are on the CPU, as its tables are: a lookup with a value on a GPU would synchronize in each step.
    """
    name, options = SCHEDULERS.get(sampling.scheduler, (sampling.scheduler, {}))
    scheduler = getattr(diffusers, name).from_config(model.noise_schedule.config, **options)
    scheduler.set_timesteps(sampling.steps)
    return scheduler


def _is_scheduler(name: str) -> bool:
    kind = getattr(diffusers, name, None) if name.isidentifier() else None
    return inspect.isclass(kind) and issubclass(kind, diffusers.SchedulerMixin)


def sample(
    model: TextToImageModel, tuned: TunedModel, prompts: Sequence[Prompt], seeds: Sequence[int],
    sampling: SamplingConfig | None = None,
    *, batch: int | None = None, on_progress: ProgressCallback | None = None,
) -> Iterator[Image]:  # fmt: skip
    """Sample one image for each prompt and its seed, in order, each as soon as it is done.

    An image depends on its prompt and seed only. On the CPU in float32 it is the same to the last bit in any batch,
    because images are sampled one by one: matrix multiplications of other shapes round differently. On accelerators
    `batch` images are sampled together, and the batch may change an image within rounding.

    Args:
        model: the base that `tuned` was made from; for a concept scale other than 1 with its U-Net before tuning.
        tuned: from `tune`, or `TunedModel.plain(model, "face")` for the base without a concept.
        prompts, seeds: of equal length.
        batch: images at a time; None is 1 on the CPU and 8 elsewhere.
        on_progress: called after each denoising step; done and total count steps of all images.
    """
    sampling = (sampling or SamplingConfig()).resolved(model)
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts for {len(seeds)} seeds")
    tuned = tuned.at_concept_scale(model.unet, sampling.concept_scale)
    size = batch or (1 if model.device.type == "cpu" else BATCH)
    # All at once, so that a prompt that is too long raises before the first image.
    tokens = model.tokenize(prompts, tuned.descriptor_id)
    return _images(model, tuned, tokens, list(seeds), sampling, size, on_progress)


def _images(
    model: TextToImageModel, tuned: TunedModel, tokens: Tokens, seeds: list[int],
    sampling: SamplingConfig, size: int, on_progress: ProgressCallback | None,
) -> Iterator[Image]:  # fmt: skip
    # Some schedulers evaluate the U-Net twice in a step.
    steps = len(make_scheduler(model, sampling).timesteps)
    first = 0
    while first < len(seeds):
        some = slice(first, first + size)
        together = len(seeds[some])

        def report(done: int, note: str = "", first: int = first, together: int = together) -> None:
            if on_progress:
                done, total = first * steps + together * done, len(seeds) * steps
                on_progress(Progress(stage="generate", done=done, total=total, note=note))

        images = None
        try:
            images = model.decode(denoise(model, tuned, tokens[some], seeds[some], sampling, report))
        except (MemoryError, RuntimeError) as error:
            if size == 1 or not memory_ran_out(error):
                raise
        if images is None:  # not in the handler: the error's traceback keeps all tensors
            size = (size + 1) // 2
            free_memory(model.device)
            if on_progress:
                on_progress(Progress(stage="generate", note=f"out of memory: {size} images at a time from now on"))
            continue
        yield from images
        first += together


def generate_latents(
    model: TextToImageModel, tuned: TunedModel, prompts: Sequence[Prompt], seeds: Sequence[int],
    sampling: SamplingConfig | None = None,
) -> Tensor:  # fmt: skip
    """Return z_0 of images sampled as one batch, (batch, channels, height, width), in float32."""
    sampling = (sampling or SamplingConfig()).resolved(model)
    tuned = tuned.at_concept_scale(model.unet, sampling.concept_scale)
    tokens = model.tokenize(prompts, tuned.descriptor_id)
    return denoise(model, tuned, tokens, seeds, sampling)


@torch.no_grad()
def denoise(
    model: TextToImageModel, tuned: TunedModel, tokens: Tokens, seeds: Sequence[int],
    sampling: SamplingConfig, report: Callable[..., None] | None = None,
) -> Tensor:  # fmt: skip
    scheduler = make_scheduler(model, sampling)
    # On the CPU and one for each image, so that a seed gives the same noise everywhere.
    sources = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = [torch.randn(model.latent_shape, generator=source) for source in sources]
    z_t: Tensor = torch.stack(noise).to(model.device) * scheduler.init_noise_sigma
    random = {"generator": sources} if "generator" in inspect.signature(scheduler.step).parameters else {}
    assert sampling.guidance is not None, "resolve the sampling config first"
    denoiser = CFGDenoiser(model, tuned, tokens, guidance=sampling.guidance, negative_prompt=sampling.negative_prompt)
    predict: Callable[..., Tensor] = denoiser
    if captures_graphs(model.device):
        on_trouble = partial(report, 0) if report else None
        predict = CudaGraphRunner(denoiser, model.device, calls=len(scheduler.timesteps), on_trouble=on_trouble)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else it searches t in its list, which synchronizes
    on_device = scheduler.timesteps.to(model.device)  # at once: each copy would synchronize
    for done, t in enumerate(scheduler.timesteps, start=1):
        noisy = scheduler.scale_model_input(z_t, t).to(tuned.unet.dtype)
        prediction = predict(noisy, on_device[done - 1])
        z_t = scheduler.step(prediction.float(), t, z_t, **random).prev_sample
        if report:
            report(done)
    return z_t
