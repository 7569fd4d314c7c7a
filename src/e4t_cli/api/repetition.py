"""Draws a picture again from its record: `generate(..., like="picture.png")`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from e4t_cli.api.requests import Prompts, prompt_requests
from e4t_cli.hub.addons import Addon
from e4t_cli.images.png_metadata import GenerationRecord, package_versions
from e4t_cli.prompts import PromptRequest

if TYPE_CHECKING:
    from e4t_cli.formats.concept import Concept
    from e4t_cli.schedulers import SamplingConfig

REPEATED = ("steps", "guidance", "scheduler", "negative_prompt", "concept_scale", "prompt_weights")
"""Fields of `SamplingConfig` that a picture records."""


def repeated(
    records: Sequence[GenerationRecord],
    prompts: Prompts,
    seed: int | Sequence[int] | None,
    count: int,
    sampling: SamplingConfig | Mapping[str, Any] | None,
) -> tuple[list[PromptRequest], int | Sequence[int], dict[str, Any]]:
    """Return prompts, seeds and sampling options: those given, and those of a picture in place of what is not.

    Without prompts, a seed and a count, each image of the picture is repeated with its own settings.

    Args:
        records: of the picture, one or more; a contact sheet has one of each image.
        prompts, seed, count, sampling: as given to `e4t_cli.generate`.
    """
    given = dict(sampling if isinstance(sampling, Mapping) else sampling.as_dict() if sampling else {})
    settings = [{**{name: getattr(one, name) for name in REPEATED}, **given} for one in records]
    requests = prompt_requests(prompts)
    if not requests:
        pairs = list(zip(records, settings, strict=True))
        requests = [PromptRequest(one.prompt, num_images=1, seed=one.seed, sampling=own) for one, own in pairs]
        if seed is not None or count > 1:
            first: dict[str, PromptRequest] = {}
            for one, own in pairs:
                first.setdefault(one.prompt, PromptRequest(one.prompt, sampling=own))
            requests = list(first.values())
    if seed is None:
        seeds = list(dict.fromkeys(one.seed for one in records))
        seed = seeds if count == 1 else seeds[0]
    return requests, seed, settings[0]


def other_circumstances(record: GenerationRecord, concept: Concept) -> str:
    """Return a sentence if a picture drawn again from its record will not be the same, or "".

    Another concept is no error: its image with another's prompt, seed and settings may be what is wanted.
    """
    tuning = json.loads(json.dumps({**concept.config.as_dict(), "seed": concept.seed}))
    compared = {
        "photo": ((record.photo_sha256, *record.other_photos_sha256), concept.photos_sha256),
        "base": (record.base_fingerprint, concept.base_fingerprint),
        "domain weights": (record.weights_fingerprint, concept.weights_digest),
        "LoRAs or VAE": (
            [one.identity for one in map(Addon.from_dict, record.addons) if one.kind != "embedding"],
            [one.identity for one in concept.addons],
        ),
        "tuning": (dict(record.tuning), tuning),
    }
    others = [name for name, (then, now) in compared.items() if then != now]
    if others:
        made = f"the picture was made of another concept ({', '.join(others)})"
        return f"{made}: its prompt, seed and settings are used, and the result is another picture"
    here = package_versions()
    others = [f"{name} {then} ({here.get(name)})" for name, then in record.versions.items() if here.get(name) != then]
    return f"the picture was made with {', '.join(others)}: pixels may differ" if others else ""
