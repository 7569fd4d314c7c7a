"""Which square of a photo becomes the prepared picture, as a value that anything can be cut with.

A `Frame` is a square in the photo's pixels, upright or turned: its upper left corner and the vector
along its upper edge. The picture, a mask drawn for it and its transparency all go through the same
frame, so they lie on each other whatever was looked for in the photo. Coordinates are continuous:
pixel i covers i to i + 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from PIL.Image import Image

Point = tuple[float, float]
Outside = str | int | tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A square in a photo.

    Args:
        size: width and height of the photo, in pixels.
        corner: where the square's upper left corner lies; it may lie outside the photo.
        edge: from that corner to the upper right one.
    """

    size: tuple[int, int]
    corner: Point
    edge: Point

    def __post_init__(self) -> None:
        numbers = (*self.size, *self.corner, *self.edge)
        if not all(map(math.isfinite, numbers)) or min(self.size) < 1 or self.side <= 0:
            raise ValueError(f"a frame must be a square of some size in a photo, not {numbers}")

    @classmethod
    def centered(cls, size: tuple[int, int]) -> Self:
        """Return the largest square in the middle of a photo."""
        side = min(size)
        corner = ((size[0] - side) * 0.5, (size[1] - side) * 0.5)
        return cls(size=size, corner=corner, edge=(float(side), 0.0))

    @classmethod
    def whole(cls, size: tuple[int, int]) -> Self:
        """Return the smallest centred square that holds the whole photo."""
        return cls.around(size, (size[0] / 2, size[1] / 2), max(size))

    @classmethod
    def around(cls, size: tuple[int, int], center: Point, side: float, turn: float = 0.0) -> Self:
        """Return the square of that side around a point, turned clockwise by that many degrees."""
        u = side * math.cos(math.radians(turn))
        v = side * math.sin(math.radians(turn)) if turn else 0.0
        corner = (center[0] - (u - v) / 2, center[1] - (v + u) / 2)
        return cls(size=size, corner=corner, edge=(u, v))

    @property
    def side(self) -> float:
        """Length of an edge, in pixels of the photo."""
        return math.hypot(*self.edge)

    @property
    def turn(self) -> float:
        """Degrees by which the square is turned clockwise, from -180 to 180."""
        return math.degrees(math.atan2(self.edge[1], self.edge[0]))

    @property
    def center(self) -> Point:
        """Its middle, in pixels of the photo."""
        return self.to_photo(0.5, 0.5)

    @property
    def quad(self) -> tuple[Point, Point, Point, Point]:
        """Its corners: upper left, lower left, lower right, upper right."""
        corners = ((0, 0), (0, 1), (1, 1), (1, 0))
        return tuple(self.to_photo(*place) for place in corners)  # type: ignore[return-value]

    def to_photo(self, across: float, down: float) -> Point:
        """Return the point of the photo at fractions (0 to 1) of the square."""
        (x, y), (u, v) = self.corner, self.edge
        return x + across * u - down * v, y + across * v + down * u

    def from_photo(self, point: Point) -> Point:
        """Return the fractions (0 to 1) of the square at a point of the photo."""
        x, y = point[0] - self.corner[0], point[1] - self.corner[1]
        (u, v), area = self.edge, self.side**2
        return (x * u + y * v) / area, (y * u - x * v) / area

    def within(self, inner: Self) -> Self:
        """Return in this frame's photo what `inner` is in the picture cut with this frame."""
        corner = self.to_photo(inner.corner[0] / inner.size[0], inner.corner[1] / inner.size[1])
        u, v = inner.edge[0] / inner.size[0], inner.edge[1] / inner.size[1]
        a, b = self.edge
        return type(self)(size=self.size, corner=corner, edge=(u * a - v * b, u * b + v * a))

    def apply(self, image: Image, size: int, *, outside: Outside = "mirror") -> Image:
        """Cut the square out of a picture and scale it to `size` × `size`.

        Args:
            image: the photo, or anything of its proportions in any number of pixels.
            size: in pixels.
            outside: what lies beyond the photo's border: "mirror" for its reflection, or a colour.
        """
        from PIL.Image import Resampling

        ratio = image.width / self.size[0], image.height / self.size[1]
        left, top = self.corner[0] * ratio[0], self.corner[1] * ratio[1]
        right, bottom = (self.corner[n] * ratio[n] + self.edge[0] * ratio[n] for n in (0, 1))
        upright = self.edge[1] == 0 and self.edge[0] > 0
        slack = 1e-6 * max(image.size)
        inside = left >= 0 and top >= 0
        if upright and inside and right <= image.width + slack and bottom <= image.height + slack:
            box = (left, top, min(right, image.width), min(bottom, image.height))
            return image.resize((size, size), Resampling.LANCZOS, box=box)
        return _resampled(image, self, ratio, size, outside)

    def apply_to_mask(self, mask: Image, size: int) -> Image:
        """Cut the square out of a mask of mode L; beyond its border nothing is the concept."""
        return self.apply(mask, size, outside=0)


def _resampled(
    image: Image, frame: Frame, ratio: tuple[float, float], size: int, outside: Outside
) -> Image:
    """Sample a turned or overhanging square, with as many samples as keep it from flickering."""
    from PIL.Image import Resampling, Transform

    corners = [(x * ratio[0], y * ratio[1]) for x, y in frame.quad]
    margin = 3.0  # what a bicubic sample reaches over the edge
    low = [math.floor(min(c[n] for c in corners) - margin) for n in (0, 1)]
    high = [math.ceil(max(c[n] for c in corners) + margin) for n in (0, 1)]
    kept = (
        max(low[0], 0),
        max(low[1], 0),
        min(high[0], image.width),
        min(high[1], image.height),
    )
    if kept[0] >= kept[2] or kept[1] >= kept[3]:
        raise ValueError("the frame lies beside the photo")
    part = image.crop(kept)
    side = frame.side * max(ratio)
    factor = max(1, int(side / (2 * size)))
    if factor > 1:
        part = part.reduce(factor)
    pads = [
        math.ceil(max(0, inner - outer) / factor) for inner, outer in zip(kept, low, strict=False)
    ]
    pads += [math.ceil(max(0, outer - kept[n + 2]) / factor) for n, outer in enumerate(high)]
    part = _padded(part, pads, outside)

    def place(point: Point) -> Point:
        return (point[0] - kept[0]) / factor + pads[0], (point[1] - kept[1]) / factor + pads[1]

    origin, lower, _, upper = (place(corner) for corner in corners)
    samples = max(1, math.ceil(side / factor / size))
    fine = size * samples
    across = [(upper[n] - origin[n]) / fine for n in (0, 1)]
    down = [(lower[n] - origin[n]) / fine for n in (0, 1)]
    numbers = (across[0], down[0], origin[0], across[1], down[1], origin[1])
    turned = part.transform((fine, fine), Transform.AFFINE, numbers, Resampling.BICUBIC)
    return turned.reduce(samples) if samples > 1 else turned


def _padded(part: Image, pads: list[int], outside: Outside) -> Image:
    """Widen a picture by `pads` pixels on the left, top, right and bottom."""
    if not any(pads):
        return part
    from PIL import Image

    left, top, right, bottom = pads
    if outside != "mirror":
        sheet = Image.new(
            part.mode, (part.width + left + right, part.height + top + bottom), outside
        )
        sheet.paste(part, (left, top))
        return sheet
    import numpy as np

    pixels = np.asarray(part)
    widths = ((top, bottom), (left, right), (0, 0))[: pixels.ndim]
    return Image.fromarray(np.pad(pixels, widths, mode="symmetric"))
