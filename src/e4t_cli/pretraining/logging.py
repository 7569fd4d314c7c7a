"""The loss curve as a picture: every report as a dot, and the line that the eye looks for.

Numbers for services that draw them (TensorBoard, Weights & Biases, …), through accelerate.

A tracker is never worth a run: one that is missing, offline or failing is mentioned once, and
training goes on without it.

What a run leaves behind for the eye, and for whoever compares runs.
"""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from e4t_cli.errors import E4TError, printable
from e4t_cli.files import write_atomically
from e4t_cli.images.png_metadata import GenerationRecord, png_bytes
from e4t_cli.images.results import contact_sheet
from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.pretraining.loop import PretrainingStep
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.prompts import parse_prompt
from e4t_cli.registry.domain import PreparedImage
from e4t_cli.sampling import SamplingConfig, sample
from e4t_cli.training.tuning import tune

SIZE, LEFT, RIGHT, TOP, BOTTOM = (960, 540), 90, 30, 40, 60
PAPER, INK, GRID, DOT, LINE = (255,) * 3, (40,) * 3, (228,) * 3, (176, 196, 222), (31, 87, 160)
DOTS = 4000
"""More reports than these are thinned out for the dots; the line sees all of them."""
WINDOW = 0.02
"""Share of the run over which the line is smoothed."""


def draw_losses(steps: Sequence[int], losses: Sequence[float], title: str = "loss") -> Image.Image:
    """Return the curve of some reports.

    Args:
        steps: where they were made, rising.
        losses: one each, finite.
        title: above the curve.
    """
    image = Image.new("RGB", SIZE, PAPER)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(15)
    draw.text((LEFT, 12), title, fill=INK, font=font)
    if not losses:
        return image
    line = smoothed(losses)
    # A few wild first steps would flatten everything after them.
    ordered = sorted(losses)
    low = min(ordered[0], min(line))
    high = max(ordered[int(0.99 * (len(ordered) - 1))], max(line[len(line) // 50 :]))
    marks = ticks(low, high)
    low, high = min(low, marks[0]), max(high, marks[-1])
    first, last = min(steps[0], 0), max(steps[-1], 1)
    width, height = SIZE[0] - LEFT - RIGHT, SIZE[1] - TOP - BOTTOM

    def across(step: float) -> float:
        return LEFT + (step - first) / (last - first) * width

    def down(loss: float) -> float:
        return TOP + (high - min(max(loss, low), high)) / ((high - low) or 1) * height

    for mark in marks:
        y = down(mark)
        draw.line((LEFT, y, LEFT + width, y), fill=GRID)
        draw.text((LEFT - 8, y), f"{mark:.4g}", fill=INK, font=font, anchor="rm")
    for mark in ticks(first, last):
        if first <= mark <= last:
            x = across(mark)
            draw.line((x, TOP + height, x, TOP + height + 5), fill=INK)
            draw.text((x, TOP + height + 10), f"{mark:,.0f}", fill=INK, font=font, anchor="mt")
    draw.line((LEFT, TOP + height, LEFT + width, TOP + height), fill=INK)
    draw.text((LEFT + width, SIZE[1] - 8), "step", fill=INK, font=font, anchor="rb")
    for index in range(0, len(losses), math.ceil(len(losses) / DOTS)):
        x, y = across(steps[index]), down(losses[index])
        draw.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), fill=DOT)
    points = [(across(step), down(loss)) for step, loss in zip(steps, line, strict=True)]
    if len(points) > 1:
        draw.line(points, fill=LINE, width=2, joint="curve")
    return image


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return the exponential mean over about `WINDOW` of the run, without the pull of its start."""
    keep = 1 - 1 / max(1.0, WINDOW * len(losses))
    mean = weight = 0.0
    line = []
    for loss in losses:
        mean, weight = keep * mean + (1 - keep) * loss, keep * weight + (1 - keep)
        line.append(mean / weight)
    return line


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers that span a range; around a single number, some on both sides."""
    if high == low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    span = high - low
    unit = 10 ** math.floor(math.log10(span / about))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k * about >= span)
    return [step * k for k in range(math.floor(low / step), math.ceil(high / step) + 1)]


class Trackers:
    """Some trackers of one run, each on its own.

    Args:
        wanted: names that accelerate knows, or `GeneralTracker`s of one's own.
        folder: for those that write files.
        project: what the run is called there.
        settings: plain values that it is filed under.
        on_note: told what goes wrong.
    """

    def __init__(
        self,
        wanted: Sequence[Any],
        folder: Path,
        project: str,
        settings: Mapping[str, Any],
        on_note: Callable[[str], None],
    ) -> None:
        self._on_note = on_note
        self._running: list[tuple[str, Any]] = []
        for one in wanted:
            name = printable(str(getattr(one, "name", one)), limit=40)
            try:
                found = _start(one, folder, project, settings)
            except Exception as error:  # whatever a service's own library raises
                self._fail(name, error)
                continue
            if found is None:
                on_note(f"the tracker {name} is not installed, and training goes on without it")
            else:
                self._running.append((name, found))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Pass numbers on."""
        self._each(lambda tracker: tracker.log(dict(values), step=step))

    def finish(self) -> None:
        """Let each of them write what it still holds."""
        self._each(lambda tracker: tracker.finish())
        self._running.clear()

    def _each(self, act: Callable[[Any], object]) -> None:
        for one in list(self._running):
            try:
                act(one[1])
            except Exception as error:
                self._running.remove(one)
                self._fail(one[0], error)

    def _fail(self, name: str, error: Exception) -> None:
        reason = printable(str(error), limit=160) or type(error).__name__
        self._on_note(f"the tracker {name} failed, and training goes on without it: {reason}")


def _start(one: Any, folder: Path, project: str, settings: Mapping[str, Any]) -> Any | None:
    """Start a tracker; None where its library is not installed.

    Raises:
        Exception: of any kind.
    """
    from accelerate import Accelerator

    # accelerate is used for its trackers alone here, and they run in one process only.
    with warnings.catch_warnings(action="ignore"):  # what it would say is said by us
        accelerator = Accelerator(
            log_with=[one], project_dir=str(folder), cpu=True, mixed_precision="no"
        )
    # wandb alone asks where to write, and would write into the folder the user happens to be in.
    options = {"wandb": {"dir": str(folder)}}
    accelerator.init_trackers(project, config=dict(settings), init_kwargs=options)
    return accelerator.trackers[0] if accelerator.trackers else None


PROMPTS = ("a photo of S*", "S* on the beach", "a drawing of S*")
"""Of the contact sheets: one to recognise, one to place, one to restyle."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LoggerConfig:
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
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(steps=12))
    trackers: Sequence[Any] = ()


class TrainingLogger:
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
        watching: LoggerConfig,
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
        self, pack: DomainWeights, number: int, prepared: PreparedImage
    ) -> list[tuple[Image.Image, GenerationRecord]]:
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
