"""Face regions from label maps that were drawn with known positions of eyes and mouth."""

import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from e4t_cli.errors import InputError
from e4t_cli.images.framing import Frame
from e4t_domains.face import choose
from e4t_domains.face_alignment import FFHQ, align, settle, square_of, surround
from e4t_domains.face_parsing import LabelMap
from e4t_domains.face_regions import find_faces, split_regions
from e4t_domains.face_search import Detection

# As the public parser orders them, and as an older revision of it does.
NAMES = dict(
    enumerate(
        [
            "background",
            "skin",
            "nose",
            "eye_g",
            "l_eye",
            "r_eye",
            "mouth",
            "u_lip",
            "l_lip",
            "hair",
            "neck",
        ]
    )
)
OTHER = dict(
    enumerate(
        [
            "background",
            "hair",
            "l_lip",
            "skin",
            "r_eye",
            "neck",
            "l_eye",
            "u_lip",
            "nose",
            "eye_g",
            "mouth",
        ]
    )
)
SIDE = 512


def draw_face(canvas, ids, center, unit, turn, *, eyes=2, mouth=True, glasses=False, back=False):
    """Draw one head; returns its eyes and mouth as they are meant, in continuous pixels."""
    pen = ImageDraw.Draw(canvas)

    def place(x, y):
        angle = math.radians(turn)
        return (
            center[0] + unit * (x * math.cos(angle) - y * math.sin(angle)),
            center[1] + unit * (x * math.sin(angle) + y * math.cos(angle)),
        )

    def blob(x, y, rx, ry, label):
        ring = [place(x + rx * math.cos(a), y + ry * math.sin(a)) for a in np.linspace(0, 6.28, 60)]
        pen.polygon(ring, fill=ids[label])

    blob(0, -0.1, 1.1, 1.35, "hair")
    if back:
        return None
    blob(0, 0.1, 0.9, 1.1, "skin")
    blob(0, 0.25, 0.15, 0.25, "nose")
    # Named from the person's side here: left and right follow from the position, not from the name.
    for x, label in ((-0.4, "r_eye"), (0.4, "l_eye"))[:eyes]:
        if glasses:
            blob(x, -0.1, 0.33, 0.25, "eye_g")
        else:
            blob(x, -0.1, 0.17, 0.09, label)
    if glasses:
        pen.line([place(-0.3, -0.1), place(0.3, -0.1)], fill=ids["eye_g"], width=5)
    if mouth:
        blob(0, 0.62, 0.3, 0.12, "u_lip")
        blob(0, 0.66, 0.25, 0.08, "l_lip")
    return place(-0.4, -0.1), place(0.4, -0.1), place(0, 0.63)


def label_map(*heads, names=NAMES, **options):
    """A label map with heads at (center, unit, turn), and where their features are."""
    ids = {name: index for index, name in names.items()}
    canvas = Image.new("L", (SIDE, SIDE))
    points = [draw_face(canvas, ids, *head, **options) for head in heads]
    labels = np.asarray(canvas).astype(int)
    return LabelMap(labels, names, np.ones(labels.shape, np.float32)), points


def ffhq_quad(left, right, mouth):
    """FFHQ's rule, written down from its description and apart from the program's."""
    left, right, mouth = (np.array(point) for point in (left, right, mouth))
    eye_avg, eye_to_eye = (left + right) / 2, right - left
    eye_to_mouth = mouth - eye_avg
    x = eye_to_eye - np.flipud(eye_to_mouth) * [-1, 1]
    x /= np.hypot(*x)
    x *= max(np.hypot(*eye_to_eye) * 2.0, np.hypot(*eye_to_mouth) * 1.8)
    y = np.flipud(x) * [-1, 1]
    c = eye_avg + eye_to_mouth * 0.1
    return np.stack([c - x - y, c - x + y, c + x + y, c + x - y])


@pytest.mark.parametrize("names", [NAMES, OTHER], ids=["main", "older"])
@pytest.mark.parametrize("turn", [0, 4, -17, 45, 80, 100, 179, -90])
def test_the_quad_of_ffhq_to_a_pixel(turn, names):
    found, (points,) = label_map(((250, 260), 90, turn), names=names)
    (face,) = find_faces(found)
    assert face.is_plausible
    frame = align(face, (SIDE, SIDE), FFHQ)
    # The lips' centroid is a little off the point between them: the formula gets what was measured.
    assert math.dist(face.mouth, points[2]) < 2
    for seen, meant in zip(face.eyes, points[:2], strict=True):
        assert math.dist(seen, meant) < 1
    assert np.abs(np.array(frame.quad) - ffhq_quad(*face.eyes, face.mouth)).max() < 1e-9
    exact = ffhq_quad(points[0], points[1], face.mouth)
    assert np.abs(np.array(frame.quad) - exact).max() < 1
    assert (frame.turn - turn + 180) % 360 - 180 == pytest.approx(0, abs=0.7)


def test_two_faces_from_left_to_right_and_which():
    found, points = label_map(((370, 200), 60, -8), ((120, 300), 85, 12))
    faces = find_faces(found)
    assert [round(face.center[0]) for face in faces] == pytest.approx([120, 370], abs=8)
    view = Frame.centered((SIDE, SIDE))
    seen = [Detection(face, view, square_of(face, (SIDE, SIDE), FFHQ)) for face in faces]
    assert choose(seen, "largest", (SIDE, SIDE)).face is faces[0]
    assert choose(seen, "left", (SIDE, SIDE)).face is choose(seen, "1", (SIDE, SIDE)).face is faces[0]
    assert choose(seen, "right", (SIDE, SIDE)).face is choose(seen, "2", (SIDE, SIDE)).face is faces[1]
    assert choose(seen, "left", (SIDE, SIDE)).frame.turn == pytest.approx(12, abs=0.7)
    assert choose(seen, "right", (SIDE, SIDE)).frame.turn == pytest.approx(-8, abs=0.7)
    with pytest.raises(InputError, match="are 2 faces in the image, not 3"):
        choose(seen, "3", (SIDE, SIDE))


def test_cheek_to_cheek_is_two_faces():
    found, points = label_map(((180, 260), 80, 6), ((330, 255), 80, -6))
    assert len(split_regions(found.labels > 0)) == 1
    faces = find_faces(found)
    assert len(faces) == 2
    for face, meant in zip(faces, points, strict=True):
        assert math.dist(face.eyes[0], meant[0]) < 1.5
        assert math.dist(face.mouth, meant[2]) < 2
    assert not (faces[0].head & faces[1].head).any()


def test_a_profile_is_cropped_around_the_head_and_not_turned():
    found, _ = label_map(((250, 260), 90, 10), eyes=1)
    (face,) = find_faces(found)
    assert len(face.eyes) == 1 and not face.is_plausible
    frame = square_of(face, (SIDE, SIDE), FFHQ)
    assert frame == surround(face, (SIDE, SIDE), FFHQ)
    assert frame.turn == 0
    left, top, right, bottom = face.box
    for x, y in ((left, top), (right, bottom)):
        assert all(0 < fraction < 1 for fraction in frame.from_photo((x, y)))


def test_no_face():
    for found, _ in (label_map(), label_map(((250, 260), 90, 0), back=True)):
        assert find_faces(found) == []
    found, _ = label_map(((250, 260), 3, 0), ((100, 100), 90, 0))
    assert len(find_faces(found)) == 1  # the other is noise


def test_eyes_behind_glasses_and_a_hidden_mouth():
    found, (points,) = label_map(((250, 260), 90, 20), glasses=True)
    (face,) = find_faces(found)
    for seen, meant in zip(face.eyes, points[:2], strict=True):
        assert math.dist(seen, meant) < 5
    found, (points,) = label_map(((250, 260), 90, 20), mouth=False)
    (face,) = find_faces(found)
    assert face.mouth is None
    assert align(face, (SIDE, SIDE), FFHQ).turn == pytest.approx(20, abs=0.7)


def test_well_aligned_photos_are_left_unchanged():
    size = (SIDE, SIDE)
    centred = Frame.centered(size)
    near = Frame.around(size, (258.0, 256.0), 505.0, 1.0)
    assert settle(near, FFHQ) == centred
    for other in (
        Frame.around(size, (258.0, 256.0), 505.0, 3.0),
        Frame.around(size, (300.0, 256.0), 505.0),
        Frame.around(size, (256.0, 256.0), 400.0),
        Frame.around(size, (256.0, 256.0), 700.0),
    ):
        assert settle(other, FFHQ) == other


def test_regions():
    mask = np.zeros((9, 12), bool)
    mask[1:4, 1:4] = True
    mask[4, 4] = True  # touches by its corner only
    mask[6:9, 6:12] = True
    mask[0:6, 8:10] = True  # joins the one below
    first, second = split_regions(mask)
    assert first.sum() == 18 + 12 and second.sum() == 10
    assert (first | second == mask).all()
    spiral = np.array([[1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 0, 1], [1, 0, 0, 0, 1],
                       [1, 1, 1, 1, 1]], bool)  # fmt: skip
    assert len(split_regions(spiral)) == 1
    assert split_regions(np.zeros((4, 4), bool)) == []
