"""Draws what was found in a photo: numbered boxes, points, and the square that is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from e4t_cli.registry.domain import FoundSubject

if TYPE_CHECKING:
    from e4t_cli.images.framing import Frame

BOX, POINT, SQUARE, INK = (255, 230, 0), (0, 255, 255), (0, 90, 255), (0, 0, 0)


def annotate(photo: Image.Image, found: Sequence[FoundSubject], frame: Frame | None, *, height: int) -> Image.Image:
    """Return a photo, scaled to a height in pixels, with its subjects numbered from 1 in the order given.

    Args:
        frame: the square that is used, None draws none.
    """
    scale = height / photo.height
    picture = photo.resize((max(1, round(photo.width * scale)), height), Image.Resampling.LANCZOS)
    pen, line = ImageDraw.Draw(picture), max(2, height // 400)
    font = ImageFont.load_default(max(11, height // 40))
    if frame is not None:
        corners = [(x * scale, y * scale) for x, y in frame.quad]
        pen.line([*corners, corners[0]], fill=SQUARE, width=line)
    for number, one in enumerate(found, start=1):
        left, top, width, high = (length * scale for length in one.box)
        pen.rectangle((left, top, left + width, top + high), outline=BOX, width=line)
        for x, y in one.points:
            pen.ellipse((x * scale - line, y * scale - line, x * scale + line, y * scale + line), fill=POINT)
        label = pen.textbbox((0, 0), f" {number} ", font=font)
        at = min(max(0, left), picture.width - label[2]), min(max(0, top - label[3] - line), height - label[3])
        pen.rectangle((at[0], at[1], at[0] + label[2], at[1] + label[3] + line), fill=BOX)
        pen.text(at, f" {number} ", fill=INK, font=font)
    return picture
