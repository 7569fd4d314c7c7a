"""Draws faces, in local units around the head, which extends about one unit to each side of its centre."""

from __future__ import annotations

import math

from mini_world.next.canvas import Colour, Pen, lightness, mix, shade, tinted
from mini_world.next.identities import EYES, FRAMES, HAIR, SKIN, Identity

INK: Colour = (18, 16, 22)
WHITE: Colour = (255, 255, 255)


def head_pen(pen: Pen, who: Identity) -> Pen:
    """The pen of the head, which is wider or narrower than the body's."""
    wide = who.degrees["width"]
    return pen.stretched(1 + 0.16 * wide, 1 - 0.05 * wide)


def draw_face(pen: Pen, who: Identity, garment: Colour) -> None:
    """A face with all attributes of its identity; garments and hats belong to the context."""
    skin = SKIN[who["skin"]]
    hair = tinted(HAIR[who["hair_colour"]], who.degrees["tint"])
    head = head_pen(pen, who)
    _draw_hair_behind(head, who["hair_style"], hair)
    _draw_body(pen, garment, skin)
    if who["hair_style"] == "long":
        for side in (-1, 1):
            head.polygon(
                [(side * x, y) for x, y in ((0.8, 0.2), (1.3, 0.0), (1.42, 1.7), (1.2, 1.95), (0.84, 1.8), (0.76, 1.2))],
                hair,
                "hair",
            )
    for side in (-1, 1):
        head.ellipse(side * 1.0, 0.1, 0.2, 0.27, shade(skin, 0.9), "skin")
        head.ellipse(side * 1.03, 0.1, 0.09, 0.14, shade(skin, 0.74), "skin")
    head.ellipse(0, 0, 1.0, 1.2, skin, "skin")
    _draw_marks(head, who["marks"], skin)
    if who["beard"] == "beard":
        _draw_beard(head, hair, _edge_of_beard(who, hair))
    _draw_hair_before(head, who["hair_style"], hair)
    head.line([(0.02, 0.06), (-0.11, 0.32), (0.05, 0.36)], 0.085, shade(skin, 0.7), "skin")
    _draw_mouth(head, who["mouth"])
    if who["beard"] == "moustache":
        _draw_moustache(head, hair, _edge_of_beard(who, hair))
    _draw_eyes(head, who, skin, hair)


def _draw_body(pen: Pen, colour: Colour, skin: Colour) -> None:
    """Neck and shoulders with a collar; the body continues to the lower edge of the image."""
    pen.rectangle(-1.72, 2.55, 1.72, 8.0, colour, "cloth")
    pen.ellipse(0, 2.55, 1.72, 1.15, colour, "cloth")
    pen.ellipse(0, 1.5, 0.62, 0.34, shade(colour, 0.72), "cloth")
    shadow = mix(shade(skin, 0.86), (150, 60, 40), 0.16)
    pen.rectangle(-0.38, 0.8, 0.38, 1.5, shadow, "skin")
    pen.bowl(0, 1.5, 0.38, 0.22, shadow, "skin")


def _draw_hair_behind(head: Pen, style: str, hair: Colour) -> None:
    """The part of the hair that lies behind face and body."""
    dark = shade(hair, 0.82)
    if style == "long":
        head.ellipse(0, -0.12, 1.3, 1.32, hair, "hair")
        head.polygon([(-1.3, -0.1), (1.3, -0.1), (1.42, 1.7), (-1.42, 1.7)], dark, "hair")
    elif style == "curly":
        for x, y in ((0, -0.95), (-0.62, -0.88), (0.62, -0.88), (-1.05, -0.42), (1.05, -0.42), (-1.2, 0.16), (1.2, 0.16)):
            head.ellipse(x, y, 0.54, 0.52, hair, "hair")
        for side in (-1, 1):
            head.ellipse(side * 1.1, 0.62, 0.42, 0.42, dark, "hair")
    elif style == "bun":
        head.ellipse(0, -1.5, 0.52, 0.46, hair, "hair")
        head.curve(0, -1.62, 0.3, 0.3, 2.2, 0.09, dark, "hair")
    elif style == "pigtails":
        for side in (-1, 1):
            tail = ((1.05, -0.15), (1.4, -0.34), (1.62, 0.2), (1.58, 0.9), (1.36, 1.3), (1.16, 0.8))
            head.polygon([(side * x, y) for x, y in tail], hair, "hair")
            head.line([(side * 1.36, 0.2), (side * 1.37, 0.8)], 0.1, dark, "hair")
            head.ellipse(side * 1.14, -0.14, 0.2, 0.22, (240, 240, 246), "hair")
    elif style == "spiky":
        spikes = [(1.02, 0.1), (1.42, -0.28), (1.06, -0.42), (1.36, -0.98), (0.86, -0.84), (0.84, -1.6), (0.36, -1.12)]
        head.polygon([*spikes, (0, -1.86), *((-x, y) for x, y in reversed(spikes))], hair, "hair")


def _draw_hair_before(head: Pen, style: str, hair: Colour) -> None:
    """The hair on the forehead and what hangs before the ears, with a lighter streak."""
    light = mix(hair, WHITE, 0.22)
    if style == "short":
        head.cap(1.06, 1.3, -0.5, hair, "hair")
        for side in (-1, 1):
            head.polygon([(side * 1.06, -0.55), (side * 0.84, -0.55), (side * 0.88, 0.02), (side * 1.03, 0.02)], hair, "hair")
        head.polygon([(-0.94, -0.55), (0.94, -0.55), (0.5, -0.42), (-0.2, -0.5), (-0.7, -0.3)], hair, "hair")
        head.curve(0.1, -0.5, 0.74, -0.56, 1.0, 0.1, light, "hair")
    elif style == "spiky":
        head.cap(0.98, 1.22, -0.62, hair, "hair")
        for x in (-0.6, -0.2, 0.2, 0.6):
            head.polygon([(x - 0.22, -0.66), (x + 0.22, -0.66), (x + 0.04, -0.4)], hair, "hair")
        head.line([(-0.3, -1.1), (-0.12, -1.38)], 0.1, light, "hair")
        head.line([(0.3, -1.0), (0.5, -1.24)], 0.1, light, "hair")
    elif style == "curly":
        head.cap(1.0, 1.24, -0.76, hair, "hair")
        for x, y in ((-0.72, -0.66), (-0.26, -0.78), (0.26, -0.78), (0.72, -0.66)):
            head.ellipse(x, y, 0.32, 0.3, hair, "hair")
        for x, y in ((-0.6, -1.0), (0.0, -1.12), (0.6, -1.0)):
            head.curve(x, y, 0.24, -0.22, 2.4, 0.09, light, "hair")
    elif style == "bun":
        head.cap(1.05, 1.28, -0.62, hair, "hair")
        head.line([(-0.42, -1.14), (0.42, -1.14)], 0.13, (240, 240, 246), "hair")
        for side in (-1, 1):
            head.polygon([(side * 1.06, -0.66), (side * 0.9, -0.66), (side * 0.98, 0.62), (side * 1.1, 0.4)], hair, "hair")
        head.curve(0, -0.4, 0.7, -0.5, 1.4, 0.09, light, "hair")
    else:
        # A parting in the middle: long hair and pigtails.
        head.cap(1.08, 1.3, -0.62, hair, "hair")
        for side in (-1, 1):
            head.polygon(
                [
                    (0, -0.98),
                    (side * 0.5, -0.66),
                    (side * 1.0, -0.62),
                    (side * 1.08, -0.55),
                    (side * 1.0, 0.0),
                    (side * 0.8, -0.4),
                ],
                hair,
                "hair",
            )
        head.line([(0, -1.2), (0, -0.76)], 0.08, shade(hair, 0.72), "hair")
        for side in (-1, 1):
            head.curve(side * 0.42, -0.5, 0.42, -0.5, 1.1, 0.1, light, "hair")


def _draw_marks(head: Pen, marks: str, skin: Colour) -> None:
    if marks == "rosy":
        for side in (-1, 1):
            head.ellipse(side * 0.62, 0.47, 0.25, 0.18, mix(skin, (240, 64, 88), 0.62), "skin")
    elif marks == "freckles":
        dark = shade(skin, 0.42 if lightness(skin) < 110 else 0.6)
        for side in (-1, 1):
            for x, y in ((0.4, 0.42), (0.62, 0.38), (0.84, 0.42), (0.51, 0.58), (0.73, 0.58)):
                head.ellipse(side * x, y, 0.083, 0.078, dark, "skin")


def _edge_of_beard(who: Identity, hair: Colour) -> Colour:
    """A colour for the edge that sets a beard off from the skin, also where both are dark or both light."""
    if who["hair_colour"] in ("black", "brunette", "blue") and who["skin"] in ("bronze", "ebony"):
        return mix(SKIN[who["skin"]], WHITE, 0.42)
    return shade(hair, 0.62)


def _draw_beard(head: Pen, hair: Colour, edge: Colour) -> None:
    for grow, colour in ((0.075, edge), (0.0, hair)):
        angles = [math.pi * k / 16 for k in range(17)]
        outer = [((1.0 + grow * 0.3) * math.cos(a), 0.16 + (1.22 + grow) * math.sin(a)) for a in angles]
        # The cheeks stay free for marks.
        half = [(0.9, 0.3), (0.83, 0.7 - grow), (0.56, 0.74 - grow), (0.4, 0.58 - grow), (0.2, 0.45 - grow)]
        upper = [*((-x, y) for x, y in half), *reversed(half)]
        head.polygon([*outer, *upper], colour, "beard")


def _draw_moustache(head: Pen, hair: Colour, edge: Colour) -> None:
    half = [(0.14, 0.46), (0.36, 0.47), (0.58, 0.62), (0.66, 0.74), (0.4, 0.7), (0.16, 0.66)]
    points = [(0, 0.5), *half, (0, 0.62), *((-x, y) for x, y in reversed(half))]
    head.line([*points, points[0]], 0.15, edge, "beard")
    head.polygon(points, hair, "beard")


def _draw_mouth(head: Pen, mouth: str) -> None:
    if mouth == "smiling":
        head.bowl(0, 0.64, 0.46, 0.4, (150, 28, 44), "mouth")
        head.bowl(0, 0.64, 0.4, 0.16, WHITE, "mouth")
        head.ellipse(0, 0.92, 0.2, 0.09, (232, 96, 104), "mouth")
    else:
        head.ellipse(0, 0.79, 0.3, 0.11, (196, 64, 70), "mouth")
        head.line([(-0.27, 0.78), (0.27, 0.78)], 0.075, (112, 26, 36), "mouth")


def _draw_eyes(head: Pen, who: Identity, skin: Colour, hair: Colour) -> None:
    """Brows, eyes and glasses; also sunglasses show the distance of the eyes."""
    distance = 0.45 * (1 + 0.2 * who.degrees["eye_distance"])
    brow = mix(hair, INK, 0.25)
    if abs(lightness(HAIR[who["hair_colour"]]) - lightness(skin)) < 45:
        brow = shade(skin, 0.5)
    kind = who["glasses"]
    for side in (-1, 1):
        x = side * distance
        head.line([(x - side * 0.2, -0.36), (x + side * 0.06, -0.42), (x + side * 0.24, -0.35)], 0.11, brow, "hair")
        if kind == "sunglasses":
            continue
        head.ellipse(x, 0, 0.27, 0.21, INK, "eyes")
        head.ellipse(x, 0.03, 0.25, 0.18, WHITE, "eyes")
        head.ellipse(x, 0.02, 0.165, 0.18, EYES[who["eyes"]], "eyes")
        head.ellipse(x, 0.02, 0.08, 0.09, INK, "eyes")
        head.ellipse(x - 0.06, -0.05, 0.045, 0.045, WHITE, "eyes")
    if kind == "none":
        return
    colour = FRAMES[who["frame"]] if kind != "sunglasses" else INK
    radius = min(0.4, distance - 0.05)
    for side in (-1, 1):
        x = side * distance
        if kind == "round":
            head.ring(x, 0, radius, 0.4, 0.115, colour, "glasses")
        elif kind == "square":
            head.frame(x - radius, -0.3, x + radius, 0.32, 0.115, colour, "glasses")
        else:
            head.ellipse(x, 0.03, radius, 0.34, colour, "glasses")
            head.line([(x - 0.16, -0.02), (x - 0.02, -0.14)], 0.09, (120, 124, 140), "glasses")
        head.line([(side * (distance + radius), -0.06), (side * 0.98, -0.1)], 0.09, colour, "glasses")
    head.line([(-distance + radius, -0.06), (distance - radius, -0.06)], 0.11, colour, "glasses")
