"""Turns a drawing into a pencil sketch, pixel art or an oil painting.

All patterns are as coarse as the autoencoder needs: its latents are 8 pixels wide.
"""

from __future__ import annotations

import random
from functools import cache

import numpy
from PIL import Image, ImageFilter

from mini_world.next.canvas import SIZE

PIXEL_BLOCKS = 32  # 4 by 4 pixels each, aligned with the latents: 16 lose glasses and noses


def render_medium(image: Image.Image, medium: str, rng: random.Random) -> Image.Image:
    """The drawing (RGB 128 by 128) in another medium of scenes.MEDIA."""
    phase = rng.randrange(_PHASES)
    if medium == "sketch":
        return _sketch(image)
    if medium == "pixel":
        small = image.resize((PIXEL_BLOCKS, PIXEL_BLOCKS), Image.Resampling.BOX).point(_posterised())
        return small.resize((SIZE, SIZE), Image.Resampling.NEAREST)
    if medium == "oil":
        return _oil(image, phase)
    return image


@cache
def _posterised() -> list[int]:
    step = 36
    return [min(255, round(value / step) * step) for value in range(256)] * 3


def pencil(image: Image.Image, width: float) -> numpy.ndarray:
    """How much ink the contours of an image have, 0 to 1, float32 (128, 128); `width` is that of lines in pixels."""
    grey = numpy.asarray(image.convert("L").filter(ImageFilter.GaussianBlur(width / 3)), dtype=numpy.float32)
    edges = numpy.zeros_like(grey)
    edges[1:-1] = numpy.abs(grey[2:] - grey[:-2])
    edges[:, 1:-1] += numpy.abs(grey[:, 2:] - grey[:, :-2])
    return numpy.clip(edges * (width / 100) - 0.1, 0, 1)


def _sketch(image: Image.Image) -> Image.Image:
    grey = numpy.asarray(image.convert("L"), dtype=numpy.float32)
    paper = (190 + 0.22 * grey) * (1 - 0.8 * pencil(image, 1.6))
    return Image.fromarray(numpy.clip(paper, 0, 255).astype(numpy.uint8)).convert("RGB")


_PHASES = 16


@cache
def _strokes(phase: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Of one of 16 paintings: from which pixel each pixel is taken, (16384,), and the strokes' relief, (128, 128, 1)."""
    shift = 2 * numpy.pi * phase / _PHASES
    rows, columns = numpy.mgrid[0:SIZE, 0:SIZE].astype(numpy.float32)
    bend = numpy.sin(rows * 0.09 + shift) * 2.2 + numpy.sin(columns * 0.07 - shift) * 1.6
    wave = numpy.sin(columns * 0.3 + rows * 0.26 + bend)
    across = numpy.clip(columns + 0.9 * wave, 0, SIZE - 1).round().astype(numpy.int64)
    down = numpy.clip(rows - 0.9 * numpy.cos(columns * 0.3 - rows * 0.2 + bend), 0, SIZE - 1).round().astype(numpy.int64)
    return (down * SIZE + across).ravel(), (wave * 14)[..., None].astype(numpy.int16)


def _oil(image: Image.Image, phase: int) -> Image.Image:
    source, relief = _strokes(phase)
    pixels = numpy.asarray(image).reshape(-1, 3).take(source, axis=0).reshape(SIZE, SIZE, 3).astype(numpy.int16)
    return Image.fromarray(numpy.clip(pixels + relief, 0, 255).astype(numpy.uint8))
