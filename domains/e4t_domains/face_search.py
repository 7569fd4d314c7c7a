"""Searches faces with the parser alone, where there is no detector: drawings, and photographs without OpenCV.

At two scales, refined in their own crops, and rotated if necessary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING

from e4t_cli import Frame
from e4t_domains.face_alignment import AlignmentSpec, settle, square_of, surround
from e4t_domains.face_detection import GREY
from e4t_domains.face_mask import cut_at_border, parsed_head
from e4t_domains.face_parsing import LabelMap, Parser
from e4t_domains.face_regions import Face, Point, find_faces

if TYPE_CHECKING:
    from PIL.Image import Image

REFINEMENTS = 3
"""Maximum number of smaller and smaller crops, until the frame is stable."""
BATCH_SIZE = 8
MAX_REFINED = 3
"""Of many faces, the number of the largest that are refined before one is chosen."""
MIN_CONFIDENCE = 0.7
"""Mean confidence over a head below which a face is not detected reliably."""
MIN_CONFIDENCE_ROTATED = 0.74
ROTATION_MARGIN = 0.1
"""By how much the confidence in a rotated view must exceed that in the upright one."""


@dataclass(frozen=True, eq=False)
class Detection:
    """A face that was found in one view of the photo.

    Args:
        face: in pixels of the view.
        view: the part of the photo that was labelled.
        frame: the square of the photo in which the spec wants this face.
    """

    face: Face
    view: Frame
    frame: Frame

    @property
    def center(self) -> Point:
        """The centre of the head, in the photo."""
        return self._in_photo(self.face.center)

    @property
    def score(self) -> float:
        """The confidence of the parser, 0 to 1."""
        return self.face.confidence

    @property
    def eyes(self) -> tuple[Point, ...]:
        """The eyes that were found, in the photo."""
        return tuple(self._in_photo(eye) for eye in self.face.eyes)

    @property
    def mouth(self) -> Point | None:
        """The mouth, in the photo."""
        return None if self.face.mouth is None else self._in_photo(self.face.mouth)

    @property
    def points(self) -> tuple[Point, ...]:
        """Eyes and mouth, as far as they were found."""
        return self.eyes if self.mouth is None else (*self.eyes, self.mouth)

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, width and height of the head, in the photo."""
        left, top, right, bottom = self.face.box
        corners = [self._in_photo((x, y)) for x in (left, right) for y in (top, bottom)]
        (left, right), (top, bottom) = ((min(one), max(one)) for one in zip(*corners, strict=True))
        return left, top, right - left, bottom - top

    def _in_photo(self, point: Point) -> Point:
        side = len(self.face.head)
        return self.view.to_photo(point[0] / side, point[1] / side)

    @property
    def extent(self) -> float:
        """The area of the head in the photo, up to a factor."""
        return self.face.area / self.face.head.size * self.view.side**2

    def head_frame(self, spec: AlignmentSpec) -> Frame:
        """Return the upright square of the photo around the head, wherever its eyes are."""
        size = self.face.head.shape[1], self.face.head.shape[0]
        found = self.view.within(surround(self.face, size, spec))
        return Frame.around(found.size, found.center, found.side)

    @property
    def is_stable(self) -> bool:
        """Whether the view was the frame itself, so that refinement would change nothing."""
        turn = (self.frame.turn - self.view.turn + 180) % 360 - 180
        moved = math.dist(self.frame.center, self.view.center) / self.view.side
        zoom = self.frame.side / self.view.side
        return self.face.is_plausible and abs(turn) < 5 and moved < 0.1 and 0.8 < zoom < 1.25


@dataclass
class FaceDetector:
    """Detects the faces of one photo with one parser.

    Args:
        photo: upright, RGB.
        parser: labels squares.
        spec: how faces are framed.
        size: side of the prepared image.
    """

    photo: Image
    parser: Parser
    spec: AlignmentSpec
    size: int
    _labels: dict[Frame, LabelMap] = field(default_factory=dict)

    def label(self, view: Frame) -> LabelMap:
        """Return the labels of a view; they are cached."""
        self._label_all([view])
        return self._labels[view]

    def _label_all(self, views: list[Frame]) -> None:
        side = self.parser.side or self.size
        new = [view for view in views if view not in self._labels]
        images = [view.apply(self.photo, side, outside=GREY) for view in new]
        for start in range(0, len(new), BATCH_SIZE):
            batch = slice(start, start + BATCH_SIZE)
            self._labels |= zip(new[batch], self.parser.parse(images[batch]), strict=True)

    def detect_in(self, view: Frame) -> list[Detection]:
        """Return the faces in a view, from left to right."""
        labels = self.label(view)
        size = labels.labels.shape[1], labels.labels.shape[0]
        return [Detection(face, view, view.within(square_of(face, size, self.spec))) for face in find_faces(labels)]

    def detect(self) -> list[Detection]:
        """Return the faces of the photo, from left to right, the largest ones refined."""
        upright: list[Detection] = []
        for view in dict.fromkeys((Frame.whole(self.photo.size), Frame.centered(self.photo.size))):
            found = self.detect_in(view)
            large = sorted(found, key=lambda one: one.extent)[-MAX_REFINED:]
            found = [self.refine(one) if one in large else one for one in found]
            if self._confidence(found) >= self.spec.confidence:
                return found
            if self._confidence(found) > self._confidence(upright) or not upright:
                upright = found
        rotated = max(self._detect_rotated(), key=self._confidence, default=[])
        needed = self._confidence(upright) + ROTATION_MARGIN
        return rotated if self._confidence(rotated) > needed else upright

    def head_mask(self, frame: Frame, center: Point, *, only_face: bool) -> Image:
        """Return the mask of a head: mode L, of the prepared image's size.

        Args:
            frame: of the prepared image.
            center: approximate centre of the head, in the photo.
            only_face: whether it is the photo's only one; then all head pixels belong to it.
        """
        near = None if only_face else frame.from_photo(center)
        return cut_at_border(parsed_head(self.label(frame), self.size, near), frame)

    def _confidence(self, found: list[Detection]) -> float:
        return max((one.face.confidence for one in found if self.is_reliable(one)), default=0.0)

    def is_reliable(self, one: Detection) -> bool:
        """Whether a face's eyes and mouth are detected well enough to align it."""
        framed = settle(one.frame, self.spec) == Frame.centered(self.photo.size)
        stable = one.is_stable or (one.face.is_plausible and framed)
        return one.face.confidence >= MIN_CONFIDENCE and stable

    def refine(self, one: Detection) -> Detection:
        """Detect a face again in its own frame, where eyes and mouth are larger and upright."""
        for _ in range(REFINEMENTS):
            if self.is_reliable(one):
                return one
            found = self.detect_in(one.frame)
            found = [other for other in found if len(other.face.eyes) >= len(one.face.eyes)]
            if not found:
                return one
            one = min(found, key=lambda other: math.dist(other.center, one.frame.center))
        return one

    def _detect_rotated(self) -> list[list[Detection]]:
        """Return the reliable faces of each rotated and magnified view of the photo."""
        width, height = self.photo.size
        views = [
            Frame.around((width, height), (width / 2, height / 2), zoom * max(width, height), turn)
            for turn, zoom in product(self.spec.turns, self.spec.zooms)
        ]
        self._label_all(views)
        found = []
        for view in views:
            refined = [self.refine(one) for one in self.detect_in(view)]
            found.append([one for one in refined if one.is_stable and one.face.confidence >= MIN_CONFIDENCE_ROTATED])
        return found
