"""Draws an image and its label map together, at three times the size, and downsamples both once.

Coordinates are in pixels of the final 64-pixel image; `Canvas.at` returns a pen in the local units of one subject.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from PIL import Image, ImageDraw

SIZE = 64
SUPERSAMPLING = 3

# The classes of the label map, which the face parser is trained on; "skin" to "glasses" are the head.
LABELS = (
    "background",
    "skin",
    "hair",
    "eyes",
    "mouth",
    "glasses",
    "beard",
    "cloth",
    "accessory",
    "animal",
)
LABEL_ID = {name: number for number, name in enumerate(LABELS)}

Colour = tuple[int, int, int]
Point = tuple[float, float]


class Canvas:
    """A 64-pixel image and its label map; every shape writes its colour and its label."""

    def __init__(self, background: Colour = (128, 128, 128)) -> None:
        side = SIZE * SUPERSAMPLING
        self.image = Image.new("RGB", (side, side), background)
        self.labels = Image.new("L", (side, side), 0)
        self._colour_pen = ImageDraw.Draw(self.image)
        self._label_pen = ImageDraw.Draw(self.labels)

    def at(self, x: float, y: float, unit: float) -> Pen:
        """A pen whose origin is (x, y) and whose unit is `unit` pixels."""
        return Pen(self, x, y, unit)

    @property
    def page(self) -> Pen:
        """A pen in plain pixels, origin at the top left."""
        return Pen(self, 0.0, 0.0, 1.0)

    def gradient(self, top: Colour, bottom: Colour) -> None:
        """Fill the whole image with a vertical gradient."""
        side = self.image.height
        ramp = numpy.linspace(0.0, 1.0, side)[:, None, None]
        rows = numpy.array(top) * (1 - ramp) + numpy.array(bottom) * ramp
        pixels = numpy.broadcast_to(rows, (side, side, 3)).round().astype(numpy.uint8)
        self.image.paste(Image.fromarray(numpy.ascontiguousarray(pixels)))

    def rendered(self) -> Image.Image:
        """The anti-aliased image, 64 by 64."""
        return self.image.resize((SIZE, SIZE), Image.Resampling.BOX)

    def label_map(self) -> numpy.ndarray:
        """The label of each pixel's centre, uint8 (64, 64)."""
        half = SUPERSAMPLING // 2
        return numpy.asarray(self.labels)[half::SUPERSAMPLING, half::SUPERSAMPLING].copy()

    def shape(self, kind: str, points: Sequence[Point], colour: Colour, label: str, width: float = 0.0) -> None:
        """Draw one shape given in pixels; `kind` is a method of ImageDraw."""
        scaled = [(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points]
        for pen, fill in ((self._colour_pen, colour), (self._label_pen, LABEL_ID[label])):
            if kind == "line":
                pen.line(scaled, fill=fill, width=max(1, round(width * SUPERSAMPLING)), joint="curve")
            elif kind == "ring":
                pen.ellipse(scaled, outline=fill, width=max(1, round(width * SUPERSAMPLING)))
            elif kind == "frame":
                pen.rectangle(scaled, outline=fill, width=max(1, round(width * SUPERSAMPLING)))
            else:
                getattr(pen, kind)(scaled, fill=fill)


@dataclass(frozen=True)
class Pen:
    """Draws in the local units of one subject: a head extends one unit to each side of its centre."""

    canvas: Canvas
    x: float
    y: float
    unit: float

    def _to_page(self, points: Sequence[Point]) -> list[Point]:
        return [(self.x + self.unit * x, self.y + self.unit * y) for x, y in points]

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour, label: str = "background") -> None:
        self.canvas.shape("ellipse", self._to_page([(x - rx, y - ry), (x + rx, y + ry)]), colour, label)

    def ring(self, x: float, y: float, rx: float, ry: float, width: float, colour: Colour, label: str) -> None:
        box = self._to_page([(x - rx, y - ry), (x + rx, y + ry)])
        self.canvas.shape("ring", box, colour, label, width * self.unit)

    def frame(self, x0: float, y0: float, x1: float, y1: float, width: float, colour: Colour, label: str) -> None:
        self.canvas.shape("frame", self._to_page([(x0, y0), (x1, y1)]), colour, label, width * self.unit)

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, label: str = "background") -> None:
        self.canvas.shape("rectangle", self._to_page([(x0, y0), (x1, y1)]), colour, label)

    def polygon(self, points: Sequence[Point], colour: Colour, label: str = "background") -> None:
        self.canvas.shape("polygon", self._to_page(points), colour, label)

    def line(self, points: Sequence[Point], width: float, colour: Colour, label: str = "background") -> None:
        self.canvas.shape("line", self._to_page(points), colour, label, width * self.unit)

    def cap(self, rx: float, ry: float, below: float, colour: Colour, label: str, centre: float = 0.0) -> None:
        """The part of an ellipse above the height `below`: hair on a head, the dome of a hat."""
        edge = math.asin(max(-1.0, min(1.0, (below - centre) / ry)))
        angles = [math.pi - edge + (math.pi + 2 * edge) * k / 24 for k in range(25)]
        self.polygon([(rx * math.cos(a), centre + ry * math.sin(a)) for a in angles], colour, label)


def shade(colour: Colour, factor: float) -> Colour:
    """The same colour darker (factor below 1) or lighter (above 1)."""
    return tuple(max(0, min(255, round(channel * factor))) for channel in colour)  # type: ignore[return-value]
