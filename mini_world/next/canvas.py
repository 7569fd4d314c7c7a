"""Draws an image and its label map together, larger than they will be, and downsamples both once.

Coordinates are in pixels of the final 128-pixel image; `Canvas.at` returns a pen in the local units of one subject.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy
from PIL import Image, ImageDraw

SIZE = 128
SUPERSAMPLING = 3

# The classes of the label map, which the face parser is trained on; "skin" to "beard" are the head.
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


@cache
def _ramp() -> Image.Image:
    """A vertical ramp from white to black of the size of a canvas."""
    side = SIZE * SUPERSAMPLING
    ramp = Image.linear_gradient("L").transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return ramp.resize((side, side), Image.Resampling.BILINEAR)


class Canvas:
    """A 128-pixel image and its label map; every shape writes its colour and its label."""

    def __init__(self, background: Colour = (128, 128, 128)) -> None:
        side = SIZE * SUPERSAMPLING
        self.image = Image.new("RGB", (side, side), background)
        self.labels = Image.new("L", (SIZE, SIZE), 0)
        self._pen = ImageDraw.Draw(self.image)
        self._label_pen = ImageDraw.Draw(self.labels)

    def at(self, x: float, y: float, unit: float) -> Pen:
        """A pen whose origin is (x, y) and whose unit is `unit` pixels."""
        return Pen(self, x, y, unit, unit, unit)

    @property
    def page(self) -> Pen:
        """A pen in plain pixels, origin at the top left."""
        return Pen(self, 0.0, 0.0, 1.0, 1.0, 1.0)

    def gradient(self, top: Colour, bottom: Colour) -> None:
        """Fill the whole image with a vertical gradient."""
        self.image.paste(bottom, (0, 0, *self.image.size))
        self.image.paste(Image.new("RGB", self.image.size, top), (0, 0), _ramp())

    def veil(self, share: float) -> None:
        """Make all colours paler, by a share (0 to 1) of white."""
        self.image.paste(Image.blend(self.image, Image.new("RGB", self.image.size, (255, 255, 255)), share))

    def rendered(self) -> Image.Image:
        """The anti-aliased image, 128 by 128."""
        return self.image.reduce(SUPERSAMPLING)

    def label_map(self) -> numpy.ndarray:
        """The label of each pixel, uint8 (128, 128)."""
        return numpy.array(self.labels)

    def shape(self, kind: str, points: Sequence[Point], colour: Colour, label: str, width: float = 0.0) -> None:
        """Draw one shape given in pixels; `kind` is a method of ImageDraw, "ring" or "frame"."""
        # Backgrounds have label 0, and so has everything below them: there is nothing to write.
        targets: list[tuple[ImageDraw.ImageDraw, Colour | int, int]] = [(self._pen, colour, SUPERSAMPLING)]
        if label != "background":
            targets.append((self._label_pen, LABEL_ID[label], 1))
        for pen, fill, scale in targets:
            # Half a pixel less: ImageDraw's coordinates are the centres of pixels.
            scaled = [(x * scale - 0.5, y * scale - 0.5) for x, y in points]
            thick = max(1, round(width * scale))
            if kind == "line":
                pen.line(scaled, fill=fill, width=thick, joint="curve")
                for x, y in (scaled[0], scaled[-1]) if thick > 2 else ():
                    half = thick / 2
                    pen.ellipse((x - half, y - half, x + half, y + half), fill=fill)
            elif kind == "ring":
                pen.ellipse(scaled, outline=fill, width=thick)
            elif kind == "frame":
                pen.rounded_rectangle(scaled, radius=1.5 * thick, outline=fill, width=thick)
            else:
                getattr(pen, kind)(scaled, fill=fill)


@dataclass(frozen=True)
class Pen:
    """Draws in the local units of one subject: a head extends about one unit to each side of its centre."""

    canvas: Canvas
    x: float
    y: float
    x_unit: float
    y_unit: float
    unit: float  # of the width of lines

    def stretched(self, wide: float, tall: float) -> Pen:
        """The same pen with its horizontal and vertical units multiplied; the width of lines stays."""
        return replace(self, x_unit=self.x_unit * wide, y_unit=self.y_unit * tall)

    def _to_page(self, points: Sequence[Point]) -> list[Point]:
        return [(self.x + self.x_unit * x, self.y + self.y_unit * y) for x, y in points]

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
        """A line with round ends."""
        self.canvas.shape("line", self._to_page(points), colour, label, width * self.unit)

    def cap(self, rx: float, ry: float, below: float, colour: Colour, label: str, centre: float = 0.0) -> None:
        """The part of an ellipse above the height `below`: hair on a head, the dome of a hat."""
        edge = math.asin(max(-1.0, min(1.0, (below - centre) / ry)))
        self.arc_shape(0.0, centre, rx, ry, math.pi - edge, math.pi + 2 * edge, colour, label)

    def bowl(self, x: float, y: float, rx: float, ry: float, colour: Colour, label: str) -> None:
        """The lower half of an ellipse."""
        self.arc_shape(x, y, rx, ry, 0.0, math.pi, colour, label)

    def arc_shape(self, x: float, y: float, rx: float, ry: float, start: float, sweep: float, colour: Colour, label: str) -> None:
        """The shape between an arc of an ellipse and its chord; angles in radians, clockwise from the right."""
        angles = [start + sweep * k / 24 for k in range(25)]
        self.polygon([(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles], colour, label)

    def curve(self, x: float, y: float, rx: float, ry: float, sweep: float, width: float, colour: Colour, label: str) -> None:
        """The middle part of the lower half of an ellipse, as a line; a negative `ry` gives the upper half."""
        angles = [math.pi / 2 + sweep * (k / 8 - 0.5) for k in range(9)]
        self.line([(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles], width, colour, label)


def shade(colour: Colour, factor: float) -> Colour:
    """The same colour darker (factor below 1) or lighter (above 1)."""
    return tuple(max(0, min(255, round(channel * factor))) for channel in colour)  # type: ignore[return-value]


def mix(colour: Colour, other: Colour, share: float) -> Colour:
    """The colour with `share` (0 to 1) of another one."""
    return tuple(round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))  # type: ignore[return-value]


def lightness(colour: Colour) -> float:
    """The luma of a colour, 0 to 255, as Pillow's mode "L" has it."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def tinted(colour: Colour, degree: float) -> Colour:
    """The colour from darker (degree -1) to lighter (1), in equal steps also where it is nearly black or white."""
    return mix(shade(colour, 0.85), mix(colour, (255, 255, 255), 0.22), (degree + 1) / 2)
