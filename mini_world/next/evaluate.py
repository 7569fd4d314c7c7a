"""Measures what each method keeps of held-out identities and of prompts; every image is a row of a JSON lines file.

An interrupted evaluation continues where it was: identities whose rows are complete are not generated again. All tables are
computed from the rows (`tables`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
from PIL import Image

from e4t_cli.models.denoiser import TunedModel
from e4t_cli.prompts import parse_prompt
from e4t_cli.registry.domain import PreparedImage
from e4t_cli.sampling import sample
from e4t_cli.schedulers import SamplingConfig
from mini_world.next.identities import ATTRIBUTES, Identity, draw_identity
from mini_world.next.judge import Judge, Reading, classify
from mini_world.next.scores import Wanted, backdrop_visible, garment_visible, replaced, score
from mini_world.next.tasks import Task, base_words, class_tasks, overrides_of, prompts_of
from mini_world.next.world import Drawing, Scene, draw

COUNTS = {"face": 60, "cat": 40, "art": 20, "dog": 20}
SAMPLING = SamplingConfig(steps=20, guidance=3.0)
OVERRIDE_SCALE = 0.85
"""The concept scale at which attributes are asked against the photo."""
WRONG_SHARE = 0.05
WORD_PICTURES = 100

Row = dict
TuneFunction = Callable[[PreparedImage, int], TunedModel]


@dataclass(frozen=True)
class Method:
    """One row of a table: how a photo becomes a tuned model.

    rare: the placeholder stands before the descriptor, as in DreamBooth ("S* face").
    """

    tune: TuneFunction
    rare: bool = False


@dataclass(frozen=True)
class World:
    """Where photos and references come from, and how images become as large as the judge takes them.

    identity: a held-out identity of a kind; draw: its drawing in a scene. names: the attributes and degrees of each kind that
    exist in this world, None for all.
    """

    identity: Callable[[str, random.Random], Identity]
    draw: Callable[[Identity, Scene, random.Random, str | None], Drawing]
    prompts: Callable[[str], Sequence[Task]]
    resize: Callable[[Image.Image], Image.Image]
    names: Mapping[str, frozenset[str]] | None = None


def _resize(image: Image.Image) -> Image.Image:
    return image


WORLD = World(
    identity=lambda kind, rng: draw_identity(kind, rng, held_out=True),
    draw=lambda who, scene, rng, thing: draw(who, scene, rng, thing),
    prompts=prompts_of,
    resize=_resize,
)


class Rows:
    """The rows of an evaluation, appended to a file; a line that an interruption has torn is removed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path.exists():
            text = path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            if whole != text:
                with path.open("r+b") as file:
                    file.truncate(len(whole))
            self.rows = [json.loads(line) for line in whole.splitlines()]

    def of(self, **facts: object) -> list[Row]:
        """The rows with these values."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in facts.items())]

    def append(self, rows: Sequence[Row]) -> None:
        """Write rows in one piece."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        self.rows += rows


def held_out_photos(kind: str, count: int, seed: int, world: World = WORLD) -> list[Drawing]:
    """One plain photo each of `count` held-out identities."""
    photos = []
    for number in range(count):
        rng = random.Random(f"photo {kind} {seed} {number}")
        photos.append(world.draw(world.identity(kind, rng), Scene(), rng, None))
    return photos


def prepared_photo(photo: Drawing) -> PreparedImage:
    """A held-out photo as the domain would prepare it, with the mask of its subject; styles have none."""
    mask = Image.fromarray((photo.mask() * 255).astype("uint8")) if photo.who and photo.who.kind != "art" else None
    return PreparedImage(image=photo.image, mask=mask)


def pixels_of(images: Iterable[Image.Image]) -> torch.Tensor:
    """Images as a tensor (B, 3, H, W) in [-1, 1]."""
    arrays = numpy.stack([numpy.asarray(image) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def read_images(judge: Judge, kind: str, images: Sequence[Image.Image], world: World = WORLD) -> list[Reading]:
    """What the judge reads in images, as of subjects of `kind`."""
    readings = classify(judge, pixels_of(world.resize(image) for image in images))
    return [readings.of(row, kind) for row in range(len(readings))]


def wanted_of(photo: Drawing, task: Task, world: World = WORLD) -> Wanted:
    """What the image of a task should show; the photo's colours where the prompt asks for no others."""
    who = photo.who
    assert who is not None
    keep_garment = photo.garment if garment_visible(who.kind, task.scene) else None
    keep_backdrop = photo.backdrop if backdrop_visible(who.kind, task.scene) else None
    names = None if world.names is None else world.names[who.kind]
    return Wanted(who, task.scene, task.thing or who.kind, task.override, keep_garment, keep_backdrop, names)


def rows_of(
    judge: Judge, photo: Drawing, tasks: Sequence[Task], images: Sequence[Image.Image], world: World = WORLD
) -> list[Row]:
    """The scores of the image of every task, with what the task was about."""
    assert photo.who is not None
    found = []
    for number, (task, read) in enumerate(zip(tasks, read_images(judge, photo.who.kind, images, world), strict=True)):
        found.append(
            {"task": number, "about": task.about, "prompt text": task.prompt} | score(wanted_of(photo, task, world), read)
        )
    return found


def tasks_for(who: Identity, word: str, world: World = WORLD) -> list[Task]:
    """All tasks of one identity: prompts, overridden attributes, and the plain word."""
    overridden = overrides_of(who) if world.names is None else ()
    return [*world.prompts(who.kind), *overridden, *class_tasks(who.kind, word)]


def generate(
    model, tuned: TunedModel, tasks: Sequence[Task], seed: int, *, rare: str = "", sampling: SamplingConfig = SAMPLING
) -> list[Image.Image]:
    """One image per task; overridden attributes are asked for at `OVERRIDE_SCALE`. `rare`: the word after the placeholder."""
    images: dict[int, Image.Image] = {}
    for scale in (1.0, OVERRIDE_SCALE):
        some = [k for k, task in enumerate(tasks) if (task.about == "override") == (scale == OVERRIDE_SCALE)]
        if not some:
            continue
        texts = [tasks[k].prompt.replace("S*", f"S* {rare}") if rare else tasks[k].prompt for k in some]
        prompts = [parse_prompt(text, require_placeholder=False) for text in texts]
        scaled = replace(sampling, concept_scale=scale)
        drawn = sample(model, tuned, prompts, [seed + k for k in some], scaled, batch=len(some))
        images |= dict(zip(some, drawn, strict=True))
    return [images[k] for k in range(len(tasks))]


def run_method(
    rows: Rows, model, judge: Judge, name: str, method: Method, photos: Sequence[Drawing], word: str, *,
    seed: int = 0, world: World = WORLD, sampling: SamplingConfig = SAMPLING,
) -> None:  # fmt: skip
    """Generate and score what `rows` does not have yet of one method; `word` is the domain's descriptor."""
    for number, photo in enumerate(photos):
        assert photo.who is not None
        if rows.of(method=name, kind=photo.who.kind, number=number):
            continue
        tuned = method.tune(prepared_photo(photo), seed + number)
        tasks = tasks_for(photo.who, word, world)
        images = generate(model, tuned, tasks, 1000 * (seed + number), rare=word if method.rare else "", sampling=sampling)
        head = {"method": name, "kind": photo.who.kind, "number": number}
        rows.append([head | row for row in rows_of(judge, photo, tasks, images, world)])


def run_drawings(rows: Rows, judge: Judge, photos: Sequence[Drawing], word: str, world: World = WORLD) -> None:
    """The references, drawn: "drawings" (the ceiling), "one in twenty wrong" (the resolution) and "drawings of another".

    The plain word of a drawing is another identity.
    """
    for number, photo in enumerate(photos):
        who, other = photo.who, photos[(number + 1) % len(photos)].who
        assert who is not None and other is not None
        rng = random.Random(f"wrong {number}")
        wrong = degraded(who, WRONG_SHARE, rng)
        for name, shown in (("drawings", who), (f"drawings, {WRONG_SHARE:.0%} wrong", wrong), ("drawings of another", other)):
            if rows.of(method=name, kind=who.kind, number=number):
                continue
            tasks, images = tasks_for(who, word, world), []
            for k, task in enumerate(tasks):
                subject = other if task.about == "class" else shown
                if task.override:
                    subject = replaced(subject, **dict([task.override]))
                images.append(world.draw(subject, task.scene, random.Random(f"reference {number} {k}"), task.thing).image)
            head = {"method": name, "kind": who.kind, "number": number}
            rows.append([head | row for row in rows_of(judge, photo, tasks, images, world)])


def degraded(who: Identity, share: float, rng: random.Random) -> Identity:
    """The identity with every attribute wrong with probability `share`, categorical and continuous."""
    values, degrees = dict(who.values), dict(who.degrees)
    for name, value in who.values.items():
        other = rng.choice([choice for choice in ATTRIBUTES[who.kind][name] if choice != value])
        values[name] = other if rng.random() < share else value
    for name, degree in who.degrees.items():
        degrees[name] = degree - 1 if degree > 0 else degree + 1
        degrees[name] = degrees[name] if rng.random() < share else degree
    return replace(who, values=values, degrees=degrees)


def plain_method(model, word: str) -> Method:
    """The base with the plain word, without personalization: the floor, and the base that "class left" compares with."""
    plain = TunedModel.plain(model, word)
    return Method(lambda prepared, seed: plain)


def run_words(
    rows: Rows, model, judge: Judge, kind: str, *,
    count: int = WORD_PICTURES, batch: int = 25, world: World = WORLD, sampling: SamplingConfig = SAMPLING,
) -> None:  # fmt: skip
    """The base alone: `count` images of every word of `tasks.base_words`, of attributes that exist in the world."""
    word = "art" if kind == "art" else kind
    plain = TunedModel.plain(model, word)
    for asked in base_words(kind):
        name = (asked.attribute or asked.degree or ("",))[0]
        if world.names is not None and name and name not in world.names[kind]:
            continue
        done = len(rows.of(method="base", prompt=asked.prompt))
        for first in range(done, count, batch):
            seeds = list(range(first, min(first + batch, count)))
            prompts = [parse_prompt(asked.prompt, require_placeholder=False)] * len(seeds)
            images = list(sample(model, plain, prompts, seeds, sampling, batch=len(seeds)))
            found = []
            for seed, read in zip(seeds, read_images(judge, kind, images, world), strict=True):
                bound = asked.bound(read)
                facts = {"right": int(asked.right(read)), "subject": int(read.subject == ("tree" if kind == "art" else kind))}
                facts["bound"] = None if bound is None else int(bound)  # type: ignore[assignment]
                found.append({"method": "base", "kind": kind, "group": asked.group, "prompt": asked.prompt, "seed": seed} | facts)
            rows.append(found)
