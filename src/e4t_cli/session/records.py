"""How pictures are drawn, as a value, and what is written down about each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from e4t_cli.errors import UsageError
from e4t_cli.metadata import GenerationRecord
from e4t_cli.prompts import Prompt

if TYPE_CHECKING:
    from e4t_cli.concept import Concept
    from e4t_cli.generation import Sampling


def record_of(
    concept: Concept, prompt: Prompt, seed: int, sampling: Sampling, size: tuple[int, int]
) -> GenerationRecord:
    """Return all that it takes to draw a picture again; `size` is width and height in pixels."""
    return GenerationRecord(
        prompt=prompt.text,
        negative_prompt=sampling.negative,
        seed=seed,
        steps=sampling.steps,
        guidance=float(sampling.guidance or 0),
        scheduler=sampling.scheduler,
        strength=sampling.strength,
        width=size[0],
        height=size[1],
        placeholder=prompt.placeholder,
        domain=concept.domain,
        base=concept.base_name,
        base_fingerprint=concept.base_fingerprint,
        pack_fingerprint=concept.pack_digest,
        photo_sha256=concept.image_sha256,
        tuning={**concept.recipe.as_dict(), "seed": concept.seed},
    )


def choose_sampling(wanted: Sampling | Mapping[str, Any] | None) -> Sampling:
    """Return what was asked for as a value.

    Raises:
        UsageError: it has a field that `Sampling` has not, or one out of range.
    """
    from e4t_cli.generation import Sampling

    if isinstance(wanted, Sampling):
        return wanted
    try:
        return Sampling(**(wanted or {}))
    except TypeError as error:
        raise UsageError(f"sampling: {error}") from error
