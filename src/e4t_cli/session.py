"""One run of the library: a loaded base and pack, the clock, and what the user should know.

`api` decides what is to be done; this module does the parts that `personalize`, `generate` and
`pretrain` have in common. torch is first imported in `Session.running`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bases import Base
from .errors import ResourceError, UsageError, printable
from .metadata import GenerationRecord
from .progress import Progress, ProgressCallback
from .prompts import Prompt
from .results import GeneratedImage, Personalization, Timings

if TYPE_CHECKING:
    import torch

    from .base_model import TextToImageModel
    from .concept import Concept, TunedModel
    from .generation import Sampling
    from .pretrained import PretrainedDomain

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Session:
    """A base and a pack, used for one request.

    Args:
        device, dtype: as the user wrote them.
        on_progress: the caller's; notes pass through it too.
    """

    model: TextToImageModel
    pretrained: PretrainedDomain

    def __init__(self, device: str, dtype: str, on_progress: ProgressCallback | None) -> None:
        if dtype != "auto" and dtype not in DTYPES:
            names = ", ".join(["auto", *DTYPES])
            raise UsageError(f"there is no dtype {printable(dtype)!r}", hint=f"one of {names}")
        self._device, self._dtype = device, dtype
        self._listener = on_progress
        self._seconds: dict[str, float] = {}
        self.notes: list[str] = []

    # ── what the user hears ──

    def report(self, event: Progress) -> None:
        """Pass an event on, and remember its note for the result."""
        if event.note and event.note not in self.notes:
            self.notes.append(event.note)
        if self._listener is not None:
            self._listener(event)

    def note(self, stage: str, sentence: str) -> None:
        """Tell the user something without any progress."""
        self.report(Progress(stage=stage, note=sentence))

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
            self._seconds[name] = self._seconds.get(name, 0.0) + spent
        if not counted:
            self.report(Progress(stage=name, done=1, total=1))

    # ── the parts of the work ──

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Import what is heavy; inside, libraries keep quiet and memory errors are one sentence.

        Raises:
            ResourceError: memory ran out.
        """
        self.report(Progress(stage="load", done=0, total=1))
        with self.stage("imports", counted=True):
            from . import generation, tuning  # noqa: F401
        with _memory_errors(), _quiet_libraries():
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
        from .base_model import TextToImageModel
        from .pretrained import PretrainedDomain

        with self.stage("load", counted=True):
            if isinstance(base, Base):
                device = choose_device(self._device)
                if self._dtype == "fp16" and device.type == "cpu":
                    self.note("load", "fp16 is slow and coarse on a CPU; fp32 is the better choice")
                kind = choose_dtype(self._dtype)
                self.model = TextToImageModel.load(base, device=device, dtype=kind)
            else:
                self.model = base
            if pack is not None:
                self.pretrained = PretrainedDomain.load(pack)
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

    def tune(self, concept: Concept) -> TunedModel:
        """Tune on the concept's picture, as its recipe and seed say."""
        from .tuning import tune

        with self.stage("tune", counted=True):
            return tune(
                self.model,
                self.pretrained,
                concept.prepared,
                concept.recipe,
                seed=concept.seed,
                image_features=concept.image_features,
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
        sampling: Sampling,
        on_image: Callable[[GeneratedImage], None] | None,
    ) -> Personalization:
        """Draw `count` pictures of every prompt; picture i of each has the seed `seed + i`."""
        from .generation import sample

        sampling = sampling.resolved(self.model)
        wanted = [prompt for prompt in prompts for _ in range(count)]
        seeds = [seed + i for _ in prompts for i in range(count)]
        drawn: list[GeneratedImage] = []
        with self.stage("generate", counted=True):
            pictures = sample(self.model, tuned, wanted, seeds, sampling, on_progress=self.report)
            for prompt, own_seed, picture in zip(wanted, seeds, pictures, strict=True):
                record = GenerationRecord(
                    prompt=prompt.text,
                    negative_prompt=sampling.negative,
                    seed=own_seed,
                    steps=sampling.steps,
                    guidance=float(sampling.guidance or 0),
                    scheduler=sampling.scheduler,
                    width=picture.width,
                    height=picture.height,
                    placeholder=prompt.placeholder,
                    domain=concept.domain,
                    base=concept.base_name,
                    base_fingerprint=concept.base_fingerprint,
                    pack_fingerprint=concept.pack_digest,
                    photo_sha256=concept.image_sha256,
                    tuning={**concept.recipe.as_dict(), "seed": concept.seed},
                )
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
            timings=Timings(**self._seconds),
            notes=tuple(self.notes),
        )


def choose_sampling(wanted: Sampling | Mapping[str, Any] | None) -> Sampling:
    """Return what was asked for as a value.

    Raises:
        UsageError: it has a field that `Sampling` has not, or one out of range.
    """
    from .generation import Sampling

    if isinstance(wanted, Sampling):
        return wanted
    try:
        return Sampling(**(wanted or {}))
    except TypeError as error:
        raise UsageError(f"sampling: {error}") from error


def choose_device(wanted: str) -> torch.device:
    """Return the device of that name; "auto" is the fastest that is here.

    Raises:
        UsageError: the name means nothing, or this machine has no such device.
    """
    import torch

    if wanted == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except Exception as error:  # AssertionError, RuntimeError, AcceleratorError: by backend
        raise UsageError(
            f"the device {printable(wanted)!r} cannot be used on this machine",
            hint="--device auto picks one that can",
        ) from error
    return device


def choose_dtype(wanted: str) -> torch.dtype:
    """Return the number format of the frozen base; tuned weights are float32 in any case."""
    import torch

    # The shipped base is so small that float32 costs nothing, and it is the one format in which
    # a picture is the same in any company.
    dtype = getattr(torch, DTYPES.get(wanted, "float32"))
    assert isinstance(dtype, torch.dtype)
    return dtype


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
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
def _memory_errors() -> Iterator[None]:
    """Turn whatever an allocator says into one sentence.

    Raises:
        ResourceError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch.OutOfMemoryError is a RuntimeError; the CPU's allocator raises a plain one.
        text = str(error).lower()
        told = "out of memory" in text or "can't allocate memory" in text
        if isinstance(error, MemoryError) or told:
            raise ResourceError(
                "memory ran out",
                hint="close other programs, or use another --device or a smaller --base",
            ) from error
        raise
