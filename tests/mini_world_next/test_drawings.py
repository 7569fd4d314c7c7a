"""The drawings of 128 pixels: the same by number, every word visible, sets resumed and mapped."""

import hashlib
import os
import random
import subprocess
import sys

import numpy
import pytest

from mini_world.next import data, world
from mini_world.next.canvas import LABELS, SIZE
from mini_world.next.identities import ATTRIBUTES, DEGREES, Identity, draw_identity, is_held_out
from mini_world.next.scenes import COLOURED_ROLES, COLOURS, FRAMINGS, MEDIA, PLACES, ROLES
from mini_world.next.world import KINDS, SUBJECT_LABELS, THINGS, Scene, draw, sample

SOME = [(0, {}), (7, {"kind": "cat"}), (12, {"kind": "art", "portrait": True, "seed": 3}), (1, {"held_out": True})]


def digest(drawing):
    data = drawing.image.tobytes() + drawing.labels.tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def difference(one, other, more_than=24):
    """In how many pixels two drawings differ by more than `more_than` of 255 in some channel."""
    pixels = [numpy.asarray(drawing.image).astype(numpy.int16) for drawing in (one, other)]
    return int((numpy.abs(pixels[0] - pixels[1]).max(axis=2) > more_than).sum())


def drawn_with(who, scene=None, seed=0, **values):
    """The drawing of an identity with other values or degrees."""
    degrees = {name: values.pop(name) for name in [*values] if name in who.degrees}
    who = Identity(who.kind, {**who.values, **values}, {**who.degrees, **degrees})
    return draw(who, scene or Scene(), random.Random(seed), thing="house")


def some_identities(kind, count, **values):
    rng = random.Random(f"{kind} {values}")
    for _ in range(count):
        who = draw_identity(kind, rng, held_out=False)
        yield Identity(kind, {**who.values, **values}, who.degrees)


@pytest.fixture(scope="module")
def drawings():
    return [sample(index, seed=41) for index in range(100)]


# ── the same drawing ──


def test_a_number_determines_a_drawing_in_every_process():
    code = (
        "import hashlib\nfrom mini_world.next.world import sample\n"
        f"for index, options in {SOME!r}:\n"
        "    one = sample(index, **options)\n"
        "    data = one.image.tobytes() + one.labels.tobytes()\n"
        "    print(hashlib.sha256(data).hexdigest()[:16])\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [digest(sample(index, **options)) for index, options in SOME]
    assert len({digest(sample(index)) for index in range(30)}) == 30
    assert digest(sample(3, seed=1)) != digest(sample(3, seed=2))


def test_pairs_show_one_identity_of_their_side():
    for held_out in (False, True):
        for options in ({}, {"kind": "face", "portrait": True}, {"kind": "art"}):
            drawn = [sample(index, 8, held_out=held_out, **options) for index in range(12)]
            for one, other in zip(drawn[0::2], drawn[1::2], strict=True):
                assert one.who == other.who
                assert digest(one) != digest(other)
                assert one.who is None or is_held_out(one.who.kind, one.who.values) == held_out


def test_portraits_are_plain_photos():
    for kind in ("face", "cat", "dog", "art"):
        drawn = [sample(index, kind=kind, portrait=True) for index in range(20)]
        for drawing in drawn:
            scene = drawing.scene
            assert (scene.role, scene.colour, scene.medium) == ("none", "none", "photo")
            assert scene.framing in ("normal", "close")
            assert kind == "art" or scene.place == "plain"
        assert sum(drawing.scene.framing == "normal" for drawing in drawn) > 10


# ── what is drawn ──


def test_drawings_have_their_shape_and_facts(drawings):
    for drawing in drawings:
        scene = drawing.scene
        assert (drawing.image.size, drawing.image.mode) == ((SIZE, SIZE), "RGB")
        assert (drawing.labels.shape, drawing.labels.dtype) == ((SIZE, SIZE), numpy.uint8)
        assert (scene.role in COLOURED_ROLES) == (scene.colour != "none")
        assert (drawing.garment is not None) == (drawing.subject == "face")
        assert (drawing.backdrop is not None) == (scene.place == "plain")
    assert {drawing.who.kind if drawing.who else "thing" for drawing in drawings} == set(KINDS)


def test_masks_are_the_subject(drawings):
    for drawing in drawings:
        mask, covered = drawing.mask(), drawing.mask().mean()
        assert (mask == numpy.isin(drawing.labels, SUBJECT_LABELS)).all()
        shown = {LABELS[label] for label in numpy.unique(drawing.labels)}
        if drawing.subject in THINGS:
            assert shown == {"background"}
            continue
        assert 0.05 < covered < 0.75
        assert shown >= {"skin", "mouth", "hair"} if drawing.subject == "face" else shown >= {"animal"}
        assert ("animal" in shown) == (drawing.subject != "face")
        assert ("accessory" in shown) == (drawing.scene.role != "none")


def test_labels_lie_where_the_drawing_is():
    """Only the pixels of the garment change with its colour, and only those of the background with the backdrop's."""
    who = draw_identity("face", random.Random(1), held_out=False)
    fixed = {"garment": (200, 40, 40), "backdrop": (120, 160, 200)}
    one = draw(who, Scene(), random.Random(2), **fixed)
    assert (one.garment, one.backdrop) == (fixed["garment"], fixed["backdrop"])
    for name, label in (("garment", "cloth"), ("backdrop", "background")):
        other = draw(who, Scene(), random.Random(2), **{**fixed, name: (20, 240, 90)})
        changed = (numpy.asarray(one.image) != numpy.asarray(other.image)).any(axis=2)
        there = one.labels == LABELS.index(label)
        assert (one.labels == other.labels).all()
        assert changed[there].mean() > 0.98
        # Anti-aliased edges belong to both.
        assert changed[~there].mean() < 0.06


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_every_attribute_is_visible_in_a_plain_photo(kind):
    """Otherwise no encoder could separate two identities that differ in one value."""
    for number, who in enumerate(some_identities(kind, 2)):
        for name, choices in ATTRIBUTES[kind].items():
            seen_with = {}
            if kind == "face" and name in ("frame", "eyes") and not who.visible("frame"):
                seen_with = {"glasses": "round"}
            drawn = [drawn_with(who, seed=number, **(seen_with | {name: value})) for value in choices]
            for k, one in enumerate(drawn):
                for other in drawn[:k]:
                    seen = difference(one, other, 12 if name == "surface" else 24)
                    assert seen >= 60, (name, one.who, other.who, seen)


@pytest.mark.parametrize("kind", DEGREES)
def test_every_degree_is_visible_in_a_plain_photo(kind):
    for number, who in enumerate(some_identities(kind, 3)):
        for name in DEGREES[kind]:
            drawn = [drawn_with(who, seed=number, **{name: degree}) for degree in (-1.0, 0.0, 1.0)]
            for one, other in ((0, 1), (1, 2)):
                # A tint is a small step of a large area.
                seen = difference(drawn[one], drawn[other], 5)
                assert seen >= 60, (name, who, seen)


@pytest.mark.parametrize("kind", ["face", "cat", "dog"])
def test_every_context_word_is_visible(kind):
    usual = Scene()
    scenes = [usual]
    scenes += [Scene(place=place) for place in PLACES[1:]]
    scenes += [Scene(role=role) for role in ROLES[1:] if role not in COLOURED_ROLES]
    scenes += [Scene(role=role, colour=colour) for role in COLOURED_ROLES for colour in COLOURS[1:]]
    scenes += [Scene(medium=medium) for medium in MEDIA[1:]]
    scenes += [Scene(framing=framing) for framing in FRAMINGS[1:]]
    for number, who in enumerate(some_identities(kind, 1)):
        drawn = [draw(who, scene, random.Random(number), backdrop=(150, 170, 160)) for scene in scenes]
        for k, one in enumerate(drawn):
            for other in drawn[:k]:
                assert difference(one, other) >= 60, (one.scene, other.scene)


@pytest.mark.parametrize("skin", ATTRIBUTES["face"]["skin"])
def test_beards_stand_out_from_every_skin(skin):
    who = next(some_identities("face", 1, skin=skin, glasses="none", marks="none"))
    for number, hair in enumerate(ATTRIBUTES["face"]["hair_colour"]):
        for beard in ("moustache", "beard"):
            tint = (-1.0, 1.0)[number % 2]
            shaven, bearded = (drawn_with(who, hair_colour=hair, tint=tint, beard=b) for b in ("none", beard))
            assert difference(shaven, bearded) >= 150, (hair, tint)


def test_framings_have_their_sizes():
    sizes = {}
    for framing in FRAMINGS:
        for number, who in enumerate(some_identities("face", 8, hair_style="short")):
            labels = draw(who, Scene(framing=framing), random.Random(number)).labels
            head = numpy.isin(
                labels, [LABELS.index(name) for name in ("skin", "hair", "eyes", "mouth", "beard", "glasses")]
            )
            rows = numpy.flatnonzero(head.any(axis=1))
            sizes.setdefault(framing, []).append(int(rows[-1] - rows[0]))
    assert max(sizes["afar"]) * 1.15 < min(sizes["normal"])
    assert max(sizes["normal"]) * 1.05 < min(sizes["close"])
    assert min(sizes["afar"]) >= 2 * 18


# ── sets of drawings ──


def test_a_set_is_drawn_once_and_has_the_facts(tmp_path):
    options = {"seed": 5, "held_out": True}
    drawn = data.load_drawings(tmp_path, "some", 12, processes=1, **options)
    (stored,) = (tmp_path / "drawings").iterdir()
    before = (stored / "images.npy").stat().st_mtime_ns
    again = data.load_drawings(tmp_path, "some", 12, processes=1, **options)
    assert (stored / "images.npy").stat().st_mtime_ns == before
    assert isinstance(again.images, numpy.memmap)
    assert len(drawn) == len(again) == 12
    assert tuple(again.facts.shape) == (12, len(data.FACTS))
    for row in range(12):
        picture = sample(row, **options)
        assert (again.images[row] == numpy.asarray(picture.image)).all()
        assert (again.labels[row] == picture.labels).all()
        assert again.scene(row) == picture.scene
        assert again.subject(row) == picture.subject
        assert tuple(again.garment[row]) == (picture.garment or (-1, -1, -1))
        assert tuple(again.backdrop[row]) == (picture.backdrop or (-1, -1, -1))
        who = again.identity(row)
        assert (who and (who.kind, who.values)) == (picture.who and (picture.who.kind, picture.who.values))
        if who is not None:
            assert who.degrees == pytest.approx(picture.who.degrees, abs=1e-3)
    rows = again.select(numpy.array([3, 1]))
    assert (rows.images[1] == drawn.images[1]).all()


def test_an_interrupted_set_is_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_CHUNK", 2)
    calls = []

    def stopping(index, **options):
        calls.append(index)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return sample(index, **options)

    monkeypatch.setattr(data, "sample", stopping)
    with pytest.raises(KeyboardInterrupt):
        data.load_drawings(tmp_path, "some", 6, processes=1)
    whole = data.load_drawings(tmp_path, "some", 6, processes=1)
    assert calls == [0, 1, 2, 3, 2, 3, 4, 5]
    for row in range(6):
        assert (whole.images[row] == numpy.asarray(sample(row).image)).all()


def test_other_drawings_are_other_folders(tmp_path, monkeypatch):
    data.load_drawings(tmp_path, "some", 2, processes=1)
    things = data.load_drawings(tmp_path, "some", 2, processes=1, kind="thing")
    assert things.identity(0) is None
    assert (things.values == -1).all()
    monkeypatch.setattr(data, "VERSION", world.VERSION + 1)
    data.load_drawings(tmp_path, "some", 2, processes=1)
    assert len(list((tmp_path / "drawings").iterdir())) == 3


def test_processes_draw_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_CHUNK", 2)
    pooled = data.load_drawings(tmp_path / "pooled", "some", 4, processes=2)
    alone = data.load_drawings(tmp_path / "alone", "some", 4, processes=1)
    assert (pooled.images == alone.images).all()
