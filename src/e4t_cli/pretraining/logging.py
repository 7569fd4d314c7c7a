"""Records of a run: losses.jsonl, contact sheets of held-out images, and accelerate's trackers.

None of it is worth a run: what is missing or fails is reported once, and training continues.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from PIL import Image
from torch import Tensor

from e4t_cli.errors import E4TError, UsageError, printable
from e4t_cli.files import file_error, write_atomically
from e4t_cli.images.png_metadata import GenerationRecord, png_bytes
from e4t_cli.images.results import contact_sheet
from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.pretraining.loop import PretrainingStep
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.prompts import parse_prompt
from e4t_cli.registry.domain import PreparedImage
from e4t_cli.sampling import sample
from e4t_cli.schedulers import SamplingConfig
from e4t_cli.training.tuning import tune

PROMPTS = ("a photo of S*", "S* on the beach", "a drawing of S*")  # of contact sheets: to recognise, place, restyle
# Trackers that can work without a network, and their arguments for that.
OFFLINE_TRACKERS: dict[str, dict[str, str]] = {"tensorboard": {}, "wandb": {"mode": "offline"}}


def check_trackers(trackers: Sequence[Any], *, offline: bool) -> None:
    """Raise UsageError if a tracker would open a connection when offline; instances are the user's code."""
    for name in trackers if offline else ():
        if isinstance(name, str) and name not in OFFLINE_TRACKERS:
            message = f"the tracker {printable(name, limit=40)} may use the network, and e4t is offline"
            raise UsageError(message, hint=f"without a network: --tracker {' or '.join(OFFLINE_TRACKERS)}")


@dataclass(frozen=True, kw_only=True, eq=False)
class LoggerConfig:
    """What is recorded of a run, in `folder`, which is created if it does not exist."""

    folder: Path
    sample_every: int = 0  # steps between two contact sheets; 0 makes none
    images: Sequence[PreparedImage] = ()  # held out: never trained on
    prompts: Sequence[str] = PROMPTS
    seed: int = 0  # of the first sample of each row
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(steps=12))
    trackers: Sequence[Any] = ()  # names that accelerate knows, or its `GeneralTracker`s
    offline: bool = False  # trackers open no connection


class TrainingLogger:
    """Records one run; its `on_progress` and `on_step` are callbacks of `pretrain_domain`.

    Args:
        settings: of the run, plain values for the trackers.
        on_progress: called with warnings about what could not be recorded.

    Raises:
        UsageError: a tracker needs the network, and the config is offline.
    """

    def __init__(
        self,
        config: LoggerConfig,
        model: TextToImageModel,
        *,
        name: str,
        settings: Mapping[str, Any] | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> None:
        check_trackers(config.trackers, offline=config.offline)
        self.config, self.model, self.name = config, model, name
        self._settings = {"domain": name, "base": model.base.name, **(settings or {})}
        self._on_note = on_progress
        self._prompts = [parse_prompt(text) for text in config.prompts]
        self._features: list[Tensor] = []
        self._log_started = False
        self._trackers: list[tuple[str, Any]] | None = None
        self._failed: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._each_tracker(lambda tracker: tracker.finish())

    def on_progress(self, event: Progress) -> None:
        """Record the values of an event, if it has any."""
        if event.values:
            self._try("the log of losses", lambda: self._log({"step": event.done, **event.values}))
            if self._trackers is None:
                self._start_trackers()
            self._each_tracker(lambda tracker: tracker.log(dict(event.values), step=event.done))

    def on_step(self, step: PretrainingStep) -> None:
        """Make a contact sheet, if this is a step for one."""
        every = self.config.sample_every
        if every and step.step % every == 0 and self.config.images:
            self._try("the contact sheet", lambda: self._write_sheet(step))

    def on_resume(self, step: PretrainingStep) -> None:
        """Make the contact sheet of the step that a run resumes from, if the run was killed before it had one."""
        if not os.path.exists(self._sheet(step)):
            self.on_step(step)

    def _sheet(self, step: PretrainingStep) -> Path:
        return self.config.folder / f"step-{step.step:08d}.png"

    def _log(self, line: dict[str, float]) -> None:
        path = self.config.folder / "losses.jsonl"
        if not self._log_started:
            self.config.folder.mkdir(parents=True, exist_ok=True)
            # A stopped run resumes from its checkpoint: the steps after it are done again.
            old = [one for one in read_losses(path) if one["step"] < line["step"]]
            write_atomically(path, "".join(f"{json.dumps(one)}\n" for one in old).encode())
            self._log_started = True
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")

    def _start_trackers(self) -> None:
        self._trackers = []
        for one in self.config.trackers:
            name = printable(str(getattr(one, "name", one)), limit=40)
            try:
                found = self._start_tracker(one)
                if not found:
                    self._tracker_failed(name, "is not installed")
                self._trackers += [(name, tracker) for tracker in found[:1]]
            except Exception as error:  # whatever a service's library raises
                self._tracker_failed(name, "failed", error)

    def _start_tracker(self, one: Any) -> list[Any]:
        """Start a tracker with accelerate; empty if its library is not installed."""
        from accelerate import Accelerator

        folder = str(self.config.folder)
        # Only the first process gets here, and uses this accelerator for nothing else.
        with warnings.catch_warnings(action="ignore"):  # what is not installed is reported above
            accelerator = Accelerator(log_with=[one], project_dir=folder, cpu=True, mixed_precision="no")
        # wandb alone would write into the current folder.
        wandb = {**(OFFLINE_TRACKERS["wandb"] if self.config.offline else {}), "dir": folder}
        accelerator.init_trackers(f"e4t-{self.name}", config=dict(self._settings), init_kwargs={"wandb": wandb})
        return list(accelerator.trackers)

    def _each_tracker(self, act: Callable[[Any], object]) -> None:
        for name, tracker in list(self._trackers or []):
            try:
                act(tracker)
            except Exception as error:
                self._trackers = [other for other in self._trackers or [] if other[1] is not tracker]
                self._tracker_failed(name, "failed", error)

    def _tracker_failed(self, name: str, what: str, error: Exception | None = None) -> None:
        reason = f": {printable(str(error), limit=160) or type(error).__name__}" if error else ""
        self._note(f"the tracker {name} {what}, and training continues without it{reason}")

    def _write_sheet(self, step: PretrainingStep) -> None:
        weights = step.snapshot()
        images: list[Image.Image] = []
        captions: list[str] = []
        records: list[GenerationRecord] = []
        for number, prepared in enumerate(self.config.images):
            samples, row = self._samples(weights, number, prepared)
            images += [prepared.image, *samples]
            captions += [f"held out {number + 1}, step {step.step:,}", *(record.prompt for record in row)]
            records += row
        sheet = contact_sheet(images, captions, columns=1 + len(self._prompts))
        self.config.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._sheet(step), png_bytes(sheet, records))

    def _samples(
        self, weights: DomainWeights, number: int, prepared: PreparedImage
    ) -> tuple[list[Image.Image], list[GenerationRecord]]:
        """Generate one held-out image's row from the encoder's prediction, without tuning."""
        model, sampling = self.model, self.config.sampling.resolved(self.model)
        if len(self._features) == number:  # the image never changes: encoded once
            self._features.append(model.image_features(model.pixels([prepared.image]))[0])
        tuning = weights.tuning.replace(steps=0)
        tuned = tune(model, weights, prepared, tuning, image_features=self._features[number])
        seeds = [self.config.seed + index for index in range(len(self._prompts))]
        samples = list(sample(model, tuned, self._prompts, seeds, sampling))
        assert sampling.guidance is not None
        return samples, [
            GenerationRecord(
                prompt=prompt.text, seed=seed, steps=sampling.steps, guidance=sampling.guidance,
                scheduler=sampling.scheduler, width=image.width, height=image.height, domain=weights.name,
                base=weights.base_name, base_fingerprint=weights.base_fingerprint, tuning=tuning.as_dict(),
            )
            for image, prompt, seed in zip(samples, self._prompts, seeds, strict=True)
        ]  # fmt: skip

    def _try(self, what: str, act: Callable[[], None]) -> None:
        """Call `act`; report the first error of its kind."""
        try:
            act()
        except (OSError, E4TError) as failure:
            error = file_error(failure, self.config.folder) if isinstance(failure, OSError) else failure
            if what not in self._failed:
                self._failed.add(what)
                self._note(f"{what} could not be written, and training continues: {error}")

    def _note(self, sentence: str) -> None:
        if self._on_note is not None:
            self._on_note(Progress(stage="pretrain", note=printable(sentence)))


def read_losses(path: Path) -> list[dict[str, float]]:
    """Return the lines of a log of losses, but for one that a killed process left torn."""
    lines = []
    if os.path.exists(path):
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, TypeError, AttributeError):
                lines.append({key: float(value) for key, value in json.loads(text).items()})
    return [line for line in lines if "step" in line and "loss" in line]
