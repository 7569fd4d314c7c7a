"""From eyes and mouth to the square that shows a face as the training pictures do.

The rule is that of FFHQ, by which the paper's face data were cut: with e the vector between the
eyes and m the one from their middle to the mouth, the square's half-edge x points along
e - rot90(m), its length is max(2.0·|e|, 1.8·|m|), and its centre lies 0.1·m below the eyes. Here
eyes and mouth are the parser's own regions, so no other network is needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from e4t_cli import Frame
from e4t_domains.face_regions import Face, Point


@dataclass(frozen=True, kw_only=True)
class AlignmentSpec:
    """How a base's training pictures show faces, and what is near enough to be left alone.

    Args:
        eyes, mouth: factors on |e| and |m| for half the square's edge.
        down: factor on m from between the eyes to the square's centre.
        head: factor on the head's height for a square around a profile.
        turn: degrees that are left alone.
        shift: of the centre, as a part of the edge, that is left alone.
        zoom: edge of the found square over that of the centred one: a smaller one is cut out.
        wider: whether a found square larger than the centred one is taken, the rest mirrored.
        sure: mean certainty of the parser about a head that makes further looks needless.
        turns, zooms: degrees, and parts of the photo, to look again at where nothing was clear. The
            public parser knows faces of every size; the drawn world's parser only its own two.
    """

    eyes: float
    mouth: float
    down: float
    head: float
    turn: float
    shift: float
    zoom: float
    wider: bool
    sure: float
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
    sure=0.7,
    turns=(90, -90, 180),
    zooms=(1.0,),
)
# The drawn world shows heads upright and near the middle, in two sizes; its packs have seen nothing
# else. Its usual framing is this rule, and what it varies by itself is left alone.
DRAWN = AlignmentSpec(
    eyes=2.68,
    mouth=3.13,
    down=-0.2,
    head=1.6,
    turn=10.0,
    shift=0.12,
    zoom=0.75,
    wider=False,
    sure=0.75,
    turns=(0, 15, -15, 30, -30, 90, -90, 180),
    zooms=(1.0, 0.8, 0.6),
)
STYLES = {"mini": DRAWN}

# Between the eyes to the mouth over between the eyes, for a mouth that is hidden.
_USUAL_MOUTH = 1.1


def style_of(base: str) -> AlignmentSpec:
    """Return how faces are framed for a base."""
    return STYLES.get(base, FFHQ)


def align(face: Face, size: tuple[int, int], style: AlignmentSpec) -> Frame:
    """Return the square for a face with two eyes.

    Args:
        face: in pixels of a picture.
        size: width and height of that picture.
        style: how far around the face it reaches.
    """
    (ax, ay), (bx, by) = face.eyes
    between = bx - ax, by - ay
    middle = (ax + bx) / 2, (ay + by) / 2
    if face.mouth is not None:
        below = face.mouth[0] - middle[0], face.mouth[1] - middle[1]
    else:
        below = -_USUAL_MOUTH * between[1], _USUAL_MOUTH * between[0]
    x = between[0] + below[1], between[1] - below[0]
    reach = max(style.eyes * math.hypot(*between), style.mouth * math.hypot(*below))
    scale = reach / math.hypot(*x)
    x = x[0] * scale, x[1] * scale
    center = middle[0] + style.down * below[0], middle[1] + style.down * below[1]
    # corner = c - x - y with y = rot90(x) = (-x₁, x₀)
    corner = center[0] - x[0] + x[1], center[1] - x[1] - x[0]
    return Frame(size=size, corner=corner, edge=(2 * x[0], 2 * x[1]))


def frame_of(face: Face, size: tuple[int, int], style: AlignmentSpec) -> Frame:
    """Return the square for a face, turned if both eyes are seen."""
    return align(face, size, style) if len(face.eyes) == 2 else surround(face, size, style)


def surround(face: Face, size: tuple[int, int], style: AlignmentSpec) -> Frame:
    """Return the upright square around a head of which only one side is seen."""
    left, top, right, bottom = face.box
    side = style.head * max(right - left, bottom - top)
    return Frame.around(size, ((left + right) / 2, (top + bottom) / 2), side)


def settle(frame: Frame, style: AlignmentSpec) -> Frame:
    """Return the centred square if it is near enough, or what of the found one makes sense.

    A picture that is framed well already is not resampled: it loses nothing.
    """
    centred = Frame.centered(frame.size)
    zoom = frame.side / centred.side
    shift = math.dist(frame.center, centred.center) / max(centred.side, frame.side)
    turned = abs(frame.turn) > style.turn
    moved = shift > style.shift
    closer = zoom < style.zoom
    farther = style.wider and zoom * style.zoom > 1
    if not (turned or moved or closer or farther):
        return centred
    if zoom > 1 and not style.wider:
        return _shrunk(frame, centred.side / frame.side)
    return frame


def _shrunk(frame: Frame, factor: float) -> Frame:
    """Return the frame with its centre and direction, and a shorter edge."""
    center: Point = frame.center
    u, v = frame.edge[0] * factor, frame.edge[1] * factor
    corner = center[0] - (u - v) / 2, center[1] - (v + u) / 2
    return Frame(size=frame.size, corner=corner, edge=(u, v))
