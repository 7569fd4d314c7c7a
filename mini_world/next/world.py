"""Drawings by number: number `index` of seed `seed` is always the same drawing.

A `Drawing` has all facts about its content, for captions in random wordings and as labels for the judge.
"""

from __future__ import annotations

import colorsys
import random
from dataclasses import dataclass

import numpy
from PIL import Image

from mini_world.next import animals, faces
from mini_world.next.canvas import LABEL_ID, Canvas, Colour
from mini_world.next.identities import Identity, draw_identity
from mini_world.next.media import render_medium
from mini_world.next.scenes import (
    COLOURED_ROLES,
    COLOURS,
    FRAMINGS,
    MEDIA,
    PLACES,
    ROLES,
    draw_place,
    draw_role,
    draw_role_behind,
)
from mini_world.next.styles import render_style
from mini_world.next.things import THINGS, draw_thing

# Part of the name of stored drawings: count it up with every change of what is drawn.
VERSION = 3

KINDS = ("face", "cat", "dog", "art", "thing")
KIND_SHARES = (0.42, 0.18, 0.14, 0.18, 0.08)
# The labels of the subject; accessories and clothes belong to the context.
SUBJECT_LABELS = tuple(LABEL_ID[name] for name in ("skin", "hair", "eyes", "mouth", "glasses", "beard", "animal"))

# Where the head is, and how many pixels it extends to each side: for faces, animals, and things.
_HEADS = {
    "face": {"normal": (64, 66, 28.0), "close": (64, 68, 37.0), "afar": (64, 54, 19.2)},
    "animal": {"normal": (64, 60, 26.0), "close": (64, 66, 35.0), "afar": (64, 62, 18.8)},
    "thing": {"normal": (64, 68, 30.0), "close": (64, 68, 39.0), "afar": (64, 76, 18.0)},
}


@dataclass(frozen=True)
class Scene:
    """The context of a drawing; the caption names all of it."""

    place: str = "plain"
    role: str = "none"
    colour: str = "none"  # of a hat or a scarf
    medium: str = "photo"
    framing: str = "normal"


@dataclass(frozen=True)
class Drawing:
    """A drawing (RGB 128 by 128), its label map, and what it shows."""

    image: Image.Image
    labels: numpy.ndarray  # (128, 128) uint8, see canvas.LABELS
    subject: str  # the word: "face", "cat", "dog", or one of THINGS
    who: Identity | None
    scene: Scene
    garment: Colour | None  # of a face's clothes
    backdrop: Colour | None  # of a plain background

    def mask(self) -> numpy.ndarray:
        """Which pixels show the subject, bool (128, 128)."""
        return numpy.isin(self.labels, SUBJECT_LABELS)


def _random_colour(rng: random.Random, saturation: tuple[float, float], value: tuple[float, float]) -> Colour:
    channels = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))
    return tuple(round(255 * channel) for channel in channels)  # type: ignore[return-value]


def draw(
    who: Identity | None,
    scene: Scene,
    rng: random.Random,
    thing: str | None = None,
    garment: Colour | None = None,
    backdrop: Colour | None = None,
) -> Drawing:
    """Draw one subject in one scene.

    What is not given (a thing, the colours of clothes and background, the exact position) is random from `rng`, of which
    every call takes equally many numbers: drawings from equal states differ in what was asked for only.
    """
    # One generator for each part, so that no part depends on what another one has drawn.
    place_rng, position_rng, subject_rng, medium_rng = (random.Random(rng.getrandbits(64)) for _ in range(4))
    any_thing = subject_rng.choice(THINGS)
    any_garment = _random_colour(subject_rng, (0.25, 0.8), (0.35, 0.92))
    any_backdrop = _random_colour(subject_rng, (0.08, 0.5), (0.55, 0.92))
    thing, garment, backdrop = thing or any_thing, garment or any_garment, backdrop or any_backdrop
    canvas = Canvas()
    draw_place(canvas, scene.place, backdrop, place_rng)
    kind = who.kind if who is not None else "thing"
    x, y, unit = _HEADS["face" if kind == "face" else "animal" if kind in ("cat", "dog") else "thing"][scene.framing]
    if scene.role == "astronaut" and scene.framing == "close":
        unit *= 0.92  # so that the helmet is in the picture
    sideways = 12.0 if scene.framing == "afar" else 4.0
    pen = canvas.at(
        x + position_rng.uniform(-sideways, sideways),
        y + position_rng.uniform(-3.0, 3.0),
        unit * position_rng.uniform(0.96, 1.05),
    )
    if who is None or kind == "art":
        if kind == "art":
            # Pale, because two colours have to tell the thing from its background.
            canvas.veil(0.5)
        draw_thing(pen, thing, subject_rng)
        subject = thing
    else:
        subject = kind
        draw_role_behind(pen, scene.role)
        if kind == "face":
            faces.draw_face(pen, who, garment)
        elif kind == "cat":
            animals.draw_cat(pen, who)
        else:
            animals.draw_dog(pen, who)
        draw_role(pen, faces.head_pen(pen, who), scene.role, scene.colour, animal=kind != "face")
    image = canvas.rendered()
    if kind == "art" and who is not None:
        image = render_style(image, who)
    else:
        image = render_medium(image, scene.medium, medium_rng)
    return Drawing(
        image,
        canvas.label_map(),
        subject,
        who,
        scene,
        garment if kind == "face" else None,
        backdrop if scene.place == "plain" else None,
    )


def _draw_scene(kind: str, rng: random.Random) -> Scene:
    def often(usual: str, share: float, choices: tuple[str, ...]) -> str:
        return usual if rng.random() < share else rng.choice([c for c in choices if c != usual])

    role = often("none", 0.45, ROLES) if kind in ("face", "cat", "dog") else "none"
    return Scene(
        place=often("plain", 0.36, PLACES),
        role=role,
        colour=rng.choice(COLOURS[1:]) if role in COLOURED_ROLES else "none",
        medium=often("photo", 0.68, MEDIA) if kind != "art" else "photo",
        framing=often("normal", 0.7, FRAMINGS),
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
    return draw(who, scene, rng, None)
