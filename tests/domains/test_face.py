"""Face detection and alignment in photos, with parsers made here and with the packaged one.

Row I11 of the reliability table: no face, and several.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from e4t_cli.errors import InputError, IntegrityError, WeightsUnavailable
from e4t_cli.images.loading import center_square, prepare_image
from e4t_cli.registry.discovery import find_domain
from e4t_cli.registry.domain import PreparationTarget
from e4t_domains import face as module
from e4t_domains import face_parsing, face_search

TARGET = PreparationTarget(size=64, base="mini")
NAMES = {0: "background", 1: "shirt", 2: "skin.png"}


def parser(folder, names=NAMES, chosen=None):
    """Save a random parser; `chosen` makes it answer that label everywhere."""
    torch.manual_seed(0)
    config = SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 8, 8],
        decoder_hidden_size=8,
        num_attention_heads=[1, 1, 1, 1],
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    model = SegformerForSemanticSegmentation(config)
    if chosen is not None:
        with torch.no_grad():
            model.decode_head.classifier.weight.zero_()
            model.decode_head.classifier.bias.copy_(20 * torch.eye(len(names))[chosen])
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def fresh():
    face_parsing.load_parser.cache_clear()


# ---- with a parser that returns one label everywhere ----------------------------------------------


@pytest.mark.parametrize(("label", "covered"), [(2, True), (1, False), (0, False)])
def test_I11_labels_are_read_by_name(tmp_path, monkeypatch, label, covered):
    monkeypatch.setitem(face_parsing.PACKAGED, "mini", parser(tmp_path, chosen=label))
    photo = Image.new("RGB", (90, 70), "tan")
    prepared = prepare_image(find_domain("face"), photo, TARGET)
    assert prepared.image.tobytes() == center_square(photo, 64).tobytes()
    if covered:
        assert prepared.mask.getextrema() == (255, 255)
        assert prepared.remarks == ("1 face, mask 100 %",)
        assert "not aligned" in prepared.notes[0]
    else:
        assert prepared.mask is None
        assert prepared.notes == ("no face was found: the whole image counts in tuning",)
        strict = PreparationTarget(size=64, base="mini", required=True)
        with pytest.raises(InputError, match="no face") as caught:
            prepare_image(find_domain("face"), photo, strict)
        assert caught.value.exit_code == 3


def test_the_public_parser_is_fetched_for_photographs(tmp_path):
    plan = {"size": {"height": 96, "width": 96}, "image_mean": [0.4] * 3, "image_std": [0.2] * 3}
    folder = parser(tmp_path, chosen=2)
    (folder / "preprocessor_config.json").write_text(json.dumps(plan))
    calls = []

    def fetch(repository):
        calls.append(repository)
        return folder

    target = PreparationTarget(size=64, base="sd14", fetch=fetch)
    prepared = module.prepare(Image.new("RGB", (90, 70)), target)
    assert (
        set(calls)
        == set(module.face.networks)
        == {
            "jonathandinu/face-parsing",
            "opencv/face_detection_yunet",
        }
    )
    assert prepared.mask.size == prepared.image.size == (64, 64)
    loaded = face_parsing.load_parser(folder)
    assert (loaded.side, loaded.names[2]) == (96, "skin")
    pixels = loaded._tensor(Image.new("RGB", (96, 96), (255, 0, 102)))
    assert pixels[:, 0, 0].tolist() == pytest.approx([3.0, -2.0, 0.0], abs=1e-5)


def unreachable(repository):
    raise WeightsUnavailable(f"{repository} is not on this machine")


def test_without_the_parser_a_prompt_makes_the_mask(monkeypatch):
    import e4t_cli

    calls = []

    def mask_by_words(image, words, target):
        calls.append((words, image.size))
        return Image.new("L", image.size, 255)

    monkeypatch.setattr(e4t_cli, "mask_by_words", mask_by_words, raising=False)
    target = PreparationTarget(size=64, base="sd14", fetch=unreachable)
    prepared = module.prepare(Image.new("RGB", (90, 70)), target)
    assert calls == [("a face", (64, 64))]
    assert prepared.mask.getextrema() == (255, 255)
    (note,) = prepared.notes
    assert "'a face'" in note and "not aligned" in note and "face-parsing" in note


def test_without_either_there_is_one_error(tmp_path):
    for fetch in (None, unreachable):
        target = PreparationTarget(size=64, base="sd14", fetch=fetch)
        prepared = module.prepare(Image.new("RGB", (90, 70)), target)
        assert prepared.mask is None
        (note,) = prepared.notes
        assert "whole image" in note and "not aligned" in note
        required = PreparationTarget(size=64, base="sd14", fetch=fetch, required=True)
        with pytest.raises(WeightsUnavailable):  # whether there is a face is unknown
            module.prepare(Image.new("RGB", (90, 70)), required)
    bare = PreparationTarget(size=64, base="sd14", mask=None, align=False)
    assert module.prepare(Image.new("RGB", (90, 70)), bare).notes == ()


def test_a_parser_that_does_not_fit_is_refused(tmp_path):
    other = parser(tmp_path / "other", names={0: "sky", 1: "sea"})
    with pytest.raises(IntegrityError, match="no label for a part of a head"):
        face_parsing.load_parser(other)
    lame = parser(tmp_path / "lame")
    from safetensors.torch import load_file, save_file

    tensors = load_file(lame / "model.safetensors")
    tensors.popitem()
    save_file(tensors, lame / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="does not fit"):
        face_parsing.load_parser(lame)
    (lame / "model.safetensors").unlink()
    with pytest.raises(IntegrityError, match="cannot be used"):
        face_parsing.load_parser(lame)


# ---- with a parser that reads colours ----------------------------------------------------------

COLOURS = {
    "skin": (250, 200, 160),
    "hair": (90, 50, 20),
    "l_eye": (0, 0, 250),
    "mouth": (250, 0, 0),
}
LABELS = dict(enumerate(["background", *COLOURS]))


class Painted:
    """A parser that maps colours to labels, so that photos can be drawn."""

    side = 256

    def parse(self, images):
        return [self._one(image) for image in images]

    def _one(self, image):
        pixels = np.asarray(image.resize((256, 256), Image.Resampling.BILINEAR), dtype=int)
        labels = np.zeros((256, 256), int)
        for number, colour in enumerate(COLOURS.values(), start=1):
            labels[np.abs(pixels - colour).sum(-1) < 90] = number
        return face_parsing.LabelMap(labels, LABELS, np.ones((256, 256), np.float32))


def paint(photo, center, unit, turn, *, eyes=(-0.4, 0.4)):
    """Draw a head on a photo, in colours."""
    side = int(unit * 4)
    sheet = Image.new("RGBA", (side, side))
    pen = ImageDraw.Draw(sheet)

    def blob(x, y, rx, ry, name):
        box = [side / 2 + unit * v for v in (x - rx, y - ry, x + rx, y + ry)]
        pen.ellipse(box, fill=COLOURS[name])

    blob(0, -0.1, 1.1, 1.35, "hair")
    blob(0, 0.1, 0.9, 1.1, "skin")
    for x in eyes:
        blob(x, -0.1, 0.17, 0.1, "l_eye")
    blob(0, 0.63, 0.3, 0.13, "mouth")
    sheet = sheet.rotate(-turn, Image.Resampling.NEAREST)
    photo.paste(sheet, (round(center[0] - side / 2), round(center[1] - side / 2)), sheet)


@pytest.fixture
def painted(monkeypatch):
    monkeypatch.setattr(module, "find_parser", lambda target: Painted())
    monkeypatch.setattr(module, "find_detector", lambda target: None)
    return Image.new("RGB", (800, 600), (40, 120, 60))


@pytest.mark.parametrize("turn", [0, 12, -35, 90, 180])
def test_a_photograph_is_turned_and_cropped(painted, turn):
    paint(painted, (520, 240), 70, turn)
    prepared = module.prepare(painted, PreparationTarget(size=256, base="sd14"))
    assert (prepared.frame.turn - turn + 180) % 360 - 180 == pytest.approx(0, abs=1)
    assert prepared.notes == ()
    words = prepared.remarks[0].split(", ")
    assert words[0] == "1 face"
    assert int(words[1].removeprefix("turned ").removesuffix("°")) == pytest.approx(abs(turn), abs=1)
    covered = np.asarray(prepared.mask).mean() / 255
    assert words[2] == f"mask {round(100 * covered)} %" and 0.2 < covered < 0.6
    # Upright now, with the eyes at one height and the mouth below them.
    seen = Painted()._one(prepared.image)
    (face,) = face_search.find_faces(seen)
    (ax, ay), (bx, by) = face.eyes
    assert abs(ay - by) < 2.5 and ax < 128 < bx and face.mouth[1] > ay + 20


def test_I11_several_faces(painted):
    paint(painted, (200, 300), 60, 10)
    paint(painted, (560, 280), 80, -20)
    for which, turn, where in (
        ("largest", -20, 560), ("left", 10, 200), ("right", -20, 560), ("1", 10, 200)
    ):  # fmt: skip
        target = PreparationTarget(size=128, base="sd14", which=which)
        prepared = module.prepare(painted, target)
        assert prepared.frame.turn == pytest.approx(turn, abs=1)
        assert prepared.frame.center[0] == pytest.approx(where, abs=20)
        assert prepared.remarks[0].startswith("2 faces, ") and "1 to 2" in prepared.remarks[0]
        # The other head is not in the mask, even where it is in the image.
        back = [prepared.frame.from_photo((x, 300)) for x in (200, 560)]
        other = back[0] if where == 560 else back[1]
        if all(0.02 < place < 0.98 for place in other):
            assert prepared.mask.getpixel(tuple(int(128 * place) for place in other)) == 0
    with pytest.raises(InputError, match="2 faces in the image, not 3"):
        module.prepare(painted, PreparationTarget(size=128, base="sd14", which="3"))


def test_unaligned_only_the_chosen_head_is_masked(painted):
    paint(painted, (260, 300), 60, 10)
    paint(painted, (540, 300), 80, -20)
    target = PreparationTarget(size=128, base="sd14", which="left", align=False)
    prepared = module.prepare(painted, target)
    assert prepared.image.tobytes() == center_square(painted, 128).tobytes()
    assert "turned" not in prepared.remarks[0]
    left, right = ((x - 100) * 128 / 600 for x in (260, 540))
    assert prepared.mask.getpixel((int(left), 64)) == 255
    assert prepared.mask.getpixel((int(right), 64)) == 0


@pytest.fixture
def not_rotated(monkeypatch):
    """Without the search in rotated views, which finds nothing here and takes seconds."""
    monkeypatch.setattr(face_search.FaceDetector, "_detect_rotated", lambda self: [])


@pytest.mark.parametrize("base", ["sd14", "mini"])
@pytest.mark.parametrize(("which", "where"), [("left", 160), ("right", 640), ("1", 160), ("largest", 640)])
def test_heads_that_cannot_be_aligned_are_cropped_around(painted, not_rotated, base, which, where):
    paint(painted, (160, 300), 60, 0, eyes=())
    paint(painted, (640, 280), 70, 0, eyes=())
    prepared = module.prepare(painted, PreparationTarget(size=128, base=base, which=which))
    assert "cropped around the head" in prepared.notes[0]
    assert prepared.frame.turn == 0
    assert prepared.frame.center[0] == pytest.approx(where, abs=15)
    assert prepared.frame.side < 400  # the other head is 480 pixels away
    assert np.asarray(prepared.mask).mean() / 255 > 0.15


def test_one_head_beside_the_centred_square_that_cannot_be_aligned(painted, not_rotated):
    paint(painted, (60, 240), 60, 0, eyes=())
    prepared = module.prepare(painted, PreparationTarget(size=128, base="sd14"))
    assert prepared.frame.center[0] == pytest.approx(60, abs=15)
    for align in (True, False):  # the head in the middle stays where it is
        middle = Image.new("RGB", (800, 600), (40, 120, 60))
        paint(middle, (430, 300), 60, 0, eyes=())
        prepared = module.prepare(middle, PreparationTarget(size=128, base="sd14", align=align))
        assert prepared.image.tobytes() == center_square(middle, 128).tobytes()


def test_unaligned_a_face_outside_the_square_does_not_get_the_mask_of_another(painted):
    paint(painted, (400, 300), 60, 0)
    paint(painted, (750, 300), 60, 0)
    target = PreparationTarget(size=128, base="sd14", which="right", align=False)
    prepared = module.prepare(painted, target)
    assert prepared.image.tobytes() == center_square(painted, 128).tobytes()
    assert prepared.mask is None
    assert "outside the centred square" in prepared.notes[0]


def test_a_profile(painted):
    paint(painted, (520, 240), 70, 10, eyes=(-0.4,))
    prepared = module.prepare(painted, PreparationTarget(size=128, base="sd14"))
    assert "profile" in prepared.notes[0]
    assert prepared.frame.turn == 0
    assert prepared.frame.center[0] == pytest.approx(520, abs=30)
    assert np.asarray(prepared.mask).mean() / 255 > 0.15


def test_the_mask_ends_where_the_photo_ends(painted):
    paint(painted, (60, 240), 90, 15)
    prepared = module.prepare(painted, PreparationTarget(size=128, base="sd14"))
    inside = prepared.frame.apply_to_mask(Image.new("L", painted.size, 255), 128)
    assert inside.getextrema() == (0, 255)
    outside = np.asarray(inside) == 0
    assert np.asarray(prepared.mask)[outside].max() == 0
