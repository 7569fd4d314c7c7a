"""What a run leaves behind for the eye, and for whoever compares runs."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from PIL.Image import Image
from torch import Tensor

from e4t_cli.base_model import TextToImageModel
from e4t_cli.domain import PreparedImage
from e4t_cli.errors import E4TError, printable
from e4t_cli.files import write_atomically
from e4t_cli.generation import Sampling, sample
from e4t_cli.metadata import GenerationRecord, png_bytes
from e4t_cli.pretrained import PretrainedDomain
from e4t_cli.pretraining import PretrainingStep
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.prompts import parse_prompt
from e4t_cli.results import contact_sheet
from e4t_cli.tuning import tune

from .curve import draw_losses
from .trackers import Trackers

PROMPTS = ("a photo of S*", "S* on the beach", "a drawing of S*")
"""Of the contact sheets: one to recognise, one to place, one to restyle."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Watching:
    """What is written down of a run, and how often it is drawn from.

    Args:
        folder: for the log, the curve and the sheets; made if it is not there.
        sample_every: steps between two contact sheets; 0 draws none.
        images: held-out pictures, which training never sees.
        prompts: what each of them is asked for.
        seed: of the first picture of a row; each row has the same ones.
        sampling: how sheets are drawn: short, because nothing but change is looked for.
        trackers: names that accelerate knows, such as "tensorboard".
    """

    folder: Path
    sample_every: int = 0
    images: Sequence[PreparedImage] = ()
    prompts: Sequence[str] = PROMPTS
    seed: int = 0
    sampling: Sampling = field(default_factory=lambda: Sampling(steps=12))
    trackers: Sequence[Any] = ()


class Watch:
    """Follows one run: hand `report` to its `on_progress` and `look` to its `on_step`.

    Args:
        watching: what to write.
        model: the base in training.
        name: of the domain.
        settings: of the run, plain values for the trackers.
        on_progress: told what goes wrong while watching, which never stops the run.
    """

    def __init__(
        self,
        watching: Watching,
        model: TextToImageModel,
        *,
        name: str,
        settings: Mapping[str, Any] | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> None:
        self.watching, self.model, self.name = watching, model, name
        self._settings = {"domain": name, "base": model.base.name, **(settings or {})}
        self._listener = on_progress
        self._prompts = [parse_prompt(text) for text in watching.prompts]
        self._features: list[Tensor] = []
        self._lines: list[dict[str, float]] | None = None
        self._trackers: Trackers | None = None
        self._failed: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lines:
            self._unless_it_fails("the loss curve", self._draw_curve)
        if self._trackers is not None:
            self._trackers.finish()

    # ── losses ──

    def report(self, event: Progress) -> None:
        """Write down the numbers of an event, if it has any."""
        if event.values:
            line = {"step": event.done, **event.values}
            self._unless_it_fails("the log of losses", lambda: self._log(line))
            if self._trackers is None:
                watching = self.watching
                self._trackers = Trackers(
                    watching.trackers, watching.folder, f"e4t-{self.name}", self._settings,
                    self._note,
                )  # fmt: skip
            self._trackers.log(event.values, event.done)

    @property
    def log(self) -> Path:
        return self.watching.folder / "losses.jsonl"

    def _log(self, line: dict[str, float]) -> None:
        if self._lines is None:
            self.watching.folder.mkdir(parents=True, exist_ok=True)
            # A run that was stopped goes on from its checkpoint: what came after is done again.
            self._lines = [old for old in read_losses(self.log) if old["step"] < line["step"]]
            text = "".join(f"{json.dumps(old)}\n" for old in self._lines)
            write_atomically(self.log, text.encode())
        self._lines.append(line)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")

    def _draw_curve(self) -> None:
        lines = self._lines or []
        curve = draw_losses(
            [int(line["step"]) for line in lines],
            [line["loss"] for line in lines],
            f"{self.name} on {self.model.base.name}: loss",
        )
        buffer = io.BytesIO()
        curve.save(buffer, "PNG")
        self.watching.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.watching.folder / "losses.png", buffer.getvalue())

    # ── pictures ──

    def look(self, step: PretrainingStep) -> None:
        """Draw the curve and a contact sheet, if this is a step for them."""
        every = self.watching.sample_every
        if every and step.step % every == 0:
            self._unless_it_fails("the loss curve", self._draw_curve)
            if self.watching.images:
                self._unless_it_fails("the contact sheet", lambda: self._draw_sheet(step))

    def _draw_sheet(self, step: PretrainingStep) -> None:
        pictures, captions, records = [], [], []
        pack = step.snapshot()
        for number, prepared in enumerate(self.watching.images):
            pictures.append(prepared.image)
            captions.append(f"held out {number + 1}, step {step.step:,}")
            for image, record in self._drawn(pack, number, prepared):
                pictures.append(image)
                captions.append(record.prompt)
                records.append(record)
        sheet = contact_sheet(pictures, captions, columns=1 + len(self._prompts))
        self.watching.folder.mkdir(parents=True, exist_ok=True)
        path = self.watching.folder / f"step-{step.step:08d}.png"
        write_atomically(path, png_bytes(sheet, records))

    def _drawn(
        self, pack: PretrainedDomain, number: int, prepared: PreparedImage
    ) -> list[tuple[Image, GenerationRecord]]:
        """Draw one held-out picture's row with the encoder's guess, without any tuning."""
        model, sampling = self.model, self.watching.sampling.resolved(self.model)
        if len(self._features) == number:  # the picture never changes: looked at once
            self._features.append(model.image_features(model.pixels([prepared.image]))[0])
        still = pack.tuning.replace(steps=0)
        tuned = tune(model, pack, prepared, still, image_features=self._features[number])
        seeds = [self.watching.seed + index for index in range(len(self._prompts))]
        drawn = sample(model, tuned, self._prompts, seeds, sampling)
        assert sampling.guidance is not None
        return [
            (
                image,
                GenerationRecord(
                    prompt=prompt.text, seed=seed, steps=sampling.steps,
                    guidance=sampling.guidance, scheduler=sampling.scheduler,
                    width=image.width, height=image.height, domain=pack.name,
                    base=pack.base_name, base_fingerprint=pack.base_fingerprint,
                    tuning=still.as_dict(),
                ),
            )
            for image, prompt, seed in zip(drawn, self._prompts, seeds, strict=True)
        ]  # fmt: skip

    # ── what goes wrong ──

    def _unless_it_fails(self, what: str, act: Callable[[], None]) -> None:
        """Do something that is not worth a run of days, and say once if it cannot be done."""
        try:
            act()
        except (OSError, E4TError) as error:
            if what not in self._failed:
                self._failed.add(what)
                self._note(f"{what} could not be written, and training goes on: {error}")

    def _note(self, sentence: str) -> None:
        if self._listener is not None:
            self._listener(Progress(stage="pretrain", note=printable(sentence)))


def read_losses(path: Path) -> list[dict[str, float]]:
    """Return the lines of a log of losses, but for one that a killed process left torn."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
                lines.append({key: float(value) for key, value in line.items()})
            except (ValueError, TypeError, AttributeError):
                continue
    return [line for line in lines if "step" in line and "loss" in line]
