"""Finds faces in a label map: connected regions of heads, each with its eyes and mouth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from e4t_domains.face_parsing import EYES, GLASSES, HEAD, MOUTH, SKIN, LabelMap

if TYPE_CHECKING:
    import numpy as np

Point = tuple[float, float]
MIN_OF_IMAGE = 0.002
MIN_OF_LARGEST = 0.04
MIN_OF_EYE = 0.3
MIN_SKIN = 0.2
"""Regions smaller than these parts of the image, of the largest head and of the larger eye are
noise; a head without eyes and mouth needs that part of skin."""
LONG_EYES, LONG_GLASSES = 8.0, 2.5
"""Ratio of variances along and across a region of eyes or glasses above which it is two."""


@dataclass(frozen=True, eq=False)
class Face:
    """One head. Points are in pixels of the label map; pixel i covers i to i + 1.

    Args:
        head: (side, side) bool, the pixels of this person.
        eyes: centres, from left to right in an upright image: two, one or none.
        mouth: centre of the lips, None if it is hidden.
        confidence: mean confidence of the parser over the head's pixels, 0 to 1.
    """

    head: np.ndarray
    eyes: tuple[Point, ...]
    mouth: Point | None
    confidence: float = 1.0

    @property
    def is_plausible(self) -> bool:
        """Whether eyes and mouth are arranged as in a frontal face."""
        if len(self.eyes) < 2 or self.mouth is None:
            return False
        (ax, ay), (bx, by) = self.eyes
        apart = math.hypot(bx - ax, by - ay)
        down = self.mouth[0] - (ax + bx) / 2, self.mouth[1] - (ay + by) / 2
        along = (down[0] * (bx - ax) + down[1] * (by - ay)) / apart
        across = (down[1] * (bx - ax) - down[0] * (by - ay)) / apart
        return 0.45 * apart < across < 2 * apart and abs(along) < 0.4 * across

    @property
    def area(self) -> int:
        """Pixels of the head."""
        return int(self.head.sum())

    @property
    def center(self) -> Point:
        """Mean of the head's pixels."""
        return centroid(self.head)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the head."""
        import numpy as np

        rows, columns = np.flatnonzero(self.head.any(1)), np.flatnonzero(self.head.any(0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def find_faces(label_map: LabelMap) -> list[Face]:
    """Return the faces in a label map, from left to right.

    A head without eyes, glasses and mouth is a face if it has enough skin; otherwise it is the back of a head.
    """
    heads = label_map.where(HEAD)
    parts = {"eyes": label_map.where(EYES), "glasses": label_map.where(GLASSES), "mouth": label_map.where(MOUTH)}
    skin = label_map.where(SKIN)
    largest = heads.sum()
    regions = split_regions(heads)
    if regions:
        largest = max(region.sum() for region in regions)
    faces: list[Face] = []
    for region in regions:
        if region.sum() < max(MIN_OF_IMAGE * heads.size, MIN_OF_LARGEST * largest):
            continue
        for head in _separated(region, parts["mouth"], parts["eyes"]):
            face = _face(head, label_map, **{name: part & head for name, part in parts.items()})
            if face.eyes or face.mouth or (skin & head).sum() >= MIN_SKIN * face.area:
                faces.append(face)
    return sorted(faces, key=lambda face: face.center)


def split_regions(mask: np.ndarray) -> list[np.ndarray]:
    """Return the connected regions of a mask (8 neighbours), largest first, each as a mask."""
    import numpy as np

    parents = [0]

    def root(label: int) -> int:
        while parents[label] != label:
            label = parents[label] = parents[parents[label]]
        return label

    labels = np.zeros(mask.shape, dtype=np.int64)
    above: list[tuple[int, int, int]] = []
    for y, row in enumerate(mask.astype(np.int8)):
        edges = np.flatnonzero(np.diff(row, prepend=0, append=0))
        runs = []
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            touched = {root(label) for a, b, label in above if a <= stop and b >= start}
            if not touched:
                parents.append(len(parents))
                touched = {len(parents) - 1}
            label = min(touched)
            for other in touched:
                parents[other] = label
            labels[y, start:stop] = label
            runs.append((start, stop, label))
        above = runs
    roots = np.array([root(label) for label in range(len(parents))])[labels]
    found = [roots == label for label in np.unique(roots) if label]
    return sorted(found, key=lambda region: -int(region.sum()))


def centroid(mask: np.ndarray) -> Point:
    """Return the centroid of a mask's pixels."""
    import numpy as np

    rows, columns = np.nonzero(mask)
    return float(columns.mean()) + 0.5, float(rows.mean()) + 0.5


def _separated(region: np.ndarray, mouths: np.ndarray, eyes: np.ndarray) -> list[np.ndarray]:
    """Split heads that touch into as many as there are mouths with two eyes each."""
    import numpy as np

    lips = _without_noise(split_regions(mouths & region))
    pupils = _without_noise(split_regions(eyes & region))
    if len(lips) < 2 or len(pupils) < 2 * len(lips) - 1:
        return [region]
    seeds = []
    for mouth in (centroid(one) for one in lips):
        nearest = sorted((centroid(eye) for eye in pupils), key=lambda eye: math.dist(eye, mouth))
        seeds.append(np.mean([mouth, *nearest[:2]], axis=0))
    rows, columns = np.indices(region.shape)
    distance = [(columns + 0.5 - x) ** 2 + (rows + 0.5 - y) ** 2 for x, y in seeds]
    owner = np.argmin(distance, axis=0)
    return [region & (owner == index) for index in range(len(seeds))]


def _face(head: np.ndarray, label_map: LabelMap, eyes: np.ndarray, glasses: np.ndarray, mouth: np.ndarray) -> Face:
    import numpy as np

    centres = [centroid(eye) for eye in _without_noise(split_regions(eyes))[:2]]
    if len(centres) < 2:  # run together, or behind glasses
        centres = _halves(eyes, LONG_EYES) or centres
        if len(centres) < 2 and glasses.sum() > MIN_OF_EYE * eyes.sum():
            centres = _halves(glasses | eyes, LONG_GLASSES) or centres
    lips = _without_noise(split_regions(mouth))
    lip = centroid(np.logical_or.reduce(lips)) if lips else None
    centres.sort()
    if len(centres) == 2 and lip is not None:
        (ax, ay), (bx, by) = centres
        down = (lip[0] - (ax + bx) / 2, lip[1] - (ay + by) / 2)
        if (bx - ax) * down[1] - (by - ay) * down[0] < 0:
            centres.reverse()  # the head is upside down: the mouth is always below the eyes
    return Face(head, tuple(centres), lip, float(label_map.confidence[head].mean()))


def _without_noise(regions: list[np.ndarray]) -> list[np.ndarray]:
    return [one for one in regions if one.sum() >= max(2, MIN_OF_EYE * regions[0].sum())]


def _halves(region: np.ndarray, long: float) -> list[Point]:
    """Return the centres of a region's halves; none if it is not much longer than wide."""
    import numpy as np

    rows, columns = np.nonzero(region)
    points = np.stack([columns, rows], axis=1) + 0.5
    if len(points) < 4:
        return []
    middle = points.mean(axis=0)
    spread, axes = np.linalg.eigh(np.cov((points - middle).T))
    if spread[1] < long * spread[0]:
        return []
    side = (points - middle) @ axes[:, 1]
    return [tuple(points[half].mean(axis=0).tolist()) for half in (side < 0, side >= 0)]
