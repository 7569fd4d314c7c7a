"""Jobs of `personalize_many`: what one subject's images depend on, checked before anything is loaded.

Every image of a job has a key, a hash of all that it depends on: whoever keeps the keys of finished images can
continue an interrupted batch, and draw only what is new in a changed one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from e4t_cli.api.options import PersonalizeKeywords, PersonalizeOptions
from e4t_cli.api.personalization import preparation_target
from e4t_cli.api.photos import NAMED_MASKS, PhotoSet, as_inputs, open_photos
from e4t_cli.api.requests import (
    NEW_TUNING,
    Prompts,
    parse_prompts,
    resolve_images,
    resolve_sampling,
    resolve_seeds,
    resolve_tuning,
)
from e4t_cli.api.resolve import resolve_domain, resolve_domain_base
from e4t_cli.api.session import ImageRequest
from e4t_cli.errors import E4TError, UsageError, printable
from e4t_cli.hub.paths import HubAccess
from e4t_cli.images.loading import ImageInputs, read_image
from e4t_cli.prompts import PLACEHOLDER, check_placeholder
from e4t_cli.registry.domain import Domain
from e4t_cli.schedulers import SamplingConfig

JOB_OPTIONS = (
    "mask", "align", "face", "require_face", "strict", "tuning", "tune_steps", "keep_weights", "domain_base",
)  # fmt: skip
"""The options of `personalize` that a job can have of its own."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One subject of a batch, with the arguments of `personalize`.

    Args:
        domain, image, prompts, num_images_per_prompt, sampling, placeholder: those of `personalize`.
        seed: as there, but None takes one that depends on photos and settings: the same job has the same images.
        options: some of `JOB_OPTIONS`.
        wants_concept: the concept itself is wanted; without it a job has to have prompts.
        source: where the job was read, such as "jobs.jsonl:3"; begins every message about it.
        number: of the job in what it was read from, from 1 on; 0 if it has none.
    """

    domain: str | os.PathLike[str] | Domain
    image: ImageInputs
    prompts: Prompts = ()
    num_images_per_prompt: int = 1
    seed: int | Sequence[int] | None = None
    sampling: SamplingConfig | Mapping[str, Any] | None = None
    placeholder: str = PLACEHOLDER
    options: PersonalizeKeywords = field(default_factory=lambda: PersonalizeKeywords())
    wants_concept: bool = False
    source: str = ""
    number: int = 0

    def located(self, error: E4TError) -> E4TError:
        """Return an error with the job's source in front of its message."""
        if not self.source or error.message.startswith(f"{printable(self.source)}:"):
            return error
        return type(error)(f"{printable(self.source)}: {error.message}", hint=error.hint)

    def check(self, found: dict[str, tuple[Domain, str]] | None = None) -> CheckedJob:
        """Check everything that needs no photo and no base.

        Args:
            found: domains by name, with their packages; those that are not there are looked up and added.

        Raises:
            UsageError: a setting cannot be, or there is no such domain; the message begins with the source.
        """
        try:
            return self._checked({} if found is None else found)
        except E4TError as error:
            raise self.located(error) from error

    def _checked(self, found: dict[str, tuple[Domain, str]]) -> CheckedJob:
        if unknown := [name for name in self.options if name not in JOB_OPTIONS]:
            known = ", ".join(JOB_OPTIONS)
            raise UsageError(f"a job has no option {printable(unknown[0])!r}", hint=f"it has {known}")
        asked = PersonalizeOptions(**self.options)
        images = as_inputs(self.image)
        if not images:
            raise UsageError("there is no photo", hint="give one, or several of the same subject")
        if "-" in images or any(hasattr(one, "read") for one in images):
            raise UsageError("a photo of a batch is read more than once: no stream", hint="name the file")
        placeholder = check_placeholder(self.placeholder)
        sampling, parsed = resolve_sampling(self.sampling), parse_prompts(self.prompts, placeholder)
        if not parsed and not self.wants_concept:
            raise UsageError("there is no prompt", hint='for example: "S* as an astronaut"')
        if asked.keep_weights and not self.wants_concept:
            raise UsageError("keep_weights needs a file to keep them in", hint='add "save"')
        resolve_tuning(NEW_TUNING, asked.tuning, asked.tune_steps)
        if isinstance(self.domain, Domain):
            domain, package = self.domain, ""
        else:
            name = os.fspath(self.domain)
            domain, package = found[name] if name in found else found.setdefault(name, resolve_domain(name))
        preparation_target(domain, asked, HubAccess(offline=True), size=64, base="")
        checked = CheckedJob(
            job=self, asked=asked, domain=domain, package=package, sampling=sampling, placeholder=placeholder,
            domain_base=resolve_domain_base(asked.domain_base),
        )  # fmt: skip
        checked.images(resolve_seeds(0 if self.seed is None else self.seed, self.num_images_per_prompt))
        return checked


@dataclass(frozen=True, kw_only=True)
class CheckedJob:
    """A job whose settings are valid, from `Job.check`."""

    job: Job
    asked: PersonalizeOptions  # with the job's own options only
    domain: Domain
    package: str  # that the domain came with
    sampling: SamplingConfig
    placeholder: str
    domain_base: str

    def images(self, seeds: Sequence[int]) -> list[ImageRequest]:
        """Return every image that is wanted."""
        prompts, count = self.job.prompts, self.job.num_images_per_prompt
        parsed = parse_prompts(prompts, self.placeholder)
        return resolve_images(prompts, parsed, self.sampling, count=count, seeds=seeds)

    def keyed(self, circumstances: Mapping[str, Any]) -> KeyedJob:
        """Read the photos' files, and return the job with seeds and keys.

        Args:
            circumstances: what else images depend on: the base and the like, as plain values.

        Raises:
            E4TError: a photo or a mask cannot be read.
        """
        job, asked = self.job, self.asked
        masks = [
            one if isinstance(one, str) and (one in NAMED_MASKS or one.startswith("words:")) else _sha256(one)
            for one in as_inputs(asked.mask)
        ]
        subject = {
            **circumstances, "domain": [self.package, self.domain.name], "masks": masks,
            "photos": [_sha256(one) for one in as_inputs(job.image)],
            **{name: getattr(asked, name) for name in ("align", "face", "tuning", "tune_steps", "domain_base")},
        }  # fmt: skip
        seed = job.seed
        if seed is None:
            seed = int(_key(subject)[:8], 16) % 2**31
        seeds = resolve_seeds(seed, job.num_images_per_prompt)
        subject["seed"] = seeds[0]
        wanted = self.images(seeds)
        images: dict[str, ImageRequest] = {}  # what is there twice is the same image
        for one in wanted:
            own = {"prompt": one.prompt.text, "image": one.seed, "sampling": one.sampling.as_dict()}
            images.setdefault(_key({**subject, **own, "word": self.placeholder}), one)
        concept = _key({**subject, "concept": [self.placeholder, asked.keep_weights]}) if job.wants_concept else None
        return KeyedJob(
            checked=self, seed=seeds[0], wanted=list(images.values()), keys=list(images), total=len(images),
            concept_key=concept,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class KeyedJob:
    """A job whose photos can be read: the images that it has, and their keys.

    Args:
        seed: of tuning.
        wanted: the images, in order.
        keys: of each of them.
        total: how many images the job has, with those that are finished.
        concept_key: that of the concept, if it is wanted.
    """

    checked: CheckedJob
    seed: int
    wanted: Sequence[ImageRequest]
    keys: Sequence[str]
    total: int
    concept_key: str | None

    @property
    def every_key(self) -> list[str]:
        """Those of the images and of the concept."""
        return [*self.keys, *([self.concept_key] if self.concept_key else [])]

    def without(self, finished: set[str]) -> KeyedJob:
        """Return the job without the images, and the concept, that are finished."""
        pairs = [pair for pair in zip(self.wanted, self.keys, strict=True) if pair[1] not in finished]
        return replace(
            self, wanted=[one for one, _ in pairs], keys=[key for _, key in pairs],
            concept_key=None if self.concept_key in finished else self.concept_key,
        )  # fmt: skip

    def open_photos(self) -> PhotoSet:
        """Decode and check the photos; raises as `personalize`."""
        return open_photos(self.checked.job.image, self.checked.asked.mask)


def _sha256(image: Any) -> str:
    return hashlib.sha256(read_image(image)[0]).hexdigest()


def _key(values: Mapping[str, Any]) -> str:
    """Return a hash of plain values, as 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
