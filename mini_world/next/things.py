"""Draws the things that styles are shown on: tree, house, mountain, boat and flower, about three units high."""

from __future__ import annotations

import random

from mini_world.next.canvas import Pen

THINGS = ("tree", "house", "mountain", "boat", "flower")


def draw_thing(pen: Pen, thing: str, rng: random.Random) -> None:
    """Draw one of THINGS; small differences of colour and shape are random."""
    vary = rng.randint(0, 30)
    if thing == "tree":
        pen.polygon([(-0.3, 1.75), (-0.2, 0.4), (0.2, 0.4), (0.3, 1.75)], (98, 64, 36))
        pen.line([(0, 0.9), (0.45, 0.4)], 0.14, (98, 64, 36))
        for x, y, r in ((-0.6, 0.1, 0.72), (0.6, 0.1, 0.72), (0, -0.62, 0.86)):
            pen.ellipse(x, y, r, r, (30 + vary, 118, 44))
        for x, y, r in ((-0.66, -0.02, 0.5), (0.52, -0.02, 0.5), (-0.08, -0.74, 0.6)):
            pen.ellipse(x, y, r, r, (58 + vary, 152, 58))
        for x, y in ((-0.5, 0.3), (0.5, 0.26), (0.1, -0.5)):
            pen.ellipse(x, y, 0.12, 0.12, (222, 44, 44))
    elif thing == "house":
        pen.rectangle(0.55, -1.4, 0.85, -0.5, (140, 70, 56))
        pen.rectangle(-1.1, -0.2, 1.1, 1.5, (232, 210, 170))
        pen.polygon([(-1.45, -0.1), (0, -1.4), (1.45, -0.1)], (180 + vary // 2, 56, 44))
        pen.rectangle(-0.28, 0.5, 0.28, 1.5, (96, 56, 30))
        pen.ellipse(0.14, 1.02, 0.07, 0.07, (250, 206, 60))
        for x in (-0.92, 0.46):
            pen.rectangle(x, 0.16, x + 0.46, 0.66, (250, 250, 250))
            pen.rectangle(x + 0.07, 0.23, x + 0.39, 0.59, (110, 180, 232))
        pen.ellipse(0, -0.62, 0.2, 0.2, (250, 250, 250))
    elif thing == "mountain":
        pen.polygon([(-2.0, 1.6), (-0.7, -0.8), (0.6, 1.6)], (92, 100, 124 + vary // 2))
        pen.polygon([(-0.98, -0.28), (-0.7, -0.8), (-0.42, -0.28), (-0.7, -0.4)], (240, 242, 250))
        pen.polygon([(-1.0, 1.6), (0.6, -1.4), (2.2, 1.6)], (124, 132, 156))
        pen.polygon([(0.6, -1.4), (2.2, 1.6), (0.9, 1.6)], (100, 108, 132))
        pen.polygon([(0.12, -0.5), (0.6, -1.4), (1.08, -0.5), (0.8, -0.7), (0.6, -0.44), (0.4, -0.7)], (250, 250, 255))
    elif thing == "boat":
        pen.polygon([(-1.6, 0.8), (1.6, 0.8), (1.05, 1.55), (-1.05, 1.55)], (146, 80 + vary // 2, 44))
        pen.line([(-1.45, 0.98), (1.45, 0.98)], 0.14, (250, 236, 210))
        pen.line([(0, 0.8), (0, -1.5)], 0.15, (80, 50, 30))
        pen.polygon([(0.14, -1.4), (1.3, 0.55), (0.14, 0.55)], (248, 248, 244))
        pen.polygon([(-0.14, -1.0), (-1.05, 0.55), (-0.14, 0.55)], (224, 60, 60))
        pen.polygon([(0, -1.75), (0.5, -1.6), (0, -1.45)], (250, 206, 40))
    else:
        pen.line([(0, 0.2), (0.06, 1.75)], 0.2, (50, 140, 60))
        pen.ellipse(0.5, 1.15, 0.44, 0.2, (60, 160, 66))
        pen.ellipse(-0.42, 1.4, 0.4, 0.18, (60, 160, 66))
        for x, y in ((0, -0.78), (0.74, -0.24), (0.46, 0.58), (-0.46, 0.58), (-0.74, -0.24)):
            pen.ellipse(x, y, 0.47, 0.47, (214 + vary, 62, 122))
            pen.ellipse(x * 0.94, y * 0.94, 0.32, 0.32, (246, 112, 164))
        pen.ellipse(0, 0, 0.4, 0.4, (214, 150, 30))
        pen.ellipse(-0.03, -0.04, 0.32, 0.32, (255, 212, 64))
