"""The context of a drawing: places in the background, and what a subject wears."""

from __future__ import annotations

import random

from mini_world.next.canvas import Canvas, Colour, Pen, mix, shade
from mini_world.next.identities import PAINTED

PLACES = ("plain", "beach", "snow", "forest", "city", "space")
ROLES = ("none", "astronaut", "crown", "hat", "scarf")
COLOURS = ("none", *PAINTED)  # of a hat or a scarf
MEDIA = ("photo", "sketch", "pixel", "oil")
FRAMINGS = ("normal", "close", "afar")
COLOURED_ROLES = ("hat", "scarf")

WHITE: Colour = (255, 255, 255)


def draw_place(canvas: Canvas, place: str, backdrop: Colour, rng: random.Random) -> None:
    """Draw the background; `backdrop` is the colour of a plain one."""
    if place == "plain":
        canvas.gradient(mix(backdrop, WHITE, 0.1), shade(backdrop, 0.9))
    else:
        _PLACES[place](canvas, rng)


def _draw_beach(canvas: Canvas, rng: random.Random) -> None:
    page, side = canvas.page, rng.choice((-1, 1))
    canvas.gradient((92, 184, 246), (214, 240, 252))
    sun = 64 + side * 46
    page.ellipse(sun, 20, 16, 16, (255, 244, 176))
    page.ellipse(sun, 20, 12, 12, (255, 220, 64))
    page.rectangle(0, 60, 128, 90, (30, 118, 200))
    for y, shift in ((68, 0), (77, 9)):
        for x in range(-8 + shift, 136, 18):
            page.curve(x, y - 3, 8, 4, 2.4, 2.2, (132, 198, 238), "background")
    page.rectangle(0, 86, 128, 90, (236, 248, 252))
    page.rectangle(0, 89, 128, 128, (246, 218, 148))
    palm = 64 - side * (50 + rng.randint(-3, 3))
    trunk = [(palm - side * 4, 100), (palm - side * 2, 74), (palm + side * 3, 50)]
    page.line(trunk, 5.0, (128, 86, 46))
    x, y = trunk[-1]
    for dx, dy in ((-17, 7), (17, 7), (-14, -7), (14, -7), (-6, 14), (6, 14)):
        page.line([(x, y), (x + dx * 0.6, y + dy * 0.3 - 3), (x + dx, y + dy)], 4.6, (34, 142, 62))
    for dx in (-2.5, 2.5):
        page.ellipse(x + dx, y + 3, 2.5, 2.5, (92, 56, 30))


def _draw_snow(canvas: Canvas, rng: random.Random) -> None:
    page = canvas.page
    canvas.gradient((142, 172, 216), (216, 230, 246))
    page.polygon([(-10, 92), (22, 46), (58, 92)], (176, 192, 220))
    page.polygon([(64, 92), (104, 40), (146, 92)], (184, 200, 226))
    page.polygon([(93, 54), (104, 40), (115, 54), (104, 50)], WHITE)
    page.ellipse(20, 112, 80, 28, (244, 248, 255))
    page.ellipse(110, 112, 70, 26, (248, 251, 255))
    page.rectangle(0, 108, 128, 128, (248, 251, 255))
    for x in (14 + rng.randint(-4, 4), 113 + rng.randint(-4, 4)):
        page.rectangle(x - 2, 90, x + 2, 100, (92, 62, 40))
        for k in range(3):
            half, top = 16 - k * 3.6, 66 - k * 14
            page.polygon([(x - half, top + 26), (x, top), (x + half, top + 26)], (36, 104, 80))
            page.polygon([(x - half * 0.42, top + 11), (x, top), (x + half * 0.42, top + 11)], (240, 246, 252))
    for _ in range(18):
        page.ellipse(rng.uniform(0, 128), rng.uniform(0, 128), 2.2, 2.2, WHITE)


def _draw_forest(canvas: Canvas, rng: random.Random) -> None:
    page = canvas.page
    canvas.gradient((146, 196, 116), (70, 124, 60))
    for x in (30, 64, 98):
        page.ellipse(x, 52, 26, 34, (92, 152, 78))
    page.rectangle(0, 84, 128, 128, (62, 110, 48))
    page.ellipse(64, 122, 52, 22, (112, 88, 54))
    for x in (6, 29, 99, 122):
        x += rng.randint(-4, 4)
        y, green = 34 + rng.randint(-6, 6), rng.randint(0, 24)
        page.rectangle(x - 4, 40, x + 4, 106, (92, 60, 34))
        page.ellipse(x, y, 18, 25, (22 + green, 88, 36))
        page.ellipse(x - 4, y - 6, 11, 15, (44 + green, 118, 50))
    for x in (12, 116):
        page.ellipse(x + rng.randint(-3, 3), 108, 9, 6, (34, 92, 40))


def _draw_city(canvas: Canvas, rng: random.Random) -> None:
    page = canvas.page
    canvas.gradient((152, 168, 204), (222, 222, 224))
    for x in range(-8, 128, 24):
        top = 20 + rng.randint(0, 24)
        page.rectangle(x, top, x + 24, 128, (150, 156, 178))
    for x in (0, 24, 48, 80, 104):
        top = 24 + 8 * rng.randint(0, 3) + (16 if x == 48 else 0)
        grey = rng.randint(72, 102)
        page.rectangle(x, top, x + (32 if x == 48 else 24) - 2, 128, (grey, grey, grey + 14))
        for wy in range(top + 5, 106, 12):
            for wx in (x + 4, x + 13):
                page.rectangle(wx, wy, wx + 5, wy + 6, (255, 226, 124))
    page.rectangle(0, 112, 128, 128, (70, 70, 78))
    page.rectangle(0, 109, 128, 112, (150, 150, 156))
    for x in (4, 36, 68, 100):
        page.rectangle(x, 119, x + 16, 122, (236, 232, 210))


def _draw_space(canvas: Canvas, rng: random.Random) -> None:
    page, side = canvas.page, rng.choice((-1, 1))
    canvas.gradient((10, 8, 30), (46, 22, 84))
    for _ in range(24):
        size = rng.choice((1.3, 1.6, 2.0))
        page.ellipse(rng.uniform(0, 128), rng.uniform(0, 128), size, size, (255, 250, 226))
    planet, moon = 64 + side * 45, 64 - side * 50
    page.ellipse(planet, 22, 14, 14, (226, 128, 78))
    page.ellipse(planet - 4, 18, 7, 6, (244, 164, 108))
    page.line([(planet - 21, 27), (planet + 21, 17)], 3.0, (250, 222, 170))
    page.ellipse(moon, 96, 9, 9, (112, 138, 180))
    page.ellipse(moon + 3, 94, 2.4, 2.4, (82, 104, 148))
    page.ellipse(moon - 3, 99, 2.0, 2.0, (82, 104, 148))


_PLACES = {"beach": _draw_beach, "snow": _draw_snow, "forest": _draw_forest, "city": _draw_city, "space": _draw_space}


def draw_role_behind(pen: Pen, role: str) -> None:
    """Draw the part of a role behind the head: the inside of a helmet."""
    if role == "astronaut":
        pen.ellipse(0, -0.1, 1.78, 1.78, (86, 112, 158), "accessory")


def draw_role(pen: Pen, head: Pen, role: str, colour: str, animal: bool) -> None:
    """Draw the part of a role over the subject: helmet and suit, crown, hat, scarf.

    `pen` is that of the body, `head` that of the head. The ears of animals stay visible beside hats and crowns.
    """
    if role == "astronaut":
        _draw_astronaut(pen)
    elif role == "crown":
        _draw_crown(head.stretched(0.72, 1.0) if animal else head)
    elif role == "hat":
        _draw_hat(head, PAINTED[colour], 0.76 if animal else 1.0, 1.18 if animal else 1.56)
    elif role == "scarf":
        _draw_scarf(pen, PAINTED[colour])


def _draw_astronaut(pen: Pen) -> None:
    suit, edge = (240, 242, 246), (150, 156, 170)
    pen.rectangle(-1.84, 2.75, 1.84, 8.0, suit, "accessory")
    pen.ellipse(0, 2.75, 2.0, 1.05, suit, "accessory")
    pen.ring(0, -0.1, 1.88, 1.88, 0.3, edge, "accessory")
    pen.ring(0, -0.1, 1.85, 1.85, 0.22, suit, "accessory")
    pen.rectangle(-1.2, 2.5, -0.55, 2.85, PAINTED["red"], "accessory")
    pen.rectangle(0.55, 2.5, 1.2, 2.85, PAINTED["blue"], "accessory")


def _draw_crown(head: Pen) -> None:
    gold, dark = (255, 208, 44), (206, 146, 20)
    spikes = [(1.0, -0.8), (1.18, -1.75), (0.55, -1.3), (0, -1.95), (-0.55, -1.3), (-1.18, -1.75), (-1.0, -0.8)]
    head.polygon(spikes, gold, "accessory")
    head.line([(-0.98, -0.84), (0.98, -0.84)], 0.17, dark, "accessory")
    for x, y in ((1.16, -1.74), (0, -1.92), (-1.16, -1.74)):
        head.ellipse(x, y, 0.12, 0.12, gold, "accessory")
    for x, colour in ((-0.6, PAINTED["red"]), (0, PAINTED["blue"]), (0.6, PAINTED["green"])):
        head.ellipse(x, -1.12, 0.14, 0.14, colour, "accessory")


def _draw_hat(head: Pen, colour: Colour, dome: float, brim: float) -> None:
    dark = shade(colour, 0.62)
    head.rectangle(-dome, -1.3, dome, -0.72, colour, "accessory")
    head.cap(dome, 0.72, -1.28, colour, "accessory", centre=-1.3)
    head.rectangle(-dome, -1.06, dome, -0.82, dark, "accessory")
    head.curve(-dome * 0.2, -1.3, dome * 0.55, -0.5, 1.1, 0.1, mix(colour, WHITE, 0.4), "accessory")
    head.ellipse(0, -0.7, brim, 0.2, colour, "accessory")
    head.curve(0, -0.74, brim * 0.96, 0.2, 2.4, 0.08, dark, "accessory")


def _draw_scarf(pen: Pen, colour: Colour) -> None:
    dark = shade(colour, 0.66)
    pen.polygon([(0.2, 1.4), (0.95, 1.4), (1.1, 3.1), (0.4, 3.1)], dark, "accessory")
    pen.polygon([(0.27, 1.4), (0.88, 1.4), (1.02, 3.02), (0.46, 3.02)], colour, "accessory")
    for y in (2.1, 2.6):
        pen.polygon([(0.36, y), (0.96, y), (0.97, y + 0.2), (0.38, y + 0.2)], (250, 250, 250), "accessory")
    pen.curve(0, 1.02, 1.05, 0.52, 2.7, 0.62, dark, "accessory")
    pen.curve(0, 1.02, 1.05, 0.52, 2.7, 0.5, colour, "accessory")
