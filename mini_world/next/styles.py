"""Applies a style to a drawing: two colours, a stroke of some scale, a surface and a border."""

from __future__ import annotations

from functools import cache

import numpy
from PIL import Image, ImageFilter, ImageOps

from mini_world.next.canvas import SIZE
from mini_world.next.identities import LIGHT, PAINT, Identity
from mini_world.next.media import pencil

_FRAME = 8  # pixels: one latent


@cache
def _grid() -> tuple[numpy.ndarray, numpy.ndarray]:
    rows, columns = numpy.mgrid[0:SIZE, 0:SIZE].astype(numpy.float32)
    return rows, columns


@cache
def _surface(kind: str) -> numpy.ndarray:
    """What a surface adds to every channel, float32 (128, 128, 1)."""
    rows, columns = _grid()
    if kind == "canvas":
        # A weave of two threads whose period is one latent.
        weave = numpy.sin(rows * (numpy.pi / 4)) + numpy.sin(columns * (numpy.pi / 4))
        return (weave * 10)[..., None]
    noise = numpy.random.default_rng(7).normal(0, 1, (22, 22)).astype(numpy.float32)
    soft = numpy.asarray(Image.fromarray(noise).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return (soft / soft.std() * 13)[..., None]


def render_style(image: Image.Image, style: Identity) -> Image.Image:
    """The drawing (RGB 128 by 128) in the style."""
    factor = 2.0 ** (0.5 * style.degrees["scale"])  # 0.71 for "fine", 1.41 for "coarse"
    contrasted = ImageOps.autocontrast(image.convert("L"), cutoff=3)
    grey = _STROKES[style["stroke"]](contrasted, numpy.asarray(contrasted, dtype=numpy.float32) / 255, factor)
    dark = numpy.array(PAINT[style["dark"]], dtype=numpy.float32)
    light = numpy.array(LIGHT[style["light"]], dtype=numpy.float32)
    pixels = dark + (light - dark) * grey[..., None]
    if style["surface"] != "even":
        pixels += _surface(style["surface"])
    if style["border"] == "framed":
        for width, colour in ((_FRAME, light), (_FRAME - 2, dark)):
            for band in (pixels[:width], pixels[-width:], pixels[:, :width], pixels[:, -width:]):
                band[:] = colour
    return Image.fromarray(numpy.clip(pixels, 0, 255).astype(numpy.uint8))


def _smooth(image: Image.Image, grey: numpy.ndarray, factor: float) -> numpy.ndarray:
    """Soft edges: the coarser, the softer."""
    soft = image.filter(ImageFilter.GaussianBlur(1.8 * factor**1.6))
    return numpy.asarray(soft, dtype=numpy.float32) / 255


def _dotted(image: Image.Image, grey: numpy.ndarray, factor: float) -> numpy.ndarray:
    rows, columns = _grid()
    rate = 2 * numpy.pi / (14.0 * factor)
    wave = (numpy.cos(columns[0] * rate)[None] * numpy.cos(rows[:, 0] * rate)[:, None] + 1) / 2
    return numpy.clip((grey * 0.8 + 0.1 - wave) * 2.6 * factor + 0.5, 0, 1) * 0.64 + grey * 0.36


def _hatched(image: Image.Image, grey: numpy.ndarray, factor: float) -> numpy.ndarray:
    rows, columns = _grid()
    wave = (numpy.sin((columns + rows) * (2 * numpy.pi / (12.5 * factor))) + 1) / 2
    return numpy.clip((grey * 0.8 + 0.1 - wave) * 2.2 * factor + 0.5, 0, 1) * 0.6 + grey * 0.4


def _mosaic(image: Image.Image, grey: numpy.ndarray, factor: float) -> numpy.ndarray:
    cell = 7.0 * factor
    count = int(numpy.ceil(SIZE / cell))
    centres = numpy.minimum((numpy.arange(count) + 0.5) * cell, SIZE - 1).astype(int)
    cells = numpy.asarray(image.filter(ImageFilter.BoxBlur(cell / 3)), dtype=numpy.float32)[centres][:, centres] / 255
    position = numpy.arange(SIZE, dtype=numpy.float32)
    of = numpy.minimum((position / cell).astype(int), count - 1)
    # Grout of two pixels between the cells, with soft edges.
    inside = numpy.clip(cell / 2 - 0.6 - numpy.abs((position + 0.5) % cell - cell / 2), 0, 1)
    return cells[of][:, of] * (0.6 + 0.4 * inside[None] * inside[:, None])


def _outlined(image: Image.Image, grey: numpy.ndarray, factor: float) -> numpy.ndarray:
    flat = numpy.round(grey * 2) / 2 * 0.5 + 0.5
    return flat * (1 - pencil(image, 3.0 * factor**1.5))


_STROKES = {"smooth": _smooth, "dotted": _dotted, "hatched": _hatched, "mosaic": _mosaic, "outlined": _outlined}
