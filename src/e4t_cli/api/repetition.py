"""Which images a request asks for, also one to draw a picture again from its record (`generate(..., like=...)`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from e4t_cli.api.resolve import resolve_seeds
from e4t_cli.images.png_metadata import GenerationRecord, package_versions

if TYPE_CHECKING:
    from e4t_cli.formats.concept import Concept
    from e4t_cli.sampling import SamplingConfig


def repeated(
    records: Sequence[GenerationRecord], prompts: str | Sequence[str], seed: int | Sequence[int] | None, count: int
) -> tuple[list[str], list[int]]:
    """Return the prompt and the seed of each image, those of one prompt together.

    Args:
        records: of the picture to draw again; given prompts and seeds stand in place of its own. A picture without
            its prompts or seeds given is repeated image by image; a contact sheet has several.
        prompts, seed, count: as in `e4t_cli.personalize`.

    Raises:
        UsageError: as `resolve_seeds`.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if records and not texts and seed is None and count == 1:
        return [one.prompt for one in records], [resolve_seeds(one.seed, 1)[0] for one in records]
    if records and seed is None:
        seed = list(dict.fromkeys(one.seed for one in records)) if count == 1 else records[0].seed
    texts = texts or list(dict.fromkeys(one.prompt for one in records))
    seeds = resolve_seeds(seed, count)
    return [text for text in texts for _ in seeds], seeds * max(len(texts), 1)


def repeated_sampling(
    record: GenerationRecord, given: SamplingConfig | Mapping[str, Any] | None
) -> SamplingConfig | Mapping[str, Any]:
    """Return the sampling options of a record, with those that were given in their place."""
    if given is not None and not isinstance(given, Mapping):
        return given
    names = ("steps", "guidance", "scheduler", "negative_prompt", "concept_scale")
    return {**{name: getattr(record, name) for name in names}, **(given or {})}


def other_circumstances(record: GenerationRecord, concept: Concept) -> str:
    """Return a sentence if a picture drawn again from its record will not be the same, or "".

    Another concept is no error: its image with another's prompt, seed and settings may be what is wanted.
    """
    tuning = json.loads(json.dumps({**concept.config.as_dict(), "seed": concept.seed}))
    compared = {
        "photo": (record.photo_sha256, concept.image_sha256),
        "base": (record.base_fingerprint, concept.base_fingerprint),
        "domain weights": (record.weights_fingerprint, concept.weights_digest),
        "tuning": (dict(record.tuning), tuning),
    }
    others = [name for name, (then, now) in compared.items() if then != now]
    if others:
        return (
            f"the picture was made of another concept ({', '.join(others)}): its prompt, seed and settings are "
            "used, and the result is another picture"
        )
    here = package_versions()
    others = [f"{name} {version}, here {here.get(name)}" for name, version in record.versions.items()
              if name != "e4t" and here.get(name) != version]  # fmt: skip
    return f"the picture was made with {'; '.join(others)}: pixels may differ" if others else ""
