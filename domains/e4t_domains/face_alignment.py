"""Computes the square around a face, by eyes and mouth, as in the training images.

The rule is that of FFHQ, by which the paper's face data were cropped: with e the vector between the
eyes and m the one from their middle to the mouth, the square's half-edge x points along
e - rot90(m), its length is max(2.0·|e|, 1.8·|m|), and its centre lies 0.1·m below the eyes. Eyes
and mouth are points of the detector or, without one, regions of the parser.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from e4t_cli import Frame
from e4t_domains.face_regions import Face, Point


class Landmarks(Protocol):
    """Two eyes, from left to right in an upright image, and the middle of the mouth, None if it is hidden."""

    @property
    def eyes(self) -> tuple[Point, ...]: ...

    @property
    def mouth(self) -> Point | None: ...


@dataclass(frozen=True, kw_only=True)
class AlignmentSpec:
    """How a base's training images show faces, and which deviations are not corrected.

    Args:
        eyes, mouth: factors on |e| and |m| for half the square's edge.
        down: factor on m from between the eyes to the square's centre.
        head: factor on the head's height for a square around a profile.
        turn: rotation in degrees that is not corrected.
        shift: offset of the centre, as a part of the edge, that is not corrected.
        zoom: ratio of the found square's edge to the centred one's below which it is cropped.
        wider: whether a found square larger than the centred one is used, the rest mirrored.
        confidence: mean confidence of the parser over a head that needs no rotated views.
        turns, zooms: degrees and parts of the photo of the rotated views. The public parser
            detects faces of every size; the one of `mini` only the two of its drawings.
    """

    eyes: float
    mouth: float
    down: float
    head: float
    turn: float
    shift: float
    zoom: float
    wider: bool
    confidence: float
    turns: tuple[float, ...]
    zooms: tuple[float, ...]


FFHQ = AlignmentSpec(
    eyes=2.0,
    mouth=1.8,
    down=0.1,
    head=1.35,
    turn=1.5,
    shift=0.02,
    zoom=0.96,
    wider=True,
    confidence=0.7,
    turns=(90, -90, 180),
    zooms=(1.0,),
)
# The drawings of `mini` show heads upright and near the middle, in two sizes, and its weights were
# trained on nothing else. This is their usual framing; their own variation is not corrected.
DRAWN = AlignmentSpec(
    eyes=2.68,
    mouth=3.13,
    down=-0.2,
    head=1.6,
    turn=10.0,
    shift=0.12,
    zoom=0.75,
    wider=False,
    confidence=0.75,
    turns=(0, 15, -15, 30, -30, 90, -90, 180),
    zooms=(1.0, 0.8, 0.6),
)
SPECS = {"mini": DRAWN}

# Distance of the mouth from the eyes over that between the eyes, where the mouth is hidden.
_USUAL_MOUTH = 1.1


def spec_of(base: str) -> AlignmentSpec:
    """Return how faces are framed for a base."""
    return SPECS.get(base, FFHQ)


def align(face: Landmarks, size: tuple[int, int], spec: AlignmentSpec) -> Frame:
    """Return the square for a face with two eyes.

    Args:
        face: in pixels of an image.
        size: width and height of that image.
        spec: how far around the face the square reaches.
    """
    (ax, ay), (bx, by) = face.eyes
    between = bx - ax, by - ay
    center_of_eyes = (ax + bx) / 2, (ay + by) / 2
    if face.mouth is not None:
        below = face.mouth[0] - center_of_eyes[0], face.mouth[1] - center_of_eyes[1]
    else:
        below = -_USUAL_MOUTH * between[1], _USUAL_MOUTH * between[0]
    x = between[0] + below[1], between[1] - below[0]
    reach = max(spec.eyes * math.hypot(*between), spec.mouth * math.hypot(*below))
    scale = reach / math.hypot(*x)
    x = x[0] * scale, x[1] * scale
    center = center_of_eyes[0] + spec.down * below[0], center_of_eyes[1] + spec.down * below[1]
    # corner = c - x - y with y = rot90(x) = (-x₁, x₀)
    corner = center[0] - x[0] + x[1], center[1] - x[1] - x[0]
    return Frame(size=size, corner=corner, edge=(2 * x[0], 2 * x[1]))


def square_of(face: Face, size: tuple[int, int], spec: AlignmentSpec) -> Frame:
    """Return the square for a face, rotated if both eyes are detected."""
    return align(face, size, spec) if len(face.eyes) == 2 else surround(face, size, spec)


def surround(face: Face, size: tuple[int, int], spec: AlignmentSpec) -> Frame:
    """Return the upright square around a head of which at most one eye is detected."""
    left, top, right, bottom = face.box
    side = spec.head * max(right - left, bottom - top)
    return Frame.around(size, ((left + right) / 2, (top + bottom) / 2), side)


def settle(frame: Frame, spec: AlignmentSpec) -> Frame:
    """Return the centred square if it is close enough to the found one, otherwise the found one.

    A photo that is framed well already is not resampled and so loses nothing.
    """
    centred = Frame.centered(frame.size)
    zoom = frame.side / centred.side
    shift = math.dist(frame.center, centred.center) / max(centred.side, frame.side)
    turned = abs(frame.turn) > spec.turn
    moved = shift > spec.shift
    closer = zoom < spec.zoom
    farther = spec.wider and zoom * spec.zoom > 1
    if not (turned or moved or closer or farther):
        return centred
    if zoom > 1 and not spec.wider:
        return _shrunk(frame, centred.side / frame.side)
    return frame


def _shrunk(frame: Frame, factor: float) -> Frame:
    """Return the frame scaled around its centre."""
    center = frame.center
    u, v = frame.edge[0] * factor, frame.edge[1] * factor
    corner = center[0] - (u - v) / 2, center[1] - (v + u) / 2
    return Frame(size=frame.size, corner=corner, edge=(u, v))
