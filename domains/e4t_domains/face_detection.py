"""Detects faces in a photo with a network that finds upright faces: at several scales, and rotated if necessary.

The network is YuNet (Wu et al., 2023; MIT licence), through OpenCV. It finds faces of about 10 to 300 pixels, so the
photo is searched at several scales, and each face is detected again in its own view, upright and of one size: there
its points are exact, and what was no face is not found again.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from e4t_cli import Frame, PreparationTarget, WeightsUnavailable
from e4t_domains.face_alignment import FFHQ, align
from e4t_domains.face_parsing import PACKAGED

if TYPE_CHECKING:
    from PIL.Image import Image

Point = tuple[float, float]
REPOSITORY = "opencv/face_detection_yunet"
FILE = "face_detection_yunet_2023mar.onnx"
SHA256 = "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4"
"""Of the file: another one was not tested with this code, and is not opened."""

MIN_SCORE = 0.6
MAX_OVERLAP = 0.5
GREY = (127, 127, 127)
"""Fill beyond the photo's border: a reflection would show faces that are not there."""

VIEWS = ((2560, 1.0), (960, 1.0), (320, 1.6))
"""Pixels of the views in which the photo is searched, and their sides as parts of the photo's longer one."""
MAX_ENLARGED = 2.0
SURE = 0.8
"""Best score below which the photo is also searched on its sides and upside down."""
OWN_VIEW, OWN_SIDE = 2.0, 384
"""Side of a face's own view, as a part of its box and in pixels."""
ROUNDS = 4
MIN_SIDE = 16.0
"""Pixels of the photo; what is smaller is no use."""


@dataclass(frozen=True, kw_only=True)
class Detection:
    """A face.

    Args:
        box: left, top, width and height, in pixels of the image.
        points: two eyes, nose, two corners of the mouth; each pair from left to right where the face is upright.
        score: of the detector, 0 to 1.
    """

    box: tuple[float, float, float, float]
    points: tuple[Point, ...]
    score: float

    @property
    def eyes(self) -> tuple[Point, ...]:
        """The two eyes."""
        return self.points[:2]

    @property
    def mouth(self) -> Point | None:
        """The middle of the mouth."""
        (ax, ay), (bx, by) = self.points[3:]
        return (ax + bx) / 2, (ay + by) / 2

    @property
    def center(self) -> Point:
        """The centre of the box."""
        left, top, width, height = self.box
        return left + width / 2, top + height / 2

    @property
    def side(self) -> float:
        """The longer side of the box."""
        return max(self.box[2:])

    @property
    def extent(self) -> float:
        """The area of the box."""
        return self.box[2] * self.box[3]

    @property
    def turn(self) -> float:
        """Clockwise rotation in degrees, from -180 to 180."""
        return align(self, (1, 1), FFHQ).turn

    @property
    def is_profile(self) -> bool:
        """Whether the eyes are as close together, or the nose as far aside, as where a head is seen from the side."""
        (ax, ay), (bx, by) = self.eyes
        apart = math.hypot(bx - ax, by - ay)
        nose = (self.points[2][0] - ax) * (bx - ax) + (self.points[2][1] - ay) * (by - ay)
        return align(self, (1, 1), FFHQ).side > 7.2 * apart or not -0.1 < nose / apart**2 < 1.1

    def to_photo(self, view: Frame, side: int) -> Detection:
        """Return it in the photo, where it was found in a view of `side` × `side` pixels."""
        center = view.to_photo(self.center[0] / side, self.center[1] / side)
        width, height = (length * view.side / side for length in self.box[2:])
        if 45 < abs(view.turn) < 135:
            width, height = height, width
        return Detection(
            box=(center[0] - width / 2, center[1] - height / 2, width, height),
            points=tuple(view.to_photo(x / side, y / side) for x, y in self.points),
            score=self.score,
        )

    def overlap(self, other: Detection) -> float:
        """Return the area that two boxes share, as a part of the smaller one."""
        shared = 1.0
        for n in (0, 1):
            end = min(self.box[n] + self.box[n + 2], other.box[n] + other.box[n + 2])
            shared *= max(0.0, end - max(self.box[n], other.box[n]))
        return shared / min(self.extent, other.extent)


class Detector(Protocol):
    """A network that finds upright faces of about 10 to 300 pixels."""

    def detect(self, image: Image) -> list[Detection]:
        """Return the faces in an image of mode RGB."""


class YuNet:
    """YuNet in OpenCV's `FaceDetectorYN`, which decodes its outputs and suppresses duplicates.

    Args:
        model: the bytes of the ONNX file.
    """

    def __init__(self, model: bytes) -> None:
        import cv2
        import numpy as np

        buffer = np.frombuffer(model, np.uint8)
        empty = np.zeros(0, np.uint8)
        self._net: Any = cv2.FaceDetectorYN.create("onnx", buffer, empty, (320, 320), MIN_SCORE, 0.3, 5000)
        self._lock = threading.Lock()  # the size of the input is a state of the detector

    def detect(self, image: Image) -> list[Detection]:
        """Return the faces in an image."""
        import numpy as np

        # BGR in 8 bits: of greys and of floats it finds nothing, without an error.
        pixels = np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])
        with self._lock:
            self._net.setInputSize(image.size)
            _, rows = self._net.detect(pixels)
        found = []
        for left, top, width, height, *points, score in () if rows is None else rows.tolist():
            pairs = tuple(zip(points[::2], points[1::2], strict=True))
            found.append(Detection(box=(left, top, width, height), points=pairs, score=score))
        return found


def find_detector(target: PreparationTarget) -> Detector | None:
    """Return the detector for a base's photographs; None for a base of drawings, whose parser finds their faces.

    Raises:
        WeightsUnavailable: it is not on this machine and cannot be fetched, or OpenCV is not installed.
    """
    if target.base in PACKAGED:
        return None
    try:
        from cv2 import FaceDetectorYN  # noqa: F401 # some cv2 of another package may have none
    except ImportError as error:
        message = "faces are detected with OpenCV, which is not installed"
        raise WeightsUnavailable(message, hint="pip install opencv-python-headless") from error
    if target.fetch is None:
        raise WeightsUnavailable("there is no face detector here")
    return load_detector(target.fetch(REPOSITORY) / FILE)


@lru_cache(maxsize=1)
def load_detector(path: Path) -> Detector:
    """Load the detector; it is cached.

    Raises:
        WeightsUnavailable: the file is not the one that is known.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsUnavailable(f"the face detector {path.name} cannot be read") from error
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise WeightsUnavailable(f"{path.name} of {REPOSITORY} is not the face detector that this e4t knows")
    return YuNet(data)


def find_faces(photo: Image, detector: Detector) -> list[Detection]:
    """Return the faces of a photo (upright, RGB, any size), from left to right; points and boxes in its pixels."""
    found = _search(photo, detector, (0,))
    if max((one.score for one in found), default=0.0) < SURE:
        found = _without_duplicates([*found, *_search(photo, detector, (90, -90, 180))])
    return sorted(found, key=lambda one: one.center)


def _search(photo: Image, detector: Detector, turns: Sequence[float]) -> list[Detection]:
    """Return the faces in views of the whole photo that are rotated by some degrees."""
    size, longer = photo.size, max(photo.size)
    found = []
    small = photo
    for side, zoom in VIEWS:  # from the largest to the smallest
        if side > max(MAX_ENLARGED * longer, VIEWS[-1][0]):
            continue
        scale = side / (zoom * longer)
        if scale < 0.5:
            width, height = (max(1, round(2 * scale * length)) for length in size)
            small = small.resize((width, height), reducing_gap=2.0)
        for turn in turns:
            view = Frame.around(size, (size[0] / 2, size[1] / 2), zoom * longer, turn)
            found += _detect(small, view, side, detector)
    refined = [refine(photo, one, detector) for one in _without_duplicates(found)]
    large = [one for one in refined if one is not None and one.side >= MIN_SIDE]
    return _without_duplicates(large)


def refine(photo: Image, one: Detection, detector: Detector) -> Detection | None:
    """Detect a face again in its own view, upright and of one size; None if it is not found there."""
    for _ in range(ROUNDS):
        if not one.overlap(Detection(box=(0, 0, *photo.size), points=(), score=1)):
            return None
        view = Frame.around(photo.size, one.center, OWN_VIEW * one.side, one.turn)
        found = [other for other in _detect(photo, view, OWN_SIDE, detector) if other.overlap(one) > MAX_OVERLAP]
        if not found:
            return None
        one = max(found, key=lambda other: other.score)
        turned = (one.turn - view.turn + 180) % 360 - 180
        if abs(turned) < 5 and 0.8 < OWN_VIEW * one.side / view.side < 1.25:
            break
    return one


def _without_duplicates(found: Iterable[Detection]) -> list[Detection]:
    """Return the best of the detections that overlap."""
    kept: list[Detection] = []
    for one in sorted(found, key=lambda one: -one.score):
        if all(one.overlap(other) <= MAX_OVERLAP for other in kept):
            kept.append(one)
    return kept


def _detect(photo: Image, view: Frame, side: int, detector: Detector) -> list[Detection]:
    """Return the faces in a view of the photo, scaled to `side` pixels; what has no two eyes in a box is none."""
    found = detector.detect(view.apply(photo, side, outside=GREY))
    proper = [one for one in found if min(one.box[2:]) > 1 and math.dist(*one.eyes) > 0.5]
    return [one.to_photo(view, side) for one in proper]
