"""What every method keeps of a held-out identity and of the prompt, read by the judge: the tables of docs/mini.md."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
import torch
from PIL import Image

from e4t_cli.models.denoiser import TunedModel
from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.nn.word_embedding_encoder import FixedEmbedding
from e4t_cli.prompts import parse_prompt
from e4t_cli.registry.config import TuningConfig
from e4t_cli.registry.domain import PreparedImage
from e4t_cli.sampling import SamplingConfig, sample
from e4t_cli.training.tuning import tune
from mini_world.clip import HEADS
from mini_world.data import SUBJECTS
from mini_world.identities import ATTRIBUTES, Identity, draw_identity
from mini_world.judge import CONTEXT_NAMES, Judge, read
from mini_world.scenes import FRAMINGS, MEDIA, PLACES, ROLES
from mini_world.world import Picture, Scene, draw

VALUES = {"subject": SUBJECTS, "place": PLACES, "role": ROLES, "medium": MEDIA, "framing": FRAMINGS}
# Each prompt with the scene that it asks for; only what differs from a plain photograph is asked of the judge.
SUBJECT_PROMPTS: tuple[tuple[str, Scene], ...] = (
    ("a photo of S* on the beach", Scene(place="beach")),
    ("S* in the city", Scene(place="city")),
    ("S* as an astronaut", Scene(role="astronaut")),
    ("S* wearing a crown in the forest", Scene(role="crown", place="forest")),
    ("a photo of S* wearing a red hat", Scene(role="hat")),
    ("S* wearing a scarf in the snow", Scene(role="scarf", place="snow")),
    ("a pencil sketch of S*", Scene(medium="sketch")),
    ("an oil painting of S* on the beach", Scene(medium="oil", place="beach")),
)
ART_PROMPTS: tuple[tuple[str, Scene, str], ...] = tuple(
    (f"a {thing} in the style of S*{where}", Scene(place=place), thing)
    for thing, where, place in (
        ("tree", "", "plain"), ("house", "", "plain"), ("boat", " on the beach", "beach"), ("mountain", " in the snow", "snow"),
        ("flower", "", "plain"), ("house", " in the forest", "forest"), ("tree", " in the city", "city"),
    )
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One prompt, the scene it asks for, and for styles the thing it names."""

    prompt: str
    scene: Scene
    thing: str | None = None


def tasks_of(kind: str) -> list[Task]:
    """The prompts that a domain is judged on."""
    return [Task(*row) for row in (ART_PROMPTS if kind == "art" else SUBJECT_PROMPTS)]


@dataclass
class Scores:
    """Shares of right answers, one row an identity and one column a task."""

    identity: numpy.ndarray
    prompt: numpy.ndarray

    def summary(self) -> dict[str, float]:
        """Means, and half of the 95 % interval of each over identities."""
        result = {}
        for name in ("identity", "prompt"):
            rows = getattr(self, name).mean(1)
            result[name] = round(float(rows.mean()), 4)
            result[f"{name}±"] = round(float(1.96 * rows.std(ddof=1) / len(rows) ** 0.5), 4) if len(rows) > 1 else 0.0
        return result


def held_out_photos(kind: str, count: int, seed: int) -> list[Picture]:
    """One plain photograph each of `count` held-out identities."""
    photos = []
    for number in range(count):
        chooser = random.Random(f"photo {kind} {seed} {number}")
        photos.append(draw(draw_identity(kind, chooser, held_out=True), Scene(), chooser))
    return photos


def prepared_photo(photo: Picture) -> PreparedImage:
    """A held-out photograph as the domain would prepare it, with its mask where the subject has one."""
    mask = Image.fromarray((photo.mask() * 255).astype("uint8")) if photo.who and photo.who.kind != "art" else None
    return PreparedImage(image=photo.image, mask=mask)


def pixels_of(images: Sequence[Image.Image]) -> torch.Tensor:
    """Pictures as the judge takes them, (B, 3, 64, 64) in [-1, 1]."""
    arrays = numpy.stack([numpy.asarray(image) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def score(judge: Judge, who: Identity, tasks: Sequence[Task], images: Sequence[Image.Image]) -> tuple[list[float], list[float]]:
    """Share of the identity's attributes, and of the prompt's context words, that the judge reads in each picture."""
    values, scenes = read(judge, pixels_of(images))
    heads = [(k, name) for k, (kind, name, _) in enumerate(HEADS) if kind == who.kind]
    identity, prompt = [], []
    for row, task in enumerate(tasks):
        right = [ATTRIBUTES[who.kind][name][int(values[row, k])] == who[name] for k, name in heads]
        identity.append(sum(right) / len(right))
        asked = {name: getattr(task.scene, name) for name in ("place", "role", "medium", "framing")}
        asked = {name: value for name, value in asked.items() if value != getattr(Scene(), name)}
        asked["subject"] = task.thing or who.kind
        held = [VALUES[name][int(scenes[row, CONTEXT_NAMES.index(name)])] == value for name, value in asked.items()]
        prompt.append(sum(held) / len(held))
    return identity, prompt


def generate(model, tuned: TunedModel, tasks: Sequence[Task], seed: int, sampling: SamplingConfig) -> list[Image.Image]:
    """One picture a task."""
    prompts = [parse_prompt(task.prompt) for task in tasks]
    return list(sample(model, tuned, prompts, [seed + k for k in range(len(tasks))], sampling, batch=len(tasks)))


def draw_answers(who: Identity, tasks: Sequence[Task], seed: int) -> list[Image.Image]:
    """What a perfect method would make: the identity itself, drawn in each scene."""
    chooser = random.Random(f"answers {seed}")
    return [draw(who, task.scene, chooser, thing=task.thing).image for task in tasks]


def dreambooth_pack(model, pack: DomainWeights, word: str = "sks") -> DomainWeights:
    """DreamBooth's setting in the same loop: a rare word in front of the descriptor, no offsets, the U-Net alone learns."""
    import dataclasses

    rare = model.word_embedding(model.descriptor_id(word))
    own = model.word_embedding(model.descriptor_id(pack.descriptor))
    templates = tuple(template.replace("{}", "{} " + pack.descriptor) for template in pack.templates)
    encoder = FixedEmbedding((rare - own) / pack.embedding_scale)
    return dataclasses.replace(pack, encoder=encoder, offsets={}, templates=templates)


def dreambooth_recipe(config: TuningConfig, steps: int, rate: float) -> TuningConfig:
    """The same loop, mask and batch, with only the U-Net in training."""
    return config.replace(
        steps=steps, base_learning_rate=rate / config.batch_size, encoder_rate=0.0, offsets_rate=0.0, unet_rate=1.0
    )


Method = Callable[[PreparedImage, int], TunedModel]


def run_method(
    model,
    judge: Judge,
    kind: str,
    photos: Sequence[Picture],
    method: Method,
    sampling: SamplingConfig,
    *,
    rare: bool = False,
    seed: int = 0,
) -> Scores:
    """Score one method on every photo; `rare`: its placeholder stands before the descriptor, as in DreamBooth."""
    tasks = tasks_of(kind)
    identity, prompt = [], []
    for number, photo in enumerate(photos):
        tuned = method(prepared_photo(photo), seed + number)
        asked = tasks
        if rare:
            asked = [Task(t.prompt.replace("S*", f"S* {kind}"), t.scene, t.thing) for t in tasks]
        images = generate(model, tuned, asked, 1000 * (seed + number), sampling)
        assert photo.who is not None
        a, b = score(judge, photo.who, tasks, images)
        identity.append(a)
        prompt.append(b)
    return Scores(numpy.array(identity), numpy.array(prompt))


def tuned_method(model, pack: DomainWeights, config: TuningConfig, *, autocast: bool = False) -> Method:
    """The method itself, or any baseline that is a pack and a recipe."""
    return lambda prepared, seed: tune(model, pack, prepared, config, seed=seed, autocast=autocast)


def plain_method(model, descriptor: str) -> Method:
    """The base with the plain word."""
    plain = TunedModel.plain(model, descriptor)
    return lambda prepared, seed: plain


def drawn_scores(judge: Judge, kind: str, photos: Sequence[Picture], *, other: bool = False) -> Scores:
    """The ceiling: drawings of the identity itself; with `other`, of the next photo's identity instead."""
    tasks = tasks_of(kind)
    identity, prompt = [], []
    for number, photo in enumerate(photos):
        assert photo.who is not None
        shown = photos[(number + 1) % len(photos)].who if other else photo.who
        assert shown is not None
        a, b = score(judge, photo.who, tasks, draw_answers(shown, tasks, number))
        identity.append(a)
        prompt.append(b)
    return Scores(numpy.array(identity), numpy.array(prompt))
