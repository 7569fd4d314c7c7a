"""Draws faces, cats, dogs and things, in local units around the head (which extends 1 to each side)."""

from __future__ import annotations

import random

from mini_world.canvas import Colour, Pen, shade
from mini_world.identities import CAT_EYES, EYES, FUR, HAIR, SKIN, Identity

COLLAR: dict[str, Colour] = {"red": (220, 30, 40), "blue": (40, 80, 220)}


def draw_body(pen: Pen, colour: Colour, skin: Colour) -> None:
    """Neck and shoulders; the body continues to the lower edge of the image."""
    pen.rectangle(-1.05, 2.4, 1.05, 8.0, colour, "cloth")
    pen.ellipse(0, 2.5, 1.6, 1.1, colour, "cloth")
    pen.rectangle(-0.36, 0.8, 0.36, 1.55, shade(skin, 0.86), "skin")


def draw_face(pen: Pen, who: Identity, garment: Colour) -> None:
    """A face with all attributes of its identity; garments and hats belong to the context."""
    skin = who.tint(SKIN[who["skin"]], "skin")
    hair = who.tint(HAIR[who["hair_colour"]], "hair")
    style = who["hair_style"]
    if style == "long":
        pen.ellipse(0, -0.1, 1.28, 1.28, hair, "hair")
        pen.rectangle(-1.28, -0.1, 1.28, 1.75, hair, "hair")
    draw_body(pen, garment, skin)
    if style == "long":
        pen.rectangle(-1.28, 0.4, -0.72, 1.75, hair, "hair")
        pen.rectangle(0.72, 0.4, 1.28, 1.75, hair, "hair")
    if style == "curly":
        for x, y in (
            (0, -0.85),
            (-0.75, -0.75),
            (0.75, -0.75),
            (-1.1, -0.2),
            (1.1, -0.2),
            (-1.1, 0.35),
            (1.1, 0.35),
        ):
            pen.ellipse(x, y, 0.58, 0.56, hair, "hair")
    if style == "bun":
        pen.ellipse(0, -1.42, 0.48, 0.42, hair, "hair")
    if style == "pigtails":
        for side in (-1, 1):
            pen.ellipse(side * 1.4, 0.25, 0.4, 0.62, hair, "hair")
    for side in (-1, 1):
        pen.ellipse(side * 1.0, 0.08, 0.2, 0.26, shade(skin, 0.92), "skin")
    pen.ellipse(0, 0, 1.0, 1.18, skin, "skin")
    if style == "spiky":
        spikes = [
            (-0.62, -0.8),
            (-0.66, -1.5),
            (-0.32, -1.18),
            (0, -1.72),
            (0.32, -1.18),
            (0.66, -1.5),
            (0.62, -0.8),
        ]
        pen.polygon(spikes, hair, "hair")
        pen.cap(0.86, 1.2, -0.76, hair, "hair")
    else:
        pen.cap(1.06, 1.26, -0.5, hair, "hair")
    if who["marks"] == "rosy":
        for side in (-1, 1):
            pen.ellipse(side * 0.62, 0.42, 0.26, 0.18, (242, 92, 104), "skin")
    if who["marks"] == "freckles":
        for side in (-1, 1):
            for x, y in ((0.42, 0.34), (0.66, 0.32), (0.54, 0.5), (0.78, 0.48)):
                pen.ellipse(side * x, y, 0.065, 0.065, shade(skin, 0.55), "skin")
    if who["beard"] == "beard":
        outline = [
            (-0.97, 0.25),
            (-0.88, 0.75),
            (-0.5, 1.2),
            (0, 1.36),
            (0.5, 1.2),
            (0.88, 0.75),
            (0.97, 0.25),
        ]
        pen.polygon([*outline, (0.6, 0.52), (0, 0.46), (-0.6, 0.52)], hair, "beard")
    pen.line([(0, 0.08), (-0.1, 0.34), (0.06, 0.36)], 0.08, shade(skin, 0.7), "skin")
    pen.ellipse(0, 0.72, 0.32, 0.1, (196, 52, 60), "mouth")
    if who["beard"] == "moustache":
        pen.polygon(
            [(-0.52, 0.62), (-0.3, 0.46), (0, 0.44), (0.3, 0.46), (0.52, 0.62), (0, 0.6)],
            hair,
            "beard",
        )
    for side in (-1, 1):
        pen.line([(side * 0.2, -0.32), (side * 0.64, -0.34)], 0.11, shade(hair, 0.8), "hair")
        if who["glasses"] == "sunglasses":
            continue
        pen.ellipse(side * 0.42, 0, 0.27, 0.2, (255, 255, 255), "eyes")
        pen.ellipse(side * 0.42, 0, 0.17, 0.18, EYES[who["eyes"]], "eyes")
        pen.ellipse(side * 0.42, 0, 0.07, 0.08, (10, 10, 14), "eyes")
    _draw_glasses(pen, who["glasses"])


def _draw_glasses(pen: Pen, kind: str) -> None:
    if kind == "none":
        return
    dark, red = (18, 18, 24), (216, 24, 48)
    for side in (-1, 1):
        x = side * 0.42
        if kind == "round":
            pen.ring(x, 0, 0.4, 0.38, 0.1, dark, "glasses")
        elif kind == "square":
            pen.frame(x - 0.38, -0.28, x + 0.38, 0.28, 0.11, red, "glasses")
        else:
            pen.ellipse(x, 0.02, 0.42, 0.32, dark, "glasses")
    pen.line([(-0.06, -0.02), (0.06, -0.02)], 0.1, red if kind == "square" else dark, "glasses")


def _fur(who: Identity) -> tuple[Colour, Colour]:
    """The colours of the coat and of its markings."""
    coat = who.tint(FUR[who["fur"]], "fur")
    light = sum(coat) > 330
    return coat, (shade(coat, 0.45) if light else (236, 226, 206))


def draw_cat(pen: Pen, who: Identity) -> None:
    """A cat from the front, with tail, whiskers and the pattern of its coat."""
    coat, marking = _fur(who)
    pen.line([(1.0, 3.4), (1.9, 3.0), (2.0, 2.0), (1.7, 1.6)], 0.36, coat, "animal")
    pen.ellipse(0, 2.6, 1.15, 1.6, coat, "animal")
    pen.rectangle(-1.15, 2.6, 1.15, 8.0, coat, "animal")
    if who["pattern"] == "striped":
        for y in (1.9, 2.5, 3.1):
            for side in (-1, 1):
                pen.line([(side * 1.1, y), (side * 0.45, y + 0.12)], 0.2, marking, "animal")
    if who["pattern"] == "patched":
        pen.ellipse(0.5, 2.6, 0.5, 0.7, marking, "animal")
    for side in (-1, 1):
        if who["ears"] == "pointed":
            pen.polygon([(side * 0.95, -0.2), (side * 0.98, -1.4), (side * 0.2, -0.8)], coat, "animal")
            pen.polygon(
                [(side * 0.82, -0.5), (side * 0.86, -1.1), (side * 0.42, -0.78)],
                (244, 150, 158),
                "animal",
            )
        elif who["ears"] == "round":
            pen.ellipse(side * 0.75, -0.8, 0.44, 0.44, coat, "animal")
            pen.ellipse(side * 0.75, -0.8, 0.24, 0.24, (244, 150, 158), "animal")
        else:
            pen.polygon(
                [(side * 0.3, -0.85), (side * 1.05, -0.9), (side * 0.98, -0.3)],
                shade(coat, 0.72),
                "animal",
            )
    pen.ellipse(0, 0, 1.12, 0.98, coat, "animal")
    if who["pattern"] == "striped":
        for x in (-0.32, 0, 0.32):
            pen.line([(x, -0.9), (x, -0.45)], 0.15, marking, "animal")
        for side in (-1, 1):
            pen.line([(side * 1.1, 0.1), (side * 0.75, 0.14)], 0.15, marking, "animal")
    if who["pattern"] == "patched":
        pen.ellipse(0.45, -0.1, 0.5, 0.52, marking, "animal")
    if who["pattern"] == "masked":
        pen.ellipse(0, 0.25, 0.72, 0.62, marking, "animal")
    for side in (-1, 1):
        pen.ellipse(side * 0.45, -0.08, 0.27, 0.25, CAT_EYES[who["eyes"]], "animal")
        pen.ellipse(side * 0.45, -0.08, 0.08, 0.23, (10, 10, 14), "animal")
        for dy in (-0.06, 0.14):
            pen.line([(side * 0.4, 0.42), (side * 1.3, 0.4 + dy * 2)], 0.05, (250, 250, 250), "animal")
    pen.polygon([(-0.14, 0.24), (0.14, 0.24), (0, 0.4)], (238, 110, 130), "animal")
    pen.line([(-0.24, 0.55), (0, 0.46), (0.24, 0.55)], 0.07, (60, 30, 34), "animal")
    _draw_collar(pen, who["collar"], 1.02)


def draw_dog(pen: Pen, who: Identity) -> None:
    """A dog from the front, with a muzzle and a big nose."""
    coat, marking = _fur(who)
    pen.ellipse(0, 2.7, 1.25, 1.6, coat, "animal")
    pen.rectangle(-1.25, 2.7, 1.25, 8.0, coat, "animal")
    if who["pattern"] == "spotted":
        for x, y in ((-0.6, 2.0), (0.5, 2.3), (-0.3, 2.9), (0.7, 3.1)):
            pen.ellipse(x, y, 0.24, 0.24, marking, "animal")
    if who["pattern"] == "patched":
        pen.ellipse(-0.5, 2.6, 0.5, 0.7, marking, "animal")
    for side in (-1, 1):
        if who["ears"] == "pointed":
            pen.polygon(
                [(side * 0.9, -0.1), (side * 0.85, -1.3), (side * 0.25, -0.75)],
                shade(coat, 0.8),
                "animal",
            )
    pen.ellipse(0, 0, 1.0, 1.02, coat, "animal")
    if who["pattern"] == "patched":
        pen.ellipse(-0.42, -0.15, 0.42, 0.46, marking, "animal")
    if who["pattern"] == "spotted":
        for x, y in ((-0.5, -0.6), (0.3, -0.7), (0.75, 0.0), (-0.8, 0.2)):
            pen.ellipse(x, y, 0.18, 0.18, marking, "animal")
    muzzle = marking if who["pattern"] == "masked" else shade(coat, 1.16)
    length = 0.52 if who["muzzle"] == "long" else 0.34
    pen.ellipse(0, 0.55 + length * 0.4, 0.56, length + 0.14, muzzle, "animal")
    for side in (-1, 1):
        if who["ears"] == "floppy":
            pen.ellipse(side * 1.0, 0.05, 0.34, 0.8, shade(coat, 0.66), "animal")
        pen.ellipse(side * 0.4, -0.14, 0.19, 0.21, (255, 255, 255), "animal")
        pen.ellipse(side * 0.4, -0.12, 0.13, 0.16, (40, 24, 14), "animal")
    pen.ellipse(0, 0.42, 0.25, 0.18, (16, 14, 18), "animal")
    pen.line([(-0.28, 0.85), (0, 0.74), (0.28, 0.85)], 0.08, (60, 30, 34), "animal")
    pen.ellipse(0, 1.0, 0.16, 0.2, (240, 100, 120), "animal")
    _draw_collar(pen, who["collar"], 1.22)


def _draw_collar(pen: Pen, kind: str, y: float) -> None:
    if kind == "none":
        return
    pen.line([(-0.85, y), (0, y + 0.22), (0.85, y)], 0.24, COLLAR[kind], "animal")
    pen.ellipse(0, y + 0.34, 0.17, 0.17, (255, 216, 60), "animal")


def draw_thing(pen: Pen, thing: str, rng: random.Random) -> None:
    """A simple subject for styles: tree, house, mountain, boat or flower, about two units high."""
    if thing == "tree":
        pen.rectangle(-0.22, 0.5, 0.22, 1.7, (98, 64, 36))
        for x, y, r in ((-0.55, 0.1, 0.7), (0.55, 0.1, 0.7), (0, -0.6, 0.85)):
            pen.ellipse(x, y, r, r, (40 + rng.randint(0, 30), 140, 50))
    elif thing == "house":
        pen.rectangle(-1.1, -0.1, 1.1, 1.5, (226, 204, 164))
        pen.polygon([(-1.4, -0.1), (0, -1.3), (1.4, -0.1)], (188, 56, 44))
        pen.rectangle(-0.25, 0.5, 0.3, 1.5, (96, 56, 30))
        for x in (-0.8, 0.55):
            pen.rectangle(x, 0.2, x + 0.36, 0.62, (140, 200, 240))
    elif thing == "mountain":
        pen.polygon([(-2.0, 1.6), (-0.6, -0.8), (0.6, 1.6)], (96, 104, 126))
        pen.polygon([(-1.0, 1.6), (0.6, -1.4), (2.2, 1.6)], (120, 128, 150))
        pen.polygon([(0.18, -0.62), (0.6, -1.4), (1.04, -0.6), (0.6, -0.8)], (250, 250, 255))
    elif thing == "boat":
        pen.polygon([(-1.5, 0.8), (1.5, 0.8), (1.0, 1.5), (-1.0, 1.5)], (146, 84, 44))
        pen.line([(0, 0.8), (0, -1.4)], 0.14, (80, 50, 30))
        pen.polygon([(0.12, -1.3), (1.2, 0.55), (0.12, 0.55)], (248, 248, 244))
        pen.polygon([(-0.12, -0.9), (-0.95, 0.55), (-0.12, 0.55)], (224, 60, 60))
    else:
        pen.line([(0, 0.2), (0, 1.7)], 0.18, (50, 140, 60))
        pen.ellipse(0.45, 1.1, 0.4, 0.18, (50, 150, 60))
        for x, y in ((0, -0.75), (0.72, -0.22), (0.44, 0.55), (-0.44, 0.55), (-0.72, -0.22)):
            pen.ellipse(x, y, 0.44, 0.44, (236, 84, 140))
        pen.ellipse(0, 0, 0.36, 0.36, (255, 210, 60))
