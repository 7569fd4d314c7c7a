"""Looking for faces in a photo: once from afar, once more from near, and turned if need be."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING

from e4t_cli import Frame, InputError
from e4t_domains.face_alignment import AlignmentSpec, frame_of, settle
from e4t_domains.face_parsing import HEAD, LabelMap, Parser
from e4t_domains.face_regions import Face, Point, find_faces

if TYPE_CHECKING:
    from PIL.Image import Image

GREY = (127, 127, 127)
"""Beyond the photo's border: a reflection would show faces that are not there."""
LOOKS = 3  # from nearer and nearer, until the frame stays
MAX_AT_ONCE = 8
MAX_NEARER = 3
"""Of many faces, so many are looked at again before one is chosen."""
MIN_SURE = 0.7
"""Mean certainty over a head below which a face is not seen clearly."""
MIN_SURE_TURNED = 0.74
SURER = 0.1
"""By how much a turned look must be surer than the first one to be believed instead."""


@dataclass(frozen=True, eq=False)
class Detection:
    """A face as one look at the photo showed it.

    Args:
        face: in pixels of the look.
        view: what of the photo was looked at.
        frame: the square of the photo that shows this face as the style wants it.
    """

    face: Face
    view: Frame
    frame: Frame

    @property
    def middle(self) -> Point:
        """The middle of the head, in the photo."""
        side = len(self.face.head)
        return self.view.to_photo(self.face.center[0] / side, self.face.center[1] / side)

    @property
    def steady(self) -> bool:
        """Whether the look was at the frame itself, so that a further one would change nothing."""
        turn = (self.frame.turn - self.view.turn + 180) % 360 - 180
        moved = math.dist(self.frame.center, self.view.center) / self.view.side
        zoom = self.frame.side / self.view.side
        return self.face.plausible and abs(turn) < 5 and moved < 0.1 and 0.8 < zoom < 1.25


@dataclass
class FaceDetector:
    """One photo under one parser.

    Args:
        photo: upright, RGB.
        parser: labels squares.
        style: how faces are framed.
        size: side of the prepared picture.
    """

    photo: Image
    parser: Parser
    style: AlignmentSpec
    size: int
    _seen: dict[Frame, LabelMap] = field(default_factory=dict)

    def look(self, view: Frame) -> LabelMap:
        """Label what is in a frame; a second look at the same one costs nothing."""
        self._look_at([view])
        return self._seen[view]

    def _look_at(self, views: list[Frame]) -> None:
        side = self.parser.side or self.size
        new = [view for view in views if view not in self._seen]
        pictures = [view.apply(self.photo, side, outside=GREY) for view in new]
        for start in range(0, len(new), MAX_AT_ONCE):
            some = slice(start, start + MAX_AT_ONCE)
            self._seen |= zip(new[some], self.parser.parse(pictures[some]), strict=True)

    def sightings(self, view: Frame) -> list[Detection]:
        """Return the faces in a frame, from left to right."""
        found = self.look(view)
        size = found.labels.shape[1], found.labels.shape[0]
        return [
            Detection(face, view, view.within(frame_of(face, size, self.style)))
            for face in find_faces(found)
        ]

    def faces(self) -> list[Detection]:
        """Return the faces of the photo, from left to right, the largest as well seen as can be."""
        first: list[Detection] = []
        for view in dict.fromkeys((Frame.whole(self.photo.size), Frame.centered(self.photo.size))):
            found = self.sightings(view)
            large = sorted(found, key=_extent)[-MAX_NEARER:]
            found = [self.nearer(one) if one in large else one for one in found]
            if self._certainty(found) >= self.style.sure:
                return found
            if self._certainty(found) > self._certainty(first) or not first:
                first = found
        best = max(self._turned_looks(), key=self._certainty, default=[])
        return best if self._certainty(best) > self._certainty(first) + SURER else first

    def head(self, frame: Frame, place: Point, *, alone: bool) -> Image:
        """Return the mask of a head: mode L, of the prepared picture's size.

        Args:
            frame: of the prepared picture.
            place: about the middle of the head, in the photo.
            alone: no other head is in the photo; then whatever is part of one belongs to it.
        """
        import numpy as np
        from PIL import Image as PILImage
        from PIL import ImageChops

        inside = self.look(frame).where(HEAD)
        heads = self.sightings(frame)
        if heads and not alone:
            inside = min(heads, key=lambda one: math.dist(one.middle, place)).face.head
        mask = PILImage.fromarray((inside * 255).astype(np.uint8))
        if mask.width != self.size:
            mask = mask.resize((self.size, self.size), PILImage.Resampling.BILINEAR)
        if frame == Frame.centered(self.photo.size):
            return mask
        paper = PILImage.new("L", self.photo.size, 255)
        return ImageChops.darker(mask, frame.apply_to_mask(paper, self.size))

    def _certainty(self, found: list[Detection]) -> float:
        clear = (one.face.sure for one in found if self.is_clear(one))
        return max(clear, default=0.0)

    def is_clear(self, one: Detection) -> bool:
        framed = settle(one.frame, self.style) == Frame.centered(self.photo.size)
        return one.face.sure >= MIN_SURE and (one.steady or (one.face.plausible and framed))

    def nearer(self, one: Detection) -> Detection:
        """Look at a face in its own frame, where eyes and mouth are larger and upright."""
        for _ in range(LOOKS):
            if self.is_clear(one):
                return one
            near = self.sightings(one.frame)
            near = [other for other in near if len(other.face.eyes) >= len(one.face.eyes)]
            if not near:
                return one
            one = min(near, key=lambda other: math.dist(other.middle, one.frame.center))
        return one

    def _turned_looks(self) -> list[list[Detection]]:
        """Look at the photo turned and from near; return what was clearly seen each time."""
        width, height = self.photo.size
        views = [
            Frame.around((width, height), (width / 2, height / 2), zoom * max(width, height), turn)
            for turn, zoom in product(self.style.turns, self.style.zooms)
        ]
        self._look_at(views)
        found = []
        for view in views:
            seen = [self.nearer(one) for one in self.sightings(view)]
            found.append([one for one in seen if one.steady and one.face.sure >= MIN_SURE_TURNED])
        return found


def _extent(one: Detection) -> float:
    """How much of the photo a head covers, up to a factor."""
    return one.face.area / one.face.head.size * one.view.side**2


def choose(faces: list[Detection], which: str) -> Detection:
    """Return one of several faces.

    Args:
        which: "largest", "left", "right", or a number from 1 on, from left to right.

    Raises:
        InputError: there are not so many.
    """
    if which == "largest":
        return max(faces, key=_extent)
    ordered = sorted(faces, key=lambda one: one.middle)
    number = {"left": 1, "right": len(faces)}.get(which) or int(which)
    if number > len(faces):
        seen = "is 1 face" if len(faces) == 1 else f"are {len(faces)} faces"
        raise InputError(f"there {seen} in the picture, not {number}", hint="--face 1 is leftmost")
    return ordered[number - 1]
