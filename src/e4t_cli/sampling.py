"""Samples images of a concept, with any scheduler of diffusers (section 3.1).

The denoising loop is diffusers'; the concept's embedding is predicted anew at every time step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import diffusers
import torch
from PIL.Image import Image
from torch import Tensor

from e4t_cli.devices import SMALL, captures_graphs, free_memory
from e4t_cli.models.denoiser import CFGDenoiser, TunedModel
from e4t_cli.models.prompt_embedding import Tokens
from e4t_cli.models.text_to_image import DECODED_PIXELS, TextToImageModel
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.prompts import Prompt, parse_negative_prompt
from e4t_cli.schedulers import SamplingConfig, has_zero_snr, scheduler_class
from e4t_cli.system_memory import memory_ran_out
from e4t_cli.training.cuda_graphs import CudaGraphRunner

FEW_STEPS = 4  # up to which a step at t = 0 is too many
BATCH = 8  # images sampled together on an accelerator
CHUNK = 4  # of a small base on a CPU: 8 gain 6 % more, and one image alone would cost twice as much again


def make_scheduler(model: TextToImageModel, sampling: SamplingConfig) -> Any:
    """Return a diffusers scheduler on the base's noise schedule, its time steps set.

    They are on the CPU, as its tables are: a lookup with a value on a GPU would synchronize in each step.

    The time steps have the base's spacing (of `load_noise_schedule`), else the scheduler's, except where that gives
    another image than it should: few steps that end with one at t = 0 (a single one only begins there), and those that
    begin much before the last time step, as if the noise there were all of it: "leading" with 5 steps begins at 800,
    with 334, which are 2 apart, at 666. "trailing" begins at the last time step; rounding gives some numbers of steps,
    as 61, a further time step of -1, and "linspace" is right for those.
    """
    name, options = scheduler_class(sampling.scheduler)
    kind, config = getattr(diffusers, name), model.noise_schedule.config
    total, steps = model.train_timesteps, sampling.steps
    usual = steps <= total // 2 and not has_zero_snr(config)
    for spacing in ("", "trailing", "linspace") if usual else ("trailing", "linspace"):
        scheduler = kind.from_config(config, **options, **({"timestep_spacing": spacing} if spacing else {}))
        scheduler.set_timesteps(steps)
        begin, end = int(scheduler.timesteps.max()), int(scheduler.timesteps.min())
        whole = begin >= total * 9 // 10 and (steps > FEW_STEPS or end > total // 10)
        if end >= 0 and (spacing or whole):
            break
    return scheduler


def sample(
    model: TextToImageModel, tuned: TunedModel, prompts: Sequence[Prompt], seeds: Sequence[int],
    sampling: SamplingConfig | None = None,
    *, batch: int | None = None, on_progress: ProgressCallback | None = None,
) -> Iterator[Image]:  # fmt: skip
    """Sample one image for each prompt and its seed, in order, each as soon as it is done.

    An image depends on its prompt and seed only. On a CPU it is the same to the last bit alone and among others, for
    one number of threads: products of matrices of other shapes round differently, so all are computed in one shape.
    Images of a small base, whose operations cost more to start than to compute, are sampled `CHUNK` at a time, and the
    last chunk is filled up with copies of its last image; those of a large base are sampled one by one. Elsewhere, and
    where `batch` is given, images are sampled together without copies, which may change an image within rounding.

    Args:
        model: the base that `tuned` was made from; for a concept scale other than 1 with its U-Net before tuning.
        tuned: from `tune`, or `TunedModel.plain(model, "face")` for the base without a concept.
        prompts, seeds: of equal length.
        batch: images at a time; None is 4 or 1 on a CPU, by the size of the base, and 8 elsewhere.
        on_progress: called after each denoising step; done and total count steps of all images.
    """
    sampling = (sampling or SamplingConfig()).resolved(model)
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts for {len(seeds)} seeds")
    tuned = tuned.at_concept_scale(model.unet, sampling.concept_scale)
    size = batch or images_at_once(model)
    whole = batch is None and model.device.type == "cpu"
    # All at once, so that a prompt that is too long raises before the first image.
    tokens = _tokenize(model, tuned, prompts, sampling)
    return _images(model, tuned, tokens, list(seeds), sampling, size, whole, on_progress)


def images_at_once(model: TextToImageModel) -> int:
    """Return how many images of a base are sampled together on its device."""
    if model.device.type != "cpu":
        return BATCH
    # Large bases and large images keep all cores busy one by one, and take a quarter of the memory.
    small = sum(weight.numel() for weight in model.unet.parameters()) < SMALL
    return CHUNK if small and CHUNK * model.resolution**2 <= DECODED_PIXELS else 1


def _images(
    model: TextToImageModel, tuned: TunedModel, tokens: Tokens, seeds: list[int],
    sampling: SamplingConfig, size: int, whole: bool, on_progress: ProgressCallback | None,
) -> Iterator[Image]:  # fmt: skip
    """Sample `size` images at a time; `whole` fills up the last ones to as many."""
    # Some schedulers evaluate the U-Net twice in a step.
    steps = len(make_scheduler(model, sampling).timesteps)
    first = 0
    while first < len(seeds):
        some = slice(first, first + size)
        together = len(seeds[some])
        rows = [*range(first, first + together)]
        if whole:
            rows += rows[-1:] * (size - together)

        def report(done: int, note: str = "", first: int = first, together: int = together) -> None:
            if on_progress:
                done, total = first * steps + together * done, len(seeds) * steps
                on_progress(Progress(stage="generate", done=done, total=total, note=note))

        images = None
        try:
            chosen = tokens[torch.tensor(rows, device=model.device)]
            latents = denoise(model, tuned, chosen, [seeds[row] for row in rows], sampling, report)[:together]
            # One by one they are the same in any company, too, and no copy is decoded.
            parts = torch.split(latents, 1) if whole else [latents]
            images = [image for part in parts for image in model.decode(part)]
        except (MemoryError, RuntimeError) as error:
            if size == 1 or not memory_ran_out(error):
                raise
        if images is None:  # not in the handler: the error's traceback keeps all tensors
            size = (size + 1) // 2
            free_memory(model.device)
            if on_progress:
                note = f"out of memory: {size} at a time from now on, which may change images within rounding"
                on_progress(Progress(stage="generate", note=note))
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
    tokens = _tokenize(model, tuned, prompts, sampling)
    return denoise(model, tuned, tokens, seeds, sampling)


def _tokenize(
    model: TextToImageModel, tuned: TunedModel, prompts: Sequence[Prompt], sampling: SamplingConfig
) -> Tokens:
    read = [one.weighted() for one in prompts] if sampling.prompt_weights else prompts
    return model.tokenize(read, tuned.descriptor_id)


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
    negative: Prompt | str = sampling.negative_prompt
    if negative and sampling.prompt_weights:
        negative = parse_negative_prompt(sampling.negative_prompt, "", weights=True)
    denoiser = CFGDenoiser(model, tuned, tokens, guidance=sampling.guidance, negative_prompt=negative)
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
