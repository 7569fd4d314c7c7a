"""Drawing a concept: a denoising loop, a fresh word embedding at every time step (section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from PIL.Image import Image
from torch import Tensor

from e4t_cli.base_model import TextToImageModel, Tokens
from e4t_cli.devices import free_memory, memory_ran_out
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.prompts import Prompt
from e4t_cli.recording import Recording
from e4t_cli.tuned_model import TunedModel

from .guidance import Predictor
from .sampling import Sampling, draws_noise, make_scheduler

BATCH = 8
"""Pictures drawn together on an accelerator."""


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
        model: the base that `tuned` was made from; for another strength than 1 with its U-Net
            as it was.
        tuned: from `tune`, or `TunedModel.plain(model, "face")` for the base's own idea of a face.
        prompts, seeds: of equal length.
        sampling: how.
        batch: pictures at a time; None is 1 on the CPU and 8 elsewhere.
        on_progress: called after each denoising step; done and total count steps of all pictures.
    """
    sampling = (sampling or Sampling()).resolved(model)
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts for {len(seeds)} seeds")
    tuned = tuned.at_strength(model.unet, sampling.strength)
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

        def report(
            done: int, note: str = "", before: int = first, together: int = together
        ) -> None:
            if on_progress:
                on_progress(
                    Progress(
                        stage="generate",
                        done=before * steps + together * done,
                        total=len(seeds) * steps,
                        note=note,
                    )
                )

        pictures = None
        try:
            latents = denoise(model, tuned, tokens[some], seeds[some], sampling, report)
            pictures = model.decode(latents)
        except (MemoryError, RuntimeError) as error:
            if size == 1 or not memory_ran_out(error):
                raise
        if pictures is None:  # only here: the error would keep all that was computed
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
    tuned = tuned.at_strength(model.unet, sampling.strength)
    tokens = model.tokenize(prompts, tuned.descriptor_id)
    return denoise(model, tuned, tokens, seeds, sampling)


@torch.no_grad()
def denoise(
    model: TextToImageModel,
    tuned: TunedModel,
    tokens: Tokens,
    seeds: Sequence[int],
    sampling: Sampling,
    report: Callable[..., None] | None = None,
) -> Tensor:
    scheduler = make_scheduler(model, sampling)
    # On the CPU and one for each picture, so that a seed means the same everywhere.
    sources = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = [torch.randn(model.latent_shape, generator=source) for source in sources]
    z_t = torch.stack(noise).to(model.device) * scheduler.init_noise_sigma
    random = {"generator": sources} if draws_noise(scheduler) else {}
    predict = Recording(
        Predictor(model, tuned, tokens, sampling), model.device, calls=len(scheduler.timesteps),
        on_trouble=partial(report, 0) if report else None,
    )  # fmt: skip
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else it looks for t in its list, and a device has to stop
    there = scheduler.timesteps.to(model.device)  # all at once: each copy would be a wait
    for done, t in enumerate(scheduler.timesteps, start=1):
        noisy = scheduler.scale_model_input(z_t, t).to(tuned.unet.dtype)
        prediction = predict(noisy, there[done - 1])
        z_t = scheduler.step(prediction.float(), t, z_t, **random).prev_sample
        if report:
            report(done)
    return z_t
