"""`plan_personalization`, `plan_generation`: what a request would do and cost, without a base and without a network.

They refuse what `personalize` and `generate` refuse before they load a base. Most of it needs no torch: it is imported
to read a concept, to try a device other than the CPU, and to look for the face that was asked for.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from e4t_cli.api.options import (
    GenerateKeywords,
    GenerateOptions,
    PersonalizeKeywords,
    PersonalizeOptions,
    PrepareKeywords,
    PrepareOptions,
)
from e4t_cli.api.personalization import preparation_target, prepare_opened
from e4t_cli.api.photos import PhotoSet, open_photos
from e4t_cli.api.repetition import repeated
from e4t_cli.api.requests import (
    Prompts,
    parse_prompts,
    resolve_images,
    resolve_sampling,
    resolve_seeds,
    resolve_tuning,
)
from e4t_cli.api.resolve import (
    check_addons,
    check_concept_base,
    find_concept_domain,
    find_weights,
    load_concept,
    needs_image_tower,
    prefers_half,
    resolve_base,
    resolve_base_name,
    resolve_domain,
    resolve_domain_base,
    resolve_domain_weights,
)
from e4t_cli.api.session import ImageRequest, Session
from e4t_cli.devices import choose_device, likely_accelerator
from e4t_cli.errors import WeightsUnavailable, printable
from e4t_cli.hub.addons import Addon
from e4t_cli.hub.bases import EMBEDDED, PUBLISHED, Base
from e4t_cli.hub.image_tower import missing_bytes
from e4t_cli.hub.paths import HubAccess
from e4t_cli.hub.resolve import find_cached_base, look_up_base
from e4t_cli.hub.tuned_files import allowed_bytes
from e4t_cli.hub.vae import fetch_addons, wanted_source
from e4t_cli.images.loading import ImageInput, ImageInputs, read_bytes
from e4t_cli.images.png_metadata import read_records
from e4t_cli.prompts import PLACEHOLDER, Prompt, check_placeholder
from e4t_cli.registry.config import TuningConfig
from e4t_cli.registry.discovery import user_domain
from e4t_cli.registry.domain import Domain
from e4t_cli.system_memory import GB

if TYPE_CHECKING:
    from e4t_cli.formats.concept import Concept
    from e4t_cli.models.text_to_image import TextToImageModel
    from e4t_cli.schedulers import SamplingConfig

# Millions of weights that are fetched of a published base: U-Net, VAE and text encoder; the safety checker.
FETCHED = {"sd14": (1066.2, 304.0), "sd15": (1066.2, 304.0), "sd21-base": (1290.0, 0.0), "sd21": (1290.0, 0.0)}
CHECKPOINT = 4_021_900_000  # bytes of the published weights of e4t-diffusion
# Seconds of a tuning step, full and LoRA, with a batch of 16, and of a denoising step with guidance: `personalize` on
# mini, benchmarks/README.md for the H100, docs/rehearsal.md (its LoRA step by the ratio of their FLOP).
SECONDS = {
    "mini": ("one CPU core", {"full": 0.34, "lora": 0.25}, 0.037),
    "accelerator": ("an H100", {"full": 0.34, "lora": 0.214}, 0.075),
    "cpu": ("two CPU cores", {"full": 370.0, "lora": 230.0}, 18.0),
}
# GB of the smallest and of the fastest tuning on 512 pixels, as `plan_tuning` predicts; on mini as it was measured.
MEMORY = {
    "mini": {"full": (1.2, 1.2), "lora": (1.2, 1.2)},
    "accelerator": {"full": (4.8, 35.7), "lora": (3.2, 14.6)},
    "cpu": {"full": (16.0, 53.9), "lora": (6.1, 28.6)},
}


def plan_personalization(
    domain: str | os.PathLike[str] | Domain, image: ImageInputs, prompts: Prompts = (), *,
    num_images_per_prompt: int = 1, seed: int | Sequence[int] | None = None,
    sampling: SamplingConfig | Mapping[str, Any] | None = None, placeholder: str = PLACEHOLDER,
    **options: Unpack[PersonalizeKeywords],
) -> dict[str, Any]:  # fmt: skip
    """Return what `personalize`, with these arguments, would do and cost, as plain values; nothing is fetched.

    Raises:
        E4TError: as `personalize`, without what only its base can tell.
    """
    asked = PersonalizeOptions(**options)
    parsed = parse_prompts(prompts, check_placeholder(placeholder))
    seeds = resolve_seeds(seed, num_images_per_prompt)
    wanted = resolve_images(prompts, parsed, resolve_sampling(sampling), count=num_images_per_prompt, seeds=seeds)
    value, _ = resolve_domain(domain)
    photos = open_photos(image, asked.mask)
    asked, vae = find_addons(asked)
    asked.addons.check()
    base = _Base(asked, value, wanted, tower=True, domain_base=resolve_domain_base(asked.domain_base), vae=vae)
    target = preparation_target(value, asked, HubAccess(offline=True), size=base.resolution or 512, base=base.name)
    if value.prepare is not None and (target.which != "largest" or target.required):
        with contextlib.suppress(WeightsUnavailable):  # the parser was not fetched: nobody knows
            for photo in photos:
                photo.prepare(value, target, masked=value.tuning.mask)
    config = resolve_tuning(base.tuning, asked.tuning, asked.tune_steps)
    return {
        "type": "plan",
        "domain": value.name,
        "descriptor": value.descriptor,
        **_about(photos),
        "prompts": len(parsed),
        **base.cost(wanted, config),
        "tuning": asdict(config),
    }


def plan_preparation(
    domain: str | os.PathLike[str] | Domain, image: ImageInputs, **options: Unpack[PrepareKeywords]
) -> dict[str, Any]:
    """Return what `prepare_all`, with these arguments, would do, as plain values; nothing is fetched.

    Raises:
        E4TError: as `prepare_all`, without what a parser that is not here would find.
    """
    options["offline"] = True
    asked = PrepareOptions(**options)
    value, _ = resolve_domain(domain)
    photos = open_photos(image, asked.mask)
    with contextlib.suppress(WeightsUnavailable):  # the parser was not fetched
        prepare_opened(value, photos, asked)
    return {"type": "plan", "domain": value.name, "descriptor": value.descriptor, **_about(photos), "prompts": 0}


def _about(photos: PhotoSet) -> dict[str, Any]:
    """Return the size of the photo, or those of several, in pixels, and what is to be known of them."""
    sizes: dict[str, Any] = {"photo": photos.sizes[0]} if len(photos) == 1 else {"photos": photos.sizes}
    return {**sizes, "notes": list(photos.notes)} if photos.notes else sizes


def plan_generation(
    concept: Concept | str | os.PathLike[str], prompts: Prompts = (), *, like: ImageInput | None = None,
    num_images_per_prompt: int = 1, seed: int | Sequence[int] | None = None,
    sampling: SamplingConfig | Mapping[str, Any] | None = None, placeholder: str | None = None,
    **options: Unpack[GenerateKeywords],
) -> dict[str, Any]:  # fmt: skip
    """Return what `generate`, with these arguments, would do and cost, as plain values; nothing is fetched.

    Raises:
        E4TError: as `generate`, without what only its base can tell.
    """
    asked = GenerateOptions(**options)
    if records := [] if like is None else read_records(read_bytes(like)):
        placeholder = placeholder or records[0].placeholder
        prompts, seed, sampling = repeated(records, prompts, seed, num_images_per_prompt, sampling)
    seeds, config = resolve_seeds(seed, num_images_per_prompt), resolve_sampling(sampling)
    concept = load_concept(concept)
    parsed = parse_prompts(prompts, placeholder or concept.placeholder)
    wanted = resolve_images(prompts, parsed, config, count=num_images_per_prompt, seeds=seeds)
    asked, vae = find_addons(asked, concept.addons)
    if vae:  # nobody knows whether it is the concept's before it is fetched
        others = tuple(one for one in concept.addons if one.kind != "vae")
        check_addons(replace(concept, addons=others), asked, records)
    else:
        check_addons(concept, asked, records)
    check_concept_base(concept, asked.base)
    value = find_concept_domain(concept.domain, concept.package)
    if asked.base == "auto":
        asked = replace(asked, base=concept.base_name)
    base = _Base(asked, value, wanted, tower=False, domain_base=concept.domain_base, vae=vae)
    before = bool(concept.weights) or (bool(allowed_bytes()) and _is_tuned(concept))
    tuning = concept.config.replace(steps=0) if before else concept.config
    about = {"type": "plan", "domain": value.name, "prompts": len(parsed), "tuned_before": before}
    return {**about, **base.cost(wanted, tuning)}


def _is_tuned(concept: Concept) -> bool:
    from e4t_cli.formats.tuned_cache import is_tuned

    return is_tuned(concept)


_Options = TypeVar("_Options", bound=GenerateOptions)


def find_addons(options: _Options, recorded: Iterable[Addon] = ()) -> tuple[_Options, str]:
    """Return the options with a VAE of the hub that is here, or without it and its name, if it would be fetched."""
    source = wanted_source(options.addons, recorded)
    if not source or not isinstance(options.base, str | os.PathLike):
        return options, ""
    try:
        return replace(options, addons=fetch_addons(options.addons, HubAccess(offline=True), recorded)), ""
    except WeightsUnavailable:
        if HubAccess(offline=options.offline).cut_off:
            raise
        return replace(options, addons=replace(options.addons, vae_source="")), source


class _Base:
    """The base of a request, and the domain's weights for it, as far as they are known without loading.

    Raises:
        E4TError: device, dtype or memory limit cannot be, there is no such base, it cannot be sampled in a way that
            is wanted, or the domain has no weights for it.
    """

    def __init__(
        self,
        options: GenerateOptions,
        domain: Domain,
        wanted: Sequence[ImageRequest],
        *,
        tower: bool,
        domain_base: str,
        vae: str = "",
    ) -> None:
        access = Session(options, vram=options.vram, safety=options.safety_checker).access
        half = prefers_half(options.device, options.dtype)
        self.options, self.domain, self.tuning = options, domain, domain.tuning
        self.to_fetch: list[str] = []
        self.download: int | None = 0  # in bytes; None: unknown
        if isinstance(options.base, str | os.PathLike):
            name = resolve_base_name(options.base, access, domain=domain, device=options.device, confirm=False)
            self.name, self.resolution, here = look_up_base(name, half=half)
            base = find_cached_base(name, half=half)
            schedule = _config(base, "scheduler/scheduler_config.json")
            if base is not None:
                _check_lengths(base, [one.prompt for one in wanted])
            if not here:
                if access.cut_off:  # raises what the run would
                    resolve_base(
                        replace(options, base=name),
                        access,
                        domain=domain,
                        safety=options.safety_checker,
                        domain_base=domain_base,
                    )
                self._fetch(name, half, tower=tower and needs_image_tower(domain, domain_base or name))
        else:
            model: TextToImageModel = options.base
            self.name, self.resolution, schedule = model.base.name, model.resolution, model.noise_schedule.config
        if vae:
            self.to_fetch.append(f"the VAE {printable(vae)}")
            self.download = None
        for one in wanted:
            one.sampling.check_schedule(schedule)
        if options.device not in ("auto", "cpu"):
            choose_device(options.device)
        own = domain_base or self.name
        folder = find_weights(domain, own)
        if folder is None and access.cut_off:
            folder = resolve_domain_weights(domain, own, access)
        if folder is not None:
            self.tuning = user_domain(folder).tuning
            return
        self.to_fetch.append(f"the weights of {domain.name}")
        published = domain.weights[own].startswith("hub:")
        self.download = None if published or self.download is None else self.download + CHECKPOINT

    def _fetch(self, wanted: str, half: bool, *, tower: bool) -> None:
        self.to_fetch.append(f"the base {self.name}")
        if self.name not in FETCHED:
            self.download = None
            return
        weights, checker = FETCHED[self.name]
        millions = weights + (checker if self.options.safety_checker else 0)
        self.download = int(millions * 1e6) * (2 if half else 4) + (missing_bytes() if tower else 0)

    def cost(self, wanted: Sequence[ImageRequest], tuning: TuningConfig) -> dict[str, Any]:
        """Return the base, what is fetched, and estimates of memory and time."""
        known = self.name in (*EMBEDDED, *PUBLISHED)
        kind = "accelerator" if likely_accelerator(self.options.device) else "cpu"
        kind = self.name if self.name in EMBEDDED else kind
        measured_on, each, denoising = SECONDS[kind]
        area = (self.resolution / 512) ** 2 if kind != self.name and self.resolution else 1.0
        tune = tuning.steps * tuning.batch_size / 16 * each[tuning.method] * area
        generate = sum(one.sampling.steps for one in wanted) * denoising * area
        least, fastest = (int(one * GB) for one in MEMORY[kind][tuning.method])
        return {
            "base": self.name,
            "images": len(wanted),
            "size": {"width": self.resolution, "height": self.resolution} if self.resolution else None,
            "to_fetch": " and ".join(self.to_fetch),
            "download_bytes": self.download,
            "memory_bytes": {"least": least, "fastest": fastest} if known else None,
            "seconds": {"tune": round(tune, 1), "generate": round(generate, 1), "on": measured_on} if known else None,
        }


def _config(base: Base | None, name: str) -> dict[str, Any]:
    """Return a config file of a base, {} if it cannot be read: that is reported where it has to be."""
    with contextlib.suppress(OSError, ValueError):
        if base is not None:
            return dict(json.loads((base.folder / name).read_text("utf-8")))
    return {}


def _check_lengths(base: Base, prompts: Sequence[Prompt]) -> None:
    """Raise UsageError for a prompt that names the concept behind the last token that the base reads."""
    length = _config(base, "text_encoder/config.json").get("max_position_embeddings", 77)
    before = (itertools.takewhile(lambda part: part is not None, one.segments) for one in prompts)
    # A token has a character or more.
    late = [one for one, parts in zip(prompts, before, strict=True) if len("".join(map(str, parts))) > length - 2]
    if late:
        from transformers import CLIPTokenizer

        from e4t_cli.models.prompt_embedding import tokenize_prompts

        tokenizer = CLIPTokenizer.from_pretrained(base.folder / "tokenizer", local_files_only=True)
        length = min(tokenizer.model_max_length, length)
        tokenize_prompts(tokenizer, late, tokenizer.eos_token_id, length=length, device=choose_device("cpu"))
