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
        small = image.reduce(SIZE // PIXEL_BLOCKS).filter(ImageFilter.UnsharpMask(radius=1, percent=90, threshold=0))
        return small.resize((SIZE, SIZE), Image.Resampling.NEAREST)
    if medium == "oil":
        return _oil(image, phase)
    return image


def pencil(image: Image.Image, width: float) -> numpy.ndarray:
    """How much ink the contours of an image have, 0 to 1, float32 (128, 128); `width` is that of lines in pixels."""
    grey = numpy.asarray(image.convert("L").filter(ImageFilter.GaussianBlur(width / 3)), dtype=numpy.float32)
    edges = numpy.zeros_like(grey)
    edges[1:-1] = numpy.abs(grey[2:] - grey[:-2])
    edges[:, 1:-1] += numpy.abs(grey[:, 2:] - grey[:, :-2])
    return numpy.clip(edges * (width / 100) - 0.1, 0, 1)


def _sketch(image: Image.Image) -> Image.Image:
    """Dark where the drawing is darker than its surroundings; all of it a little shaded."""
    grey = numpy.asarray(image.convert("L"), dtype=numpy.float32)
    soft = numpy.asarray(image.convert("L").filter(ImageFilter.GaussianBlur(3)), dtype=numpy.float32)
    paper = 204 + 0.18 * grey - numpy.clip((soft - grey) * 2.1, -16, 140) - 55 * pencil(image, 1.5)
    return Image.fromarray(numpy.clip(paper, 0, 255).astype(numpy.uint8)).convert("RGB")


_PHASES = 16
_Neighbours = list[tuple[numpy.ndarray, numpy.ndarray]]


@cache
def _strokes(phase: int) -> tuple[_Neighbours, numpy.ndarray]:
    """The brush of one of 16 paintings.

    The four pixels, (16384,), and their weights, (16384, 1), that each pixel is interpolated from; and the relief of the
    paint, (16384, 1), which is added.
    """
    shift = 2 * numpy.pi * phase / _PHASES
    rows, columns = numpy.mgrid[0:SIZE, 0:SIZE].astype(numpy.float32)
    bend = numpy.sin(rows * 0.09 + shift) * 2.2 + numpy.sin(columns * 0.07 - shift) * 1.6
    wave = numpy.sin(columns * 0.3 + rows * 0.26 + bend)
    across = numpy.clip(columns + 1.1 * wave, 0, SIZE - 1.001)
    down = numpy.clip(rows - 1.1 * numpy.cos(columns * 0.3 - rows * 0.2 + bend), 0, SIZE - 1.001)
    left, top = across.astype(numpy.int64), down.astype(numpy.int64)
    neighbours = []
    for dx in (0, 1):
        for dy in (0, 1):
            weight = (1 - numpy.abs(across - left - dx)) * (1 - numpy.abs(down - top - dy))
            neighbours.append((((top + dy) * SIZE + left + dx).ravel(), weight.reshape(-1, 1).astype(numpy.float32)))
    return neighbours, (wave * 14).reshape(-1, 1).astype(numpy.float32)


def _oil(image: Image.Image, phase: int) -> Image.Image:
    neighbours, relief = _strokes(phase)
    flat = numpy.asarray(image, dtype=numpy.float32).reshape(-1, 3)
    pixels = relief + 0.5
    for source, weight in neighbours:
        pixels = pixels + flat.take(source, axis=0) * weight
    return Image.fromarray(numpy.clip(pixels, 0, 255).astype(numpy.uint8).reshape(SIZE, SIZE, 3))
