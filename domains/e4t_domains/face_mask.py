"""Masks of a head: by the parser on the aligned crop, or as an ellipse by eyes and mouth."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from e4t_cli import Frame
from e4t_domains.face_alignment import FFHQ, Landmarks, align
from e4t_domains.face_parsing import HEAD, LabelMap
from e4t_domains.face_regions import Point, find_faces

if TYPE_CHECKING:
    from PIL.Image import Image

ELLIPSE = ((0.5, 0.47), (0.36, 0.46))
"""Centre and radii of a head with its hair, as parts of the FFHQ square around its face."""


def parsed_head(labels: LabelMap, size: int, near: Point | None = None) -> Image:
    """Return the mask of a head: mode L, `size` × `size`, 255 on it.

    Args:
        labels: of the square.
        size: in pixels.
        near: of several heads the one nearest to this point, in fractions of the square; None takes all.
    """
    import numpy as np
    from PIL import Image as PILImage

    inside = labels.where(HEAD)
    found = find_faces(labels) if near is not None else []
    if near is not None and found:
        at = near[0] * inside.shape[1], near[1] * inside.shape[0]
        inside = min(found, key=lambda face: math.dist(face.center, at)).head
    mask = PILImage.fromarray((inside * 255).astype(np.uint8))
    return mask if mask.width == size else mask.resize((size, size), PILImage.Resampling.BILINEAR)


def ellipse(face: Landmarks, frame: Frame, size: int) -> Image:
    """Return an ellipse around a head with its hair, by two eyes and the mouth in pixels of the photo.

    Args:
        face: has two eyes.
        frame: the square of the photo that the mask is for.
        size: in pixels.
    """
    import numpy as np
    from PIL import Image as PILImage

    square = align(face, frame.size, FFHQ)
    (x, y), (rx, ry) = ELLIPSE
    rows, columns = (np.indices((size, size)) + 0.5) / size
    origin, right, below = (square.from_photo(frame.to_photo(*at)) for at in ((0, 0), (1, 0), (0, 1)))
    at_x, at_y = (origin[n] + columns * (right[n] - origin[n]) + rows * (below[n] - origin[n]) for n in (0, 1))
    inside = ((at_x - x) / rx) ** 2 + ((at_y - y) / ry) ** 2 <= 1
    return PILImage.fromarray((inside * 255).astype(np.uint8))


def shares(mask: Image, other: Image) -> float:
    """Return the part of another mask's area that a mask covers."""
    import numpy as np

    area = np.asarray(other) > 127
    return float((np.asarray(mask)[area] > 127).mean()) if area.any() else 0.0


def moved(mask: Image, source: Frame, frame: Frame, size: int) -> Image:
    """Return the mask of one square of the photo in another one; 0 outside of the first."""
    from PIL.Image import Resampling, Transform

    if source == frame and mask.width == size:
        return mask
    origin, right, below = (source.from_photo(frame.to_photo(*at)) for at in ((0, 0), (1, 0), (0, 1)))
    matrix = []
    for n in (0, 1):
        steps = ((end[n] - origin[n]) * mask.width / size for end in (right, below))
        matrix += [*steps, origin[n] * mask.width]
    return mask.transform((size, size), Transform.AFFINE, matrix, Resampling.BILINEAR)


def cut_at_border(mask: Image, frame: Frame) -> Image:
    """Return the mask of a square without what is beyond the photo's border."""
    from PIL import Image as PILImage
    from PIL import ImageChops

    if frame == Frame.centered(frame.size):
        return mask
    return ImageChops.darker(mask, frame.apply_to_mask(PILImage.new("L", frame.size, 255), mask.width))
