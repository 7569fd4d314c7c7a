"""The square of a photo that becomes the prepared image, upright or rotated.

The photo, its mask and its alpha channel are cropped with the same `Frame`, so that they stay aligned. Coordinates are
in pixels of the photo and continuous: pixel i covers i to i + 1.
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
        corner: the square's upper left corner; it may lie outside the photo.
        edge: the vector from that corner to the upper right one.
    """

    size: tuple[int, int]
    corner: Point
    edge: Point

    def __post_init__(self) -> None:
        values = (*self.size, *self.corner, *self.edge)
        if not all(map(math.isfinite, values)) or min(self.size) < 1 or self.side <= 0:
            raise ValueError(f"a frame must be a square of some size in a photo, not {values}")

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
        """Return the square of that side around a point, rotated clockwise by `turn` degrees."""
        u, v = side * math.cos(math.radians(turn)), side * math.sin(math.radians(turn))
        corner = (center[0] - (u - v) / 2, center[1] - (v + u) / 2)
        return cls(size=size, corner=corner, edge=(u, v))

    @property
    def side(self) -> float:
        """Length of an edge, in pixels of the photo."""
        return math.hypot(*self.edge)

    @property
    def turn(self) -> float:
        """Clockwise rotation in degrees, from -180 to 180."""
        return math.degrees(math.atan2(self.edge[1], self.edge[0]))

    @property
    def center(self) -> Point:
        """Its centre, in pixels of the photo."""
        return self.to_photo(0.5, 0.5)

    @property
    def quad(self) -> tuple[Point, Point, Point, Point]:
        """Its corners: upper left, lower left, lower right, upper right."""
        at = self.to_photo
        return at(0, 0), at(0, 1), at(1, 1), at(1, 0)

    def to_photo(self, across: float, down: float) -> Point:
        """Return the point of the photo at fractions (0 to 1) of the square."""
        (x, y), (u, v) = self.corner, self.edge
        return x + across * u - down * v, y + across * v + down * u

    def from_photo(self, point: Point) -> Point:
        """Return the fractions (0 to 1) of the square at a point of the photo."""
        x, y = point[0] - self.corner[0], point[1] - self.corner[1]
        (u, v), area = self.edge, self.side**2
        return (x * u + y * v) / area, (y * u - x * v) / area

    def contains(self, point: Point) -> bool:
        """Whether a point of the photo is in the square."""
        return all(0 <= fraction <= 1 for fraction in self.from_photo(point))

    def within(self, inner: Self) -> Self:
        """Return the frame in this photo of `inner`, a frame in the image cropped with this one."""
        corner = self.to_photo(inner.corner[0] / inner.size[0], inner.corner[1] / inner.size[1])
        u, v = inner.edge[0] / inner.size[0], inner.edge[1] / inner.size[1]
        a, b = self.edge
        return type(self)(size=self.size, corner=corner, edge=(u * a - v * b, u * b + v * a))

    def apply(self, image: Image, size: int, *, outside: Outside = "mirror") -> Image:
        """Crop an image to the square and scale it to `size` × `size`.

        Args:
            image: the photo, or anything of its proportions at any resolution.
            size: in pixels.
            outside: the fill beyond the photo's border: "mirror" for its reflection, or a colour.
        """
        from PIL.Image import Resampling

        ratio = image.width / self.size[0], image.height / self.size[1]
        left, top = self.corner[0] * ratio[0], self.corner[1] * ratio[1]
        right, bottom = (self.corner[n] * ratio[n] + self.edge[0] * ratio[n] for n in (0, 1))
        upright = self.edge[1] == 0 and self.edge[0] > 0
        slack = 1e-6 * max(image.size)
        if upright and min(left, top) >= 0 and right <= image.width + slack and bottom <= image.height + slack:
            box = (left, top, min(right, image.width), min(bottom, image.height))
            return image.resize((size, size), Resampling.LANCZOS, box=box)
        return _resampled(image, self, ratio, size, outside)

    def apply_to_mask(self, mask: Image, size: int) -> Image:
        """Crop a mask of mode L to the square; beyond its border it is 0."""
        return self.apply(mask, size, outside=0)


def _resampled(image: Image, frame: Frame, ratio: tuple[float, float], size: int, outside: Outside) -> Image:
    """Resample a rotated or overhanging square, supersampled against aliasing."""
    from PIL.Image import Resampling, Transform

    corners = [(x * ratio[0], y * ratio[1]) for x, y in frame.quad]
    margin = 3.0  # radius of the bicubic kernel, and one more
    low = [math.floor(min(c[n] for c in corners) - margin) for n in (0, 1)]
    high = [math.ceil(max(c[n] for c in corners) + margin) for n in (0, 1)]
    kept = max(0, low[0]), max(0, low[1]), min(high[0], image.width), min(high[1], image.height)
    if kept[0] >= kept[2] or kept[1] >= kept[3]:
        raise ValueError("the frame does not overlap the photo")
    side = frame.side * max(ratio)
    factor = max(1, int(side / (2 * size)))
    overhang = kept[0] - low[0], kept[1] - low[1], high[0] - kept[2], high[1] - kept[3]
    pads = [math.ceil(max(0, pixels) / factor) for pixels in overhang]
    part = _padded(image.crop(kept).reduce(factor), pads, outside)

    def to_part(point: Point) -> Point:
        return (point[0] - kept[0]) / factor + pads[0], (point[1] - kept[1]) / factor + pads[1]

    origin, lower, _, upper = (to_part(corner) for corner in corners)
    samples = max(1, math.ceil(side / factor / size))
    fine = size * samples
    across, down = ([(end[n] - origin[n]) / fine for n in (0, 1)] for end in (upper, lower))
    matrix = (across[0], down[0], origin[0], across[1], down[1], origin[1])
    return part.transform((fine, fine), Transform.AFFINE, matrix, Resampling.BICUBIC).reduce(samples)


def _padded(part: Image, pads: list[int], outside: Outside) -> Image:
    """Widen an image by `pads` pixels on the left, top, right and bottom."""
    if not any(pads):
        return part
    import numpy as np
    from PIL import Image, ImageOps

    left, top, right, bottom = pads
    if outside != "mirror":
        return ImageOps.expand(part, (left, top, right, bottom), outside)
    pixels = np.asarray(part)
    widths = ((top, bottom), (left, right), (0, 0))[: pixels.ndim]
    return Image.fromarray(np.pad(pixels, widths, mode="symmetric"))
