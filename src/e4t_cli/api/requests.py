"""Resolves what images are wanted: prompts, seeds, sampling and tuning configs. Nothing here imports torch."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from e4t_cli.api.session import ImageRequest
from e4t_cli.errors import UsageError, printable
from e4t_cli.prompts import Prompt, PromptRequest, parse_negative_prompt, parse_prompt, plain_text
from e4t_cli.registry.config import TUNING_METHODS, PretrainingConfig, TuningConfig
from e4t_cli.schedulers import SamplingConfig

Prompts = str | PromptRequest | Sequence[str | PromptRequest]
MAX_SEED = 2**32 - 1  # the largest that other programs' metadata readers take

# Of a new domain: the paper's values for cats, its domain of objects without masks (section 3.5).
NEW_TUNING = TuningConfig(steps=5, base_learning_rate=3e-6, reg_weight=1e-4)
NEW_PRETRAINING = PretrainingConfig(steps=60_000)


def prompt_requests(prompts: Prompts) -> list[PromptRequest]:
    """Return one prompt or several, each with the settings that are its own."""
    several = [prompts] if isinstance(prompts, str | PromptRequest) else prompts
    return [one if isinstance(one, PromptRequest) else PromptRequest(one) for one in several]


def parse_prompts(prompts: Prompts, placeholder: str) -> list[Prompt]:
    """Parse one prompt or several; raises `UsageError` if one does not name the concept."""
    parsed = []
    for one in prompt_requests(prompts):
        with one.located():
            parsed.append(parse_prompt(one.prompt, placeholder))
    return parsed


def resolve_images(
    prompts: Prompts, parsed: Sequence[Prompt], sampling: SamplingConfig, *, count: int, seeds: Sequence[int]
) -> list[ImageRequest]:
    """Return every image that is wanted; `UsageError` for settings that cannot be, or do not fit a prompt.

    Args:
        parsed: the prompts, by `parse_prompts`.
        sampling, count, seeds: of prompts without their own.
    """
    wanted = []
    for one, prompt in zip(prompt_requests(prompts), parsed, strict=True):
        with one.located():
            own = own_seeds(one, seeds, count)
            config = resolve_sampling({**sampling.as_dict(), **one.sampling}) if one.sampling else sampling
            parse_negative_prompt(config.negative_prompt, prompt.placeholder, weights=config.prompt_weights)
            read = prompt.weighted() if config.prompt_weights else prompt
        wanted += [ImageRequest(read, seed, config) for seed in own]
    return wanted


def own_seeds(request: PromptRequest, seeds: Sequence[int], count: int) -> Sequence[int]:
    """Return the seeds of one prompt's images: `seeds` and their number, `count`, unless it has its own."""
    if request.seed is None and request.num_images is None:
        return seeds
    first = seeds[0] if request.seed is None else request.seed
    return resolve_seeds(first, count if request.num_images is None else request.num_images)


def count_images(prompts: Prompts, seed: int | Sequence[int] | None, count: int) -> int:
    """Return how many images are wanted; raises UsageError as `resolve_seeds`."""
    seeds, images = resolve_seeds(seed, count), 0
    for one in prompt_requests(prompts):
        with one.located():
            images += len(own_seeds(one, seeds, count))
    return images


def resolve_seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """Return the seeds of each prompt's images, checked: those given, or `count` from the given or a random one on.

    Raises:
        UsageError: a seed is out of range, there is none, or both a list and a count were given.
    """
    if not isinstance(count, int) or count < 1:
        raise UsageError(f"the number of images per prompt must be 1 or more, not {count!r}")
    if seed is None:
        seed = secrets.randbelow(2**31)  # short enough to type, far from the end
    if isinstance(seed, Sequence) and count > 1:
        raise UsageError("a list of seeds says how many images there are", hint="leave -n out, or give one seed")
    if isinstance(seed, int):
        seeds = list(range(seed, seed + count))
    else:
        seeds = list(dict.fromkeys(seed)) if isinstance(seed, Sequence) else []
    wrong = [one for one in seeds if not isinstance(one, int) or not 0 <= one <= MAX_SEED] if seeds else [seed]
    if wrong:
        raise UsageError(f"seeds must be 0 to {MAX_SEED}, not {printable(repr(wrong[0]), limit=40)}")
    return seeds


def resolve_sampling(wanted: SamplingConfig | Mapping[str, Any] | None) -> SamplingConfig:
    """Return the sampling options, the negative prompt normalized; `UsageError` if there is no such field or value."""
    if not isinstance(wanted, SamplingConfig):
        try:
            wanted = SamplingConfig(**(wanted or {}))
        except TypeError as error:
            raise UsageError(f"sampling: {error}") from error
    return replace(wanted, negative_prompt=plain_text(wanted.negative_prompt, "the negative prompt"))


def scales_concept(wanted: Sequence[ImageRequest]) -> bool:
    """Whether an image needs the base's own weights beside the tuned ones."""
    return any(one.sampling.concept_scale != 1 for one in wanted)


def resolve_tuning(config: TuningConfig, method: str | None, steps: int | None) -> TuningConfig:
    """Return the config with another method and number of steps, checked; None leaves them unchanged."""
    if method is not None and method not in TUNING_METHODS:
        hint = f"--tuning {' or '.join(TUNING_METHODS)}"
        raise UsageError(f"there is no tuning method {printable(method)!r}", hint=hint)
    changes = {"method": method, "steps": steps}
    try:
        return config.replace(**{key: value for key, value in changes.items() if value is not None})
    except ValueError as error:
        raise UsageError(str(error)) from error
