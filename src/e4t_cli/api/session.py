"""What holds around heavy work: libraries keep quiet, and memory errors are one sentence.

What the user hears of a run, and the clock.

How pictures are drawn, as a value, and what is written down about each.

One run of the library: a loaded base and pack, the clock, and what the user should know.

`api` decides what is to be done; this module does the parts that `personalize`, `generate` and
`pretrain` have in common. torch is first imported in `Session.running`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e4t_cli.devices import (
    DTYPES,
    budget_of,
    choose_device,
    choose_dtype,
    limited_memory,
    memory_ran_out,
    read_ahead,
)
from e4t_cli.errors import ResourceError, UsageError, printable
from e4t_cli.hub.bases import Base
from e4t_cli.images.png_metadata import GenerationRecord
from e4t_cli.images.results import GeneratedImage, Personalization, Timings
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.prompts import Prompt

if TYPE_CHECKING:
    from e4t_cli.formats.concept import Concept
    from e4t_cli.models.denoiser import TunedModel
    from e4t_cli.models.domain_weights import DomainWeights
    from e4t_cli.models.safety_checker import SafetyChecker
    from e4t_cli.models.text_to_image import TextToImageModel
    from e4t_cli.sampling import SamplingConfig


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the progress bars of transformers and diffusers out of the user's terminal."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    loud = [
        library
        for library in (transformers_logging, diffusers_logging)
        if library.is_progress_bar_enabled()
    ]
    for library in loud:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in loud:
            library.enable_progress_bar()


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turn whatever an allocator says into one sentence.

    Raises:
        ResourceError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if memory_ran_out(error):
            raise ResourceError(
                "memory ran out",
                hint="close other programs, or use another --device or a smaller --base",
            ) from error
        raise


class ProgressReporter:
    """Work that reports its stages and times them.

    Args:
        on_progress: the caller's; notes pass through it too.
    """

    def __init__(self, on_progress: ProgressCallback | None) -> None:
        self._listener = on_progress
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []

    def report(self, event: Progress) -> None:
        """Pass an event on, and remember its note for the result."""
        if event.note and event.note not in self.notes:
            self.notes.append(event.note)
        if self._listener is not None:
            self._listener(event)

    def note(self, stage: str, sentence: str) -> None:
        """Tell the user something without any progress."""
        self.report(Progress(stage=stage, note=sentence))

    def remark(self, stage: str, sentence: str) -> None:
        """Tell the user something that is good to know."""
        self.report(Progress(stage=stage, remark=sentence))

    def detail(self, stage: str, sentence: str) -> None:
        """Tell those who asked for more."""
        self.report(Progress(stage=stage, detail=sentence))

    @contextlib.contextmanager
    def stage(self, name: str, *, counted: bool = False) -> Iterator[None]:
        """Measure a stage; unless its own code counts steps, also report its start and end."""
        if not counted:
            self.report(Progress(stage=name, done=0, total=1))
        begun = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - begun
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
        if not counted:
            self.report(Progress(stage=name, done=1, total=1))


def record_of(
    concept: Concept, prompt: Prompt, seed: int, sampling: SamplingConfig, size: tuple[int, int]
) -> GenerationRecord:
    """Return all that it takes to draw a picture again; `size` is width and height in pixels."""
    return GenerationRecord(
        prompt=prompt.text,
        negative_prompt=sampling.negative_prompt,
        seed=seed,
        steps=sampling.steps,
        guidance=float(sampling.guidance or 0),
        scheduler=sampling.scheduler,
        concept_scale=sampling.concept_scale,
        width=size[0],
        height=size[1],
        placeholder=prompt.placeholder,
        domain=concept.domain,
        base=concept.base_name,
        base_fingerprint=concept.base_fingerprint,
        weights_fingerprint=concept.weights_digest,
        photo_sha256=concept.image_sha256,
        tuning={**concept.config.as_dict(), "seed": concept.seed},
    )


def resolve_sampling(wanted: SamplingConfig | Mapping[str, Any] | None) -> SamplingConfig:
    """Return what was asked for as a value.

    Raises:
        UsageError: it has a field that `SamplingConfig` has not, or one out of range.
    """
    from e4t_cli.sampling import SamplingConfig

    if isinstance(wanted, SamplingConfig):
        return wanted
    try:
        return SamplingConfig(**(wanted or {}))
    except TypeError as error:
        raise UsageError(f"sampling: {error}") from error


class Session(ProgressReporter):
    """A base and a pack, used for one request.

    Args:
        device, dtype, vram: as the user wrote them.
        on_progress: the caller's; notes pass through it too.
        safety: look at every picture, where the base has a checker.
    """

    model: TextToImageModel
    pretrained: DomainWeights

    def __init__(
        self,
        device: str,
        dtype: str,
        on_progress: ProgressCallback | None,
        *,
        vram: str = "auto",
        safety: bool = True,
    ) -> None:
        super().__init__(on_progress)
        if dtype != "auto" and dtype not in DTYPES:
            names = ", ".join(["auto", *DTYPES])
            raise UsageError(f"there is no dtype {printable(dtype)!r}", hint=f"one of {names}")
        if vram != "auto":
            budget_of(vram)
        self._device, self._dtype, self._vram, self._safety = device, dtype, vram, safety
        self._limits = contextlib.ExitStack()
        self._own = False  # whether the model was loaded for this one request

    @property
    def autocast(self) -> bool | None:
        """See `PrecisionPolicy.resolve`."""
        from e4t_cli.nn.precision import requested_autocast

        return requested_autocast(self._dtype)

    @contextlib.contextmanager
    def running(self, base: Base | TextToImageModel | None = None) -> Iterator[None]:
        """Import what is heavy; inside, libraries keep quiet and memory errors are one sentence.

        Args:
            base: that will be loaded; the disk reads it while the processor imports.

        Raises:
            ResourceError: memory ran out.
        """
        self.report(Progress(stage="load", done=0, total=1))
        if isinstance(base, Base):
            read_ahead(base.folder)
        with self.stage("imports", counted=True):
            import e4t_cli.sampling
            import e4t_cli.training.tuning  # noqa: F401
        with memory_errors(), quiet_libraries(), self._limits:
            yield

    def load(self, base: Base | TextToImageModel, pack: Path | None) -> None:
        """Load the base and the pack.

        Args:
            base: where the base is, or a model that is loaded already.
            pack: folder of the domain's weights for that base; None where there are none yet.

        Raises:
            UsageError: there is no such device here.
            IntegrityError: the pack was made for another base.
        """
        from e4t_cli.models.domain_weights import DomainWeights
        from e4t_cli.models.text_to_image import TextToImageModel

        with self.stage("load", counted=True):
            if isinstance(base, Base):
                device = choose_device(self._device)
                if self._dtype == "fp16" and device.type == "cpu":
                    self.note("load", "fp16 is slow and coarse on a CPU; fp32 is the better choice")
                self._limits.enter_context(limited_memory(device, self._vram))
                kind = choose_dtype(self._dtype, device, base.folder)
                self.model = TextToImageModel.load(base, device=device, dtype=kind)
                self._own = True
            else:
                self.model = base
            if pack is not None:
                self.pretrained = DomainWeights.load(pack)
                self.pretrained.check_base(self.model)
        self.report(Progress(stage="load", done=1, total=1))

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Find out before any tuning which prompts the text encoder cannot read to the end.

        Raises:
            UsageError: a placeholder comes too late to be read.
        """
        descriptor = self.model.descriptor_id(self.pretrained.descriptor)
        if prompts:
            for dropped in self.model.tokenize(prompts, descriptor).dropped:
                if dropped:
                    self.note("load", f"the prompt is too long; left out: {printable(dropped)!r}")

    def tune(self, concept: Concept, *, keep_base: bool = False) -> TunedModel:
        """Tune on the concept's picture, as its recipe and seed say, in the memory there is.

        Args:
            keep_base: leave the base's U-Net as it is. A model that was loaded for this request
                is used up otherwise: its U-Net becomes the tuned one, which saves a copy.
        """
        from e4t_cli.nn.precision import PrecisionPolicy
        from e4t_cli.training.memory import plan_tuning
        from e4t_cli.training.optim import has_eight_bit
        from e4t_cli.training.tuning import TuningOptions, tune

        model, device = self.model, self.model.device
        consume = self._own and not keep_base
        if self._own:
            model.release_tower()  # the picture has been looked at
        plan = plan_tuning(
            model,
            self.pretrained,
            concept.config,
            vram=self._vram,
            consume=consume,
            half=PrecisionPolicy.resolve(device, model.dtype, self.autocast).half,
            eight_bit=has_eight_bit(device),
        )
        self.detail("tune", plan.summary())
        if plan.peak > plan.budget:
            less = "" if concept.config.method == "lora" else "; --tuning lora needs less"
            told = plan.summary().partition(": ")[2]
            self.note("tune", f"memory may not suffice: {told}{less}")
        with self.stage("tune", counted=True):
            return tune(
                model,
                self.pretrained,
                concept.prepared,
                concept.config,
                seed=concept.seed,
                image_features=concept.image_features,
                options=TuningOptions(plan=plan, consume=consume, autocast=self.autocast),
                on_progress=self.report,
            )

    def draw(
        self,
        concept: Concept,
        tuned: TunedModel,
        prompts: Sequence[Prompt],
        *,
        count: int,
        seed: int,
        sampling: SamplingConfig,
        on_image: Callable[[GeneratedImage], None] | None,
    ) -> Personalization:
        """Draw `count` pictures of every prompt; picture i of each has the seed `seed + i`."""
        from e4t_cli.sampling import sample

        sampling = sampling.resolved(self.model)
        wanted = [prompt for prompt in prompts for _ in range(count)]
        seeds = [seed + i for _ in prompts for i in range(count)]
        drawn: list[GeneratedImage] = []
        withheld: list[GenerationRecord] = []
        with self.stage("generate", counted=True):
            checker = self._checker()
            pictures = sample(self.model, tuned, wanted, seeds, sampling, on_progress=self.report)
            for prompt, own_seed, picture in zip(wanted, seeds, pictures, strict=True):
                record = record_of(concept, prompt, own_seed, sampling, picture.size)
                if checker is not None and checker.flags([picture])[0]:
                    withheld.append(record)
                    continue
                image = GeneratedImage(
                    image=picture, prompt=prompt.text, seed=own_seed, record=record
                )
                drawn.append(image)
                if on_image is not None:
                    on_image(image)
        return Personalization(
            concept=concept,
            images=drawn,
            seed=seed,
            timings=Timings(**self.seconds),
            notes=tuple(self.notes),
            withheld=tuple(withheld),
        )

    def _checker(self) -> SafetyChecker | None:
        """Return the base's safety checker, if it has one and nobody said no to it."""
        folder = self.model.base.folder
        if not self._safety or not (folder / "safety_checker" / "config.json").is_file():
            return None
        from e4t_cli.models.safety_checker import SafetyChecker

        return SafetyChecker.of_base(folder, self.model.device, self.model.dtype)
