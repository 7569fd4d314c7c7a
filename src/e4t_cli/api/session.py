"""One run of the library: loads base and domain weights, tunes, generates, and reports progress.

These are the steps that `personalize`, `generate`, `export` and `pretrain` share. torch is first
imported in `Session.running`.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from e4t_cli.api.options import ImageCallback, RunOptions
from e4t_cli.devices import (
    DTYPES,
    budget_of,
    check_device,
    choose_device,
    choose_dtype,
    limited_memory,
    quiet_libraries,
    read_ahead,
)
from e4t_cli.errors import ResourceError, UsageError, printable
from e4t_cli.hub.addons import Addon, BaseAddons
from e4t_cli.hub.bases import Base
from e4t_cli.hub.paths import HubAccess
from e4t_cli.hub.tuned_files import allowed_bytes
from e4t_cli.hub.vae import fetch_addons
from e4t_cli.hub.vocabulary import read_vocabulary, words_of
from e4t_cli.images.png_metadata import GenerationRecord
from e4t_cli.images.results import GeneratedImage, Personalization, Timings
from e4t_cli.progress import Progress
from e4t_cli.prompts import Prompt, foreign_syntax, parse_negative_prompt, unknown_words, weight_syntax
from e4t_cli.system_memory import check_addresses, memory_ran_out, out_of_memory

if TYPE_CHECKING:
    from PIL.Image import Image

    from e4t_cli.formats.concept import Concept
    from e4t_cli.formats.tuned_cache import CacheEntry
    from e4t_cli.models.denoiser import TunedModel
    from e4t_cli.models.domain_weights import DomainWeights
    from e4t_cli.models.loading import SafetyChecker
    from e4t_cli.models.text_to_image import TextToImageModel
    from e4t_cli.nn.precision import PrecisionPolicy
    from e4t_cli.schedulers import SamplingConfig
    from e4t_cli.training.memory import Plan

LISTED = 8  # words in one note


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Disable Python's cyclic garbage collector, which finds nothing in imports and takes a sixth of their time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turn an allocator's error into a `ResourceError`, also one that was taken for a damaged file."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, ResourceError) and memory_ran_out(error):
            raise out_of_memory() from error
        raise


def _listed(words: Iterable[str]) -> str:
    """Return the first few, for a message."""
    some = list(words)
    return ", ".join(printable(word, limit=40) for word in some[:LISTED]) + (" …" if len(some) > LISTED else "")


def record_of(
    concept: Concept, prompt: Prompt, seed: int, sampling: SamplingConfig, size: tuple[int, int], spacing: str,
    addons: Iterable[Addon] = (),
) -> GenerationRecord:  # fmt: skip
    """Return all that it takes to generate an image again; `size` is (width, height) in pixels."""
    return GenerationRecord(
        prompt=prompt.text, placeholder=prompt.placeholder, seed=seed, width=size[0], height=size[1],
        negative_prompt=sampling.negative_prompt, concept_scale=sampling.concept_scale,
        prompt_weights=sampling.prompt_weights,
        steps=sampling.steps, guidance=float(sampling.guidance or 0), scheduler=sampling.scheduler,
        timestep_spacing=spacing, domain=concept.domain, domain_base=concept.domain_base,
        base=concept.base_name, base_fingerprint=concept.base_fingerprint,
        weights_fingerprint=concept.weights_digest, photo_sha256=concept.image_sha256,
        other_photos_sha256=list(concept.others_sha256),
        tuning={**concept.config.as_dict(), "seed": concept.seed}, addons=[one.as_dict() for one in addons],
    )  # fmt: skip


class ImageRequest(NamedTuple):
    """One image that is wanted."""

    prompt: Prompt
    seed: int
    sampling: SamplingConfig


class Session:
    """A base and domain weights, used for one request; measures its stages, and keeps the notes for the result.

    Args:
        vram: gigabytes that may be used, or "auto".
        safety: run the base's safety checker, where it has one.

    Attributes:
        options: of the request, with `on_progress` going through this session.
    """

    model: TextToImageModel  # set by `load`, like the next
    pretrained: DomainWeights

    def __init__(self, options: RunOptions, *, vram: str = "auto", safety: bool = True) -> None:
        self._on_progress = options.on_progress
        self.seconds: dict[str, float] = {}  # of each stage
        self.notes: list[str] = []
        if options.dtype != "auto" and options.dtype not in DTYPES:
            hint = f"one of {', '.join(['auto', *DTYPES])}"
            raise UsageError(f"there is no dtype {printable(options.dtype)!r}", hint=hint)
        check_device(options.device)
        if vram != "auto":
            budget_of(vram)
        allowed_bytes()  # raises if the environment has no number
        self.options = replace(options, on_progress=self.report)
        accept = options.accept_license
        self.access = HubAccess(offline=options.offline, accept_license=accept, on_progress=self.report)
        self.vram, self.safety = vram, safety
        self._limits = contextlib.ExitStack()
        self._owns_model = False  # whether the model was loaded for this one request, and not by the caller
        self.shares_model = False  # with the sessions of other requests: it stays as it is, and keeps its tower

    def report(self, event: Progress) -> None:
        """Pass an event on to the caller's callback."""
        if event.note and event.note not in self.notes:
            self.notes.append(event.note)
        if self._on_progress is not None:
            self._on_progress(event)

    def note(self, stage: str, text: str) -> None:
        """Report something that may not be what the user meant."""
        self.report(Progress(stage=stage, note=text))

    @contextlib.contextmanager
    def stage(self, name: str, *, counted: bool = False) -> Iterator[None]:
        """Measure a stage; unless its own code counts steps, also report its start and end."""
        if not counted:
            self.report(Progress(stage=name, done=0, total=1))
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun
        if not counted:
            self.report(Progress(stage=name, done=1, total=1))

    @property
    def autocast(self) -> bool | None:
        """See `PrecisionPolicy.resolve`."""
        from e4t_cli.nn.precision import requested_autocast

        return requested_autocast(self.options.dtype)

    @contextlib.contextmanager
    def running(self, base: Base | TextToImageModel | None = None) -> Iterator[None]:
        """Import torch, while the disk reads the base; inside, libraries show no progress bars.

        Raises:
            ResourceError: memory ran out.
        """
        self.report(Progress(stage="load", done=0, total=1))
        if isinstance(base, Base):
            read_ahead(base.folder)
        check_addresses()
        with self.stage("imports", counted=True), memory_errors(), without_collection():
            import e4t_cli.sampling  # noqa: F401
        with memory_errors(), quiet_libraries, self._limits:
            yield

    def load(self, base: Base | TextToImageModel, weights: Path | None, *, domain_base: str = "") -> None:
        """Load the base, if it is not a loaded model, and the domain weights, if there are any yet.

        Args:
            domain_base: the name of another base, if the weights are meant to be those of that one.

        Raises:
            UsageError: there is no such device here.
            IntegrityError: the weights were made for another base, or do not fit this one.
        """
        from e4t_cli.models.domain_weights import DomainWeights
        from e4t_cli.models.text_to_image import TextToImageModel

        with self.stage("load", counted=True):
            if isinstance(base, Base):
                device = choose_device(self.options.device)
                if self.options.dtype == "fp16" and device.type == "cpu":
                    self.note("load", "fp16 is slow and inaccurate on a CPU; use fp32")
                self._limits.enter_context(limited_memory(device, self.vram))
                dtype = choose_dtype(self.options.dtype, device, base.folder)
                self.model = TextToImageModel.load(base, device=device, dtype=dtype)
                self._owns_model = True
                if self.options.addons:
                    self._add(self.options.addons)
            elif self.options.addons:
                hint = "e4t_cli.formats.addons.apply_addons(model, addons), before it is used"
                raise UsageError("add-ons change a base, and a loaded model may be in use", hint=hint)
            else:
                self.model = base
            if weights is not None:
                self.use_weights(DomainWeights.load(weights), domain_base=domain_base)
        self.report(Progress(stage="load", done=1, total=1))

    def use_weights(self, pretrained: DomainWeights, *, domain_base: str = "") -> None:
        """Use loaded domain weights with the loaded base; raises as `load`."""
        self.pretrained = pretrained
        if domain_base and not pretrained.is_for(self.model):
            pretrained.check_shapes(self.model)
            name, here = printable(pretrained.name), printable(self.model.base.name)
            about = f"the weights of {name} for {printable(domain_base)} are used on {here}"
            self.note("load", f"{about}: their shapes fit; nobody has measured the quality")
        elif not domain_base:
            pretrained.check_base(self.model)
        self._check_words()

    def find_addons(self, recorded: Iterable[Addon] = ()) -> None:
        """Check the files of the add-ons, and fetch a VAE of the hub: also that of a concept, among the `recorded`.

        Raises:
            E4TError: a file is no add-on, or the VAE is none or cannot be fetched.
        """
        if isinstance(self.options.base, str | os.PathLike):
            addons = fetch_addons(self.options.addons, self.access, recorded)
            self.options = replace(self.options, addons=addons)
        self.options.addons.check()

    def _add(self, addons: BaseAddons) -> None:
        from e4t_cli.formats.addons import apply_addons

        def remark(text: str) -> None:
            self.report(Progress(stage="load", remark=text))

        apply_addons(self.model, addons, note=lambda text: self.note("load", text), remark=remark)

    def _check_words(self) -> None:
        """Raise UsageError if a prompt of tuning has a word of a textual inversion: the concept would depend on it."""
        taken = self.model.words.found_in(" ".join(self.pretrained.templates))
        if taken:
            word = printable(sorted(taken)[0])
            message = f"the word {word!r} of an embedding is in the prompts that a concept is tuned with"
            raise UsageError(message, hint="give it another: --embedding FILE:WORD")

    def check_prompts(self, wanted: Sequence[ImageRequest]) -> None:
        """Report before any tuning what the text encoder will truncate, does not know, or reads as plain words.

        Raises:
            UsageError: a placeholder comes after the text encoder's last token, or is in a negative prompt.
        """
        prompts = list(dict.fromkeys(one.prompt for one in wanted))
        negative = ((one.sampling, one.prompt.placeholder) for one in wanted)
        against = dict.fromkeys(
            parse_negative_prompt(sampling.negative_prompt, own, weights=sampling.prompt_weights)
            for sampling, own in negative
        )
        model, every = self.model, [*prompts, *against]
        descriptor = model.descriptor_id(self.pretrained.descriptor)
        self._check_added_words(every)
        for index, dropped in enumerate(model.tokenize(every, descriptor).dropped if every else ()):
            if dropped:
                which = "the prompt" if index < len(prompts) else "the negative prompt"
                self.note("load", f"{which} is too long; left out: {printable(dropped)!r}")
        texts = [model.words.without(prompt.text) for prompt in every]
        if plain := dict.fromkeys(part for text in texts for part in foreign_syntax(text)):
            self.note("load", f"{_listed(plain)}: read as plain words, without the meaning it has in other programs")
        unread = [one for one in wanted if not one.sampling.prompt_weights]
        texts = [text for one in unread for text in (one.prompt.text, one.sampling.negative_prompt)]
        if plain := dict.fromkeys(part for text in texts for part in weight_syntax(model.words.without(text))):
            self.note("load", f"{_listed(plain)}: read as plain words; --prompt-weights reads weights of words")
        known = [
            replace(one, segments=tuple(model.words.without(part or "") for part in one.segments)) for one in every
        ]
        vocabulary = read_vocabulary(model.base.folder)
        if vocabulary is not None and (unknown := unknown_words(known, words_of(vocabulary))):
            name = model.base.name
            self.note("load", f"{name} does not know: {_listed(unknown)} (its words: e4t info {name})")

    def _check_added_words(self, prompts: Sequence[Prompt]) -> None:
        """Report words of textual inversions that no prompt has; raise UsageError if one is the placeholder."""
        words = self.model.words
        for placeholder in {prompt.placeholder for prompt in prompts}:
            if words.found_in(placeholder):
                message = f"{printable(placeholder)!r} is the concept, and the word of an embedding"
                raise UsageError(message, hint="give it another: --embedding FILE:WORD")
        read = {word for prompt in prompts for part in prompt.segments for word in words.found_in(part or "")}
        if unread := [word for word in words.vectors if word not in read]:
            self.note("load", f"no prompt has the word of the embedding: {_listed(unread)}")

    def check_sampling(self, wanted: Sequence[ImageRequest]) -> None:
        """Raise `UsageError` before any tuning if the base cannot be sampled in a way that is wanted."""
        for one in wanted:
            one.sampling.check_schedule(self.model.noise_schedule.config)

    def tune(self, concept: Concept, *, keep_base: bool = False) -> TunedModel:
        """Tune on the concept's images with its config and seed, in the memory that is available.

        A tuning that was computed before is read from the cache, unless the model is the caller's: that may have been
        changed. Without `keep_base` the U-Net of a model that was loaded for this request becomes the tuned one, which
        spares a copy.
        """
        from e4t_cli.nn.precision import PrecisionPolicy
        from e4t_cli.training.memory import plan_tuning
        from e4t_cli.training.optim import has_eight_bit

        model, device = self.model, self.model.device
        consume = self._owns_model and not keep_base and not self.shares_model
        if self._owns_model and not self.shares_model:
            model.release_tower()  # the photos are encoded by now
        policy = PrecisionPolicy.resolve(device, model.dtype, self.autocast)
        plan = plan_tuning(
            model, self.pretrained, concept.config,
            vram=self.vram, consume=consume, half=policy.half, eight_bit=has_eight_bit(device),
        )  # fmt: skip
        entry = self._cache_entry(concept, plan, policy) if self._owns_model and allowed_bytes() else None
        if entry is not None and (found := self._tuned_before(entry, concept)) is not None:
            if consume:
                model.unet = found.unet
            return found
        self.report(Progress(stage="tune", detail=plan.summary()))
        if plan.peak > plan.budget:
            needed = plan.summary().partition(": ")[2]
            less = "" if concept.config.method == "lora" else "; --tuning lora needs less"
            self.note("tune", f"memory may not suffice: {needed}{less}")
        return self._tune_anew(concept, plan, entry, consume=consume)

    def _tune_anew(self, concept: Concept, plan: Plan, entry: CacheEntry | None, *, consume: bool) -> TunedModel:
        with self.stage("imports", counted=True), without_collection():
            from e4t_cli.training.tuning import TuningOptions, tune

        notes: list[str] = []

        def report(event: Progress) -> None:
            notes.extend([event.note] if event.note else [])
            self.report(event)

        with self.stage("tune", counted=True):
            tuned = tune(
                self.model, self.pretrained, concept.photos, concept.config,
                seed=concept.seed, image_features=concept.image_features, on_progress=report,
                options=TuningOptions(plan=plan, consume=consume, autocast=self.autocast),
            )  # fmt: skip
        # One with a note is not kept: the note would be missing the next time, and where memory ran out, the tuning
        # went on in another way than planned.
        if entry is not None and not notes and (reason := entry.store(tuned)):
            self.report(Progress(stage="tune", detail=f"the tuned weights are not kept in the cache: {reason}"))
        return tuned

    def _cache_entry(self, concept: Concept, plan: Plan, policy: PrecisionPolicy) -> CacheEntry | None:
        """Return the entry of the cache for a tuning of a model that was loaded for this request."""
        from e4t_cli.formats.tuned_cache import CacheEntry

        way = asdict(plan.replace(peak=0, budget=0))  # what was free does not matter
        return CacheEntry.of(
            concept, self.model, {"plan": way, "policy": {name: str(value) for name, value in vars(policy).items()}}
        )

    def _tuned_before(self, entry: CacheEntry, concept: Concept) -> TunedModel | None:
        begun = time.perf_counter()
        found = entry.load(concept, self.model, self.pretrained)
        if found is not None:
            with self.stage("tune"):
                self.report(Progress(stage="tune", detail="tuned before: the weights are those in the cache"))
            self.seconds["tune"] += time.perf_counter() - begun
        return found

    def generate(
        self,
        concept: Concept,
        tuned: TunedModel,
        wanted: Sequence[ImageRequest],
        *,
        seed: int,
        name: str,
        on_image: ImageCallback | None,
    ) -> Personalization:
        """Generate the images in order; `seed`, that of tuning, and `name` are the result's."""
        images: list[GeneratedImage] = []
        withheld: list[GenerationRecord] = []
        with self.stage("generate", counted=True):
            checker = self.safety_checker()
            for one, sampling, spacing, pixels in self._sampled(tuned, wanted):
                record = record_of(concept, one.prompt, one.seed, sampling, pixels.size, spacing, self.model.addons)
                if checker is not None and checker.flags([pixels])[0]:
                    withheld.append(record)
                    continue
                images.append(
                    GeneratedImage(image=pixels, prompt=one.prompt.text, seed=one.seed, record=record, name=name)
                )
                if on_image is not None:
                    on_image(images[-1])
        return Personalization(
            concept=concept, images=images, seed=seed, timings=Timings(**self.seconds),
            notes=tuple(self.notes), withheld=tuple(withheld), name=name,
        )  # fmt: skip

    def _sampled(
        self, tuned: TunedModel, wanted: Sequence[ImageRequest]
    ) -> Iterator[tuple[ImageRequest, SamplingConfig, str, Image]]:
        """Yield each image with its request, its sampling and diffusers' word for the spacing of its time steps.

        Neighbours with the same sampling are one batch.
        """
        from e4t_cli.sampling import make_scheduler, sample

        total, before = sum(one.sampling.steps for one in wanted), 0
        for chosen, group in itertools.groupby(wanted, key=lambda one: one.sampling):
            some, sampling = list(group), chosen.resolved(self.model)
            share = sampling.steps * len(some)
            spacing = str(make_scheduler(self.model, sampling).config.get("timestep_spacing", "leading"))

            def report(event: Progress, before: int = before, share: int = share) -> None:
                # Of all groups; a scheduler that evaluates the U-Net twice in a step counts more of them.
                done = before + event.done * share // event.total if event.total else 0
                self.report(event if share == total else replace(event, done=done, total=total))

            prompts, seeds = [one.prompt for one in some], [one.seed for one in some]
            for one, pixels in zip(
                some, sample(self.model, tuned, prompts, seeds, sampling, on_progress=report), strict=True
            ):
                yield one, sampling, spacing, pixels
            before += share

    def safety_checker(self) -> SafetyChecker | None:
        """Return the base's safety checker, if it has one and it is not disabled."""
        from e4t_cli.models.loading import SafetyChecker

        model = self.model
        return SafetyChecker.of_base(model.base.folder, model.device, model.dtype) if self.safety else None
