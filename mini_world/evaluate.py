"""Measures how much of a held-out identity and of the prompt each method keeps: the tables of docs/mini.md."""

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
from e4t_cli.sampling import sample
from e4t_cli.schedulers import SamplingConfig
from e4t_cli.training.tuning import tune
from mini_world.clip import HEADS
from mini_world.data import SUBJECTS
from mini_world.identities import ATTRIBUTES, Identity, draw_identity
from mini_world.judge import CONTEXT_NAMES, Judge, classify
from mini_world.scenes import FRAMINGS, MEDIA, PLACES, ROLES
from mini_world.world import Drawing, Scene, draw

VALUES = {"subject": SUBJECTS, "place": PLACES, "role": ROLES, "medium": MEDIA, "framing": FRAMINGS}
# Each prompt with its scene; the judge classifies only what differs from a plain photo.
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
    """One prompt, its scene, and for styles the thing it names."""

    prompt: str
    scene: Scene
    thing: str | None = None


def tasks_of(kind: str) -> list[Task]:
    """The prompts that a domain is evaluated on."""
    return [Task(*row) for row in (ART_PROMPTS if kind == "art" else SUBJECT_PROMPTS)]


@dataclass
class Scores:
    """Shares of correct classifications, one row per identity and one column per task."""

    identity: numpy.ndarray
    prompt: numpy.ndarray

    def summary(self) -> dict[str, float]:
        """Means over identities, and half of their 95 % intervals."""
        result = {}
        for name in ("identity", "prompt"):
            rows = getattr(self, name).mean(1)
            result[name] = round(float(rows.mean()), 4)
            result[f"{name}±"] = round(float(1.96 * rows.std(ddof=1) / len(rows) ** 0.5), 4) if len(rows) > 1 else 0.0
        return result


def held_out_photos(kind: str, count: int, seed: int) -> list[Drawing]:
    """One plain photo each of `count` held-out identities."""
    photos = []
    for number in range(count):
        rng = random.Random(f"photo {kind} {seed} {number}")
        photos.append(draw(draw_identity(kind, rng, held_out=True), Scene(), rng))
    return photos


def prepared_photo(photo: Drawing) -> PreparedImage:
    """A held-out photo as the domain would prepare it, with the mask of its subject; styles have none."""
    mask = Image.fromarray((photo.mask() * 255).astype("uint8")) if photo.who and photo.who.kind != "art" else None
    return PreparedImage(image=photo.image, mask=mask)


def pixels_of(images: Sequence[Image.Image]) -> torch.Tensor:
    """Images as a tensor (B, 3, 64, 64) in [-1, 1]."""
    arrays = numpy.stack([numpy.asarray(image) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def score(judge: Judge, who: Identity, tasks: Sequence[Task], images: Sequence[Image.Image]) -> tuple[list[float], list[float]]:
    """Shares of the identity's attributes and of the prompt's context words that the judge finds in each image."""
    values, scenes = classify(judge, pixels_of(images))
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
    """One image per task."""
    prompts = [parse_prompt(task.prompt) for task in tasks]
    return list(sample(model, tuned, prompts, [seed + k for k in range(len(tasks))], sampling, batch=len(tasks)))


def draw_references(who: Identity, tasks: Sequence[Task], seed: int) -> list[Image.Image]:
    """The result of a perfect method: the identity, drawn in each scene."""
    rng = random.Random(f"answers {seed}")
    return [draw(who, task.scene, rng, thing=task.thing).image for task in tasks]


def dreambooth_weights(model, pretrained: DomainWeights, word: str = "sks") -> DomainWeights:
    """DreamBooth in the same loop: a rare word before the descriptor, no offsets; only the U-Net is trained."""
    import dataclasses

    rare = model.word_embedding(model.descriptor_id(word))
    own = model.word_embedding(model.descriptor_id(pretrained.descriptor))
    templates = tuple(template.replace("{}", "{} " + pretrained.descriptor) for template in pretrained.templates)
    encoder = FixedEmbedding((rare - own) / pretrained.embedding_scale)
    return dataclasses.replace(pretrained, encoder=encoder, offsets={}, templates=templates)


def dreambooth_config(config: TuningConfig, steps: int, rate: float) -> TuningConfig:
    """The same loop, mask and batch; only the U-Net is trained."""
    return config.replace(
        steps=steps, base_learning_rate=rate / config.batch_size, encoder_rate=0.0, offsets_rate=0.0, unet_rate=1.0
    )


Method = Callable[[PreparedImage, int], TunedModel]


def run_method(
    model,
    judge: Judge,
    kind: str,
    photos: Sequence[Drawing],
    method: Method,
    sampling: SamplingConfig,
    *,
    rare: bool = False,
    seed: int = 0,
) -> Scores:
    """Score one method on every photo; `rare`: the placeholder is followed by the descriptor, as in DreamBooth."""
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


def tuned_method(model, pretrained: DomainWeights, config: TuningConfig, *, autocast: bool = False) -> Method:
    """Tuning with the given domain weights and config: the method, or a baseline."""
    return lambda prepared, seed: tune(model, pretrained, prepared, config, seed=seed, autocast=autocast)


def plain_method(model, descriptor: str) -> Method:
    """The base with the plain word, without personalization."""
    plain = TunedModel.plain(model, descriptor)
    return lambda prepared, seed: plain


def drawn_scores(judge: Judge, kind: str, photos: Sequence[Drawing], *, other: bool = False) -> Scores:
    """The maximum: drawings of the identity; with `other`, of the next photo's identity instead."""
    tasks = tasks_of(kind)
    identity, prompt = [], []
    for number, photo in enumerate(photos):
        assert photo.who is not None
        drawn = photos[(number + 1) % len(photos)].who if other else photo.who
        assert drawn is not None
        a, b = score(judge, photo.who, tasks, draw_references(drawn, tasks, number))
        identity.append(a)
        prompt.append(b)
    return Scores(numpy.array(identity), numpy.array(prompt))
