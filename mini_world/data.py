"""Sets of drawings, cached in `.mini`: images as bytes, and what they show as small integers."""

from __future__ import annotations

import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy

from mini_world.captions import Caption, write_caption
from mini_world.identities import ATTRIBUTES, Identity
from mini_world.scenes import FRAMINGS, MEDIA, PLACES, ROLES
from mini_world.world import THINGS, sample

SUBJECTS = ("face", "cat", "dog", *THINGS)
WHO_KINDS = ("face", "cat", "dog", "art")
MAXIMUM_ATTRIBUTES = 7
_CHUNK = 2000


@dataclass
class Drawings:
    """A set of drawings in memory; row i of every array is drawing i.

    images (N, 64, 64, 3) uint8; labels (N, 64, 64) uint8; facts (N, 6) int8: subject, place, role, medium, framing and
    the identity's kind (-1: none); values (N, 7) int8: attribute values as positions in ATTRIBUTES, -1 where there is none.
    """

    images: numpy.ndarray
    labels: numpy.ndarray
    facts: numpy.ndarray
    values: numpy.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def select(self, rows) -> Drawings:
        """A subset: a slice, or an array of row numbers."""
        return Drawings(self.images[rows], self.labels[rows], self.facts[rows], self.values[rows])

    def identity(self, row: int) -> Identity | None:
        """The identity in drawing `row`, without its colour shift, which captions do not mention."""
        kind = int(self.facts[row, 5])
        if kind < 0:
            return None
        name = WHO_KINDS[kind]
        values = {a: ATTRIBUTES[name][a][int(v)] for a, v in zip(ATTRIBUTES[name], self.values[row], strict=False)}
        return Identity(name, values, 0)

    def caption(self, row: int, rng: random.Random) -> Caption:
        """A random caption of drawing `row`."""
        subject, place, role, medium, framing, _ = (int(v) for v in self.facts[row])
        scene = (PLACES[place], ROLES[role], MEDIA[medium], FRAMINGS[framing])
        return write_caption(SUBJECTS[subject], self.identity(row), *scene, rng)


def _draw_chunk(arguments: tuple) -> Drawings:
    start, stop, options = arguments
    count = stop - start
    drawn = Drawings(
        numpy.empty((count, 64, 64, 3), numpy.uint8),
        numpy.empty((count, 64, 64), numpy.uint8),
        numpy.empty((count, 6), numpy.int8),
        numpy.full((count, MAXIMUM_ATTRIBUTES), -1, numpy.int8),
    )
    for row, index in enumerate(range(start, stop)):
        drawing = sample(index, **options)
        drawn.images[row] = numpy.asarray(drawing.image)
        drawn.labels[row] = drawing.labels
        scene, who = drawing.scene, drawing.who
        drawn.facts[row] = (
            SUBJECTS.index(drawing.subject),
            PLACES.index(scene.place),
            ROLES.index(scene.role),
            MEDIA.index(scene.medium),
            FRAMINGS.index(scene.framing),
            WHO_KINDS.index(who.kind) if who else -1,
        )
        if who is not None:
            for column, (name, choices) in enumerate(ATTRIBUTES[who.kind].items()):
                drawn.values[row, column] = choices.index(who[name])
    return drawn


def load_drawings(folder: Path, name: str, count: int, **options) -> Drawings:
    """Draw `count` images, or load them if they were drawn before; `options` go to `world.sample`."""
    path = folder / "drawings" / f"{name}-{count}.npz"
    if path.exists():
        with numpy.load(path) as stored:
            return Drawings(**{key: stored[key] for key in ("images", "labels", "facts", "values")})
    chunks = [(start, min(start + _CHUNK, count), options) for start in range(0, count, _CHUNK)]
    with ProcessPoolExecutor() as pool:
        parts = list(pool.map(_draw_chunk, chunks))
    keys = ("images", "labels", "facts", "values")
    arrays = {key: numpy.concatenate([getattr(part, key) for part in parts]) for key in keys}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    numpy.savez(partial, **arrays)
    partial.replace(path)
    return Drawings(**arrays)
