"""Drawings by number: number `index` of seed `seed` is always the same drawing.

A `Drawing` has all facts about its content, for captions in random wordings and as labels for the judge.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy
from PIL import Image

from mini_world.canvas import LABEL_ID, Canvas
from mini_world.captions import Caption, write_caption
from mini_world.identities import Identity, draw_identity
from mini_world.scenes import (
    FRAMINGS,
    MEDIA,
    PLACES,
    ROLES,
    draw_place,
    draw_role,
    draw_role_behind,
    render_medium,
    render_style,
)
from mini_world.subjects import draw_cat, draw_dog, draw_face, draw_thing

THINGS = ("tree", "house", "mountain", "boat", "flower")
KINDS = ("face", "cat", "dog", "art", "thing")
KIND_SHARES = (0.46, 0.17, 0.10, 0.20, 0.07)
# The labels of the subject; accessories and clothes belong to the context.
SUBJECT_LABELS = tuple(LABEL_ID[name] for name in ("skin", "hair", "eyes", "mouth", "glasses", "beard", "animal"))


@dataclass(frozen=True)
class Scene:
    """The context of a drawing; the caption names all of it."""

    place: str = "plain"
    role: str = "none"
    medium: str = "photo"
    framing: str = "normal"


@dataclass(frozen=True)
class Drawing:
    """A drawing (RGB 64 by 64), its label map, and what it shows."""

    image: Image.Image
    labels: numpy.ndarray  # (64, 64) uint8, see canvas.LABELS
    subject: str  # the word: "face", "cat", "dog", or one of THINGS
    who: Identity | None
    scene: Scene

    def caption(self, rng: random.Random) -> Caption:
        """A random caption of the drawing."""
        scene = self.scene
        return write_caption(self.subject, self.who, scene.place, scene.role, scene.medium, scene.framing, rng)

    def mask(self) -> numpy.ndarray:
        """Which pixels show the subject, bool (64, 64)."""
        return numpy.isin(self.labels, SUBJECT_LABELS)


def draw(who: Identity | None, scene: Scene, rng: random.Random, thing: str | None = None) -> Drawing:
    """Draw one subject in one scene; everything else (garment, exact position) is random from `rng`."""
    canvas = Canvas()
    draw_place(canvas, scene.place, rng)
    kind = who.kind if who is not None else "thing"
    head = {"normal": (32, 34, 14.2), "close": (32, 36, 19.5), "afar": (32, 27, 8.4)}[scene.framing]
    if kind in ("cat", "dog"):
        head = {"normal": (32, 28, 12.6), "close": (32, 34, 18.0), "afar": (32, 32, 7.6)}[scene.framing]
    elif kind in ("art", "thing"):
        head = {"normal": (32, 34, 14.5), "close": (32, 34, 19.0), "afar": (32, 38, 8.5)}[scene.framing]
    sideways = 6.0 if scene.framing == "afar" else 2.0
    x, y, unit = head
    pen = canvas.at(
        x + rng.uniform(-sideways, sideways),
        y + rng.uniform(-1.5, 1.5),
        unit * rng.uniform(0.95, 1.06),
    )
    if kind in ("art", "thing"):
        subject = thing or rng.choice(THINGS)
        draw_thing(pen, subject, rng)
    else:
        assert who is not None
        subject = kind
        draw_role_behind(pen, scene.role)
        if kind == "face":
            garment = tuple(rng.randint(30, 220) for _ in range(3))
            draw_face(pen, who, garment)  # type: ignore[arg-type]
        elif kind == "cat":
            draw_cat(pen, who)
        else:
            draw_dog(pen, who)
        draw_role(pen, scene.role, rng)
    image = canvas.rendered()
    if kind == "art" and who is not None:
        image = render_style(image, who)
    else:
        image = render_medium(image, scene.medium, rng)
    return Drawing(image, canvas.label_map(), subject, who, scene)


def _draw_scene(kind: str, rng: random.Random) -> Scene:
    def often(usual: str, share: float, choices: tuple[str, ...]) -> str:
        return usual if rng.random() < share else rng.choice([c for c in choices if c != usual])

    return Scene(
        place=often("plain", 0.36, PLACES),
        role=often("none", 0.5, ROLES) if kind in ("face", "cat", "dog") else "none",
        medium=often("photo", 0.7, MEDIA) if kind != "art" else "photo",
        framing=often("normal", 0.72, FRAMINGS),
    )


def sample(
    index: int,
    seed: int = 0,
    *,
    kind: str | None = None,
    held_out: bool = False,
    portrait: bool = False,
) -> Drawing:
    """Drawing number `index`: any kind in any scene, or portraits (plain photos) of one kind.

    Drawings 2k and 2k + 1 show the same identity in different scenes.
    """
    pair = random.Random(f"{seed} pair {index // 2} {kind} {held_out}")
    kind = kind or pair.choices(KINDS, KIND_SHARES)[0]
    who = None if kind == "thing" else draw_identity(kind, pair, held_out=held_out)
    rng = random.Random(f"{seed} picture {index} {kind} {held_out} {portrait}")
    if portrait:
        place = rng.choice(PLACES) if kind == "art" else "plain"
        scene = Scene(place=place, framing=rng.choices(FRAMINGS, (0.75, 0.25, 0.0))[0])
    else:
        scene = _draw_scene(kind, rng)
    return draw(who, scene, rng)
