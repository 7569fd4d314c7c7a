"""The context of a drawing: places in the background, garments, and filters for media and styles."""

from __future__ import annotations

import random

import numpy
from PIL import Image, ImageFilter

from mini_world.canvas import SIZE, Canvas, Colour, Pen, shade
from mini_world.identities import LIGHT, PAINT, Identity

PLACES = ("plain", "beach", "snow", "forest", "city", "space")
ROLES = ("none", "astronaut", "crown", "hat", "scarf")
MEDIA = ("photo", "sketch", "pixel", "oil")
FRAMINGS = ("normal", "close", "afar")


def draw_place(canvas: Canvas, place: str, rng: random.Random) -> None:
    """Draw the background."""
    page = canvas.page
    if place == "plain":
        colour = tuple(rng.randint(96, 216) for _ in range(3))
        canvas.gradient(shade(colour, 1.08), shade(colour, 0.9))  # type: ignore[arg-type]
    elif place == "beach":
        canvas.gradient((84, 178, 244), (190, 230, 252))
        page.rectangle(0, 30, 64, 44, (28, 112, 196))
        page.rectangle(0, 42, 64, 64, (244, 216, 142))
        page.ellipse(rng.choice((9, 55)), 10, 6, 6, (255, 232, 80))
        x = rng.choice((5, 59))
        page.line([(x, 48), (x + (2 if x < 32 else -2), 24)], 2.2, (124, 82, 44))
        for dx, dy in ((-8, 3), (8, 3), (-6, -4), (6, -4)):
            page.line([(x, 24), (x + dx, 24 + dy)], 2.6, (32, 142, 60))
    elif place == "snow":
        canvas.gradient((150, 176, 214), (216, 228, 244))
        page.rectangle(0, 44, 64, 64, (248, 250, 255))
        for x in (8 + rng.randint(-2, 2), 56 + rng.randint(-2, 2)):
            for k in range(3):
                page.polygon(
                    [(x - 8 + k * 1.6, 46 - k * 8), (x, 34 - k * 8), (x + 8 - k * 1.6, 46 - k * 8)],
                    (38, 104, 82),
                )
        for _ in range(22):
            page.ellipse(rng.uniform(0, 64), rng.uniform(0, 64), 0.9, 0.9, (255, 255, 255))
    elif place == "forest":
        canvas.gradient((70, 128, 62), (36, 82, 38))
        page.rectangle(0, 50, 64, 64, (84, 66, 40))
        for x in (4, 15, 49, 60):
            x += rng.randint(-2, 2)
            page.rectangle(x - 2, 20, x + 2, 54, (88, 56, 30))
            page.ellipse(x, 15 + rng.randint(-3, 3), 9, 11, (24 + rng.randint(0, 20), 94, 36))
    elif place == "city":
        canvas.gradient((148, 160, 186), (204, 208, 218))
        for x in (0, 13, 26, 39, 52):
            top = 12 + rng.randint(0, 16)
            grey = rng.randint(70, 104)
            page.rectangle(x, top, x + 12, 64, (grey, grey, grey + 12))
            for wy in range(top + 3, 60, 6):
                for wx in (x + 2, x + 7):
                    page.rectangle(wx, wy, wx + 2.4, wy + 2.6, (255, 226, 120))
        page.rectangle(0, 56, 64, 64, (66, 66, 74))
    else:
        canvas.gradient((8, 6, 24), (26, 12, 52))
        for _ in range(26):
            page.ellipse(rng.uniform(0, 64), rng.uniform(0, 64), 0.7, 0.7, (255, 255, 255))
        x = rng.choice((10, 54))
        page.ellipse(x, 11, 6.5, 6.5, (232, 136, 84))
        page.line([(x - 10, 13), (x + 10, 9)], 1.3, (250, 222, 170))


def draw_role_behind(pen: Pen, role: str) -> None:
    """Draw the part of a role behind the head: the inside of a helmet."""
    if role == "astronaut":
        pen.ellipse(0, -0.05, 1.78, 1.78, (86, 112, 158), "accessory")


def draw_role(pen: Pen, role: str, rng: random.Random) -> None:
    """Draw the part of a role over the subject: helmet and suit, crown, red hat, scarf."""
    if role == "astronaut":
        pen.rectangle(-1.3, 2.3, 1.3, 8.0, (240, 242, 246), "accessory")
        pen.ellipse(0, 2.5, 1.9, 1.05, (240, 242, 246), "accessory")
        pen.ring(0, -0.05, 1.9, 1.9, 0.34, (240, 242, 246), "accessory")
        pen.ring(0, -0.05, 1.92, 1.92, 0.08, (150, 156, 170), "accessory")
        pen.rectangle(-1.1, 2.5, -0.5, 2.85, (220, 40, 50), "accessory")
        pen.rectangle(0.5, 2.5, 1.1, 2.85, (40, 80, 220), "accessory")
    elif role == "crown":
        gold = (255, 206, 40)
        spikes = [
            (-1.0, -0.85),
            (-1.1, -1.75),
            (-0.5, -1.3),
            (0, -1.9),
            (0.5, -1.3),
            (1.1, -1.75),
            (1.0, -0.85),
        ]
        pen.polygon(spikes, gold, "accessory")
        pen.line([(-1.0, -0.9), (1.0, -0.9)], 0.2, (214, 150, 20), "accessory")
        for x, colour in ((-0.6, (220, 30, 60)), (0, (40, 110, 240)), (0.6, (30, 170, 80))):
            pen.ellipse(x, -1.12, 0.14, 0.14, colour, "accessory")
    elif role == "hat":
        red = (222, 24, 34)
        pen.cap(0.98, 1.05, -0.7, red, "accessory", centre=-0.8)
        pen.ellipse(0, -0.72, 1.55, 0.24, red, "accessory")
        pen.line([(-0.95, -0.9), (0.95, -0.9)], 0.2, (130, 8, 18), "accessory")
    elif role == "scarf":
        colour: Colour = rng.choice(((40, 84, 206), (36, 140, 80), (206, 60, 140)))
        pen.line([(-0.85, 1.35), (0, 1.62), (0.85, 1.35)], 0.5, colour, "accessory")
        pen.rectangle(0.25, 1.5, 0.8, 2.9, colour, "accessory")
        for y in (1.95, 2.4):
            pen.rectangle(0.25, y, 0.8, y + 0.2, (250, 250, 250), "accessory")


def render_medium(image: Image.Image, medium: str, rng: random.Random) -> Image.Image:
    """Turn a 64-pixel drawing into a pencil sketch, pixel art or an oil painting."""
    if medium == "sketch":
        grey = numpy.asarray(image.convert("L"), dtype=numpy.float32)
        soft = numpy.asarray(image.convert("L").filter(ImageFilter.GaussianBlur(2.2)), dtype=numpy.float32)
        paper = 244 - numpy.clip((soft - grey) * 2.2, -24, 150) - (255 - grey) * 0.22
        return Image.fromarray(numpy.clip(paper, 0, 255).astype(numpy.uint8)).convert("RGB")
    if medium == "pixel":
        # As wide as a latent pixel, so that the VAE can reproduce them.
        small = image.resize((16, 16), Image.Resampling.BOX).point(lambda v: (v // 32) * 32 + 16)
        return small.resize((SIZE, SIZE), Image.Resampling.NEAREST)
    if medium == "oil":
        brushed = image.filter(ImageFilter.ModeFilter(3))
        pixels = numpy.asarray(brushed, dtype=numpy.float32)
        rows, columns = numpy.mgrid[0:SIZE, 0:SIZE]
        # Broad and wavy: the VAE loses strokes finer than two latent pixels.
        bend = numpy.sin(rows * 0.2 + rng.uniform(0, 6)) * 2
        strokes = numpy.sin(columns * 0.55 + rows * 0.45 + bend) * 22
        pixels = (pixels - 128) * 1.12 + 132 + strokes[..., None]
        return Image.fromarray(numpy.clip(pixels, 0, 255).astype(numpy.uint8))
    return image


def render_style(image: Image.Image, style: Identity) -> Image.Image:
    """Apply a style to a drawing: two colours, a stroke and a surface."""
    grey = numpy.asarray(image.convert("L"), dtype=numpy.float32) / 255
    grey = numpy.clip((grey - grey.min()) / max(0.2, float(grey.max() - grey.min())), 0, 1)
    rows, columns = numpy.mgrid[0:SIZE, 0:SIZE].astype(numpy.float32)
    if style["stroke"] == "mosaic":
        cells = Image.fromarray((grey * 255).astype(numpy.uint8)).resize((16, 16), Image.Resampling.BOX)
        grey = numpy.asarray(cells.resize((SIZE, SIZE), Image.Resampling.NEAREST), dtype=numpy.float32) / 255
        grey = numpy.where((rows % 4 == 0) | (columns % 4 == 0), grey * 0.5, grey)
    elif style["stroke"] == "dotted":
        wave = (numpy.cos(columns * numpy.pi / 2.5) * numpy.cos(rows * numpy.pi / 2.5) + 1) / 2
        grey = numpy.clip((grey - wave) * 3.0 + 0.5, 0, 1) * 0.8 + grey * 0.2
    elif style["stroke"] == "hatched":
        wave = (numpy.sin((columns + rows) * numpy.pi / 3.0) + 1) / 2
        grey = numpy.clip((grey - wave) * 2.4 + 0.5, 0, 1) * 0.75 + grey * 0.25
    elif style["stroke"] == "outlined":
        edges = image.convert("L").filter(ImageFilter.GaussianBlur(0.6)).filter(ImageFilter.FIND_EDGES)
        ink = numpy.clip(numpy.asarray(edges, dtype=numpy.float32) / 60, 0, 1)
        ink[0], ink[-1], ink[:, 0], ink[:, -1] = 0, 0, 0, 0
        grey = numpy.round(grey * 2) / 2 * 0.6 + 0.4
        grey = grey * (1 - ink)
    dark = numpy.array(style.tint(PAINT[style["dark"]], "dark"), dtype=numpy.float32)
    light = numpy.array(style.tint(LIGHT[style["light"]], "light"), dtype=numpy.float32)
    pixels = dark + (light - dark) * grey[..., None]
    if style["surface"] == "canvas":
        pixels = pixels + (((rows // 2 + columns // 2) % 2) * 26 - 13)[..., None]
    elif style["surface"] == "grained":
        grain = numpy.random.default_rng(7).normal(0, 17, (SIZE, SIZE, 1)).astype(numpy.float32)
        pixels = pixels + grain
    return Image.fromarray(numpy.clip(pixels, 0, 255).astype(numpy.uint8))
