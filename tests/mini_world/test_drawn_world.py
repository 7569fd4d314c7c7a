"""The drawn world: deterministic, with a fixed split, and consistent with its label maps."""

import hashlib
import os
import random
import subprocess
import sys

import numpy
import pytest

from mini_world.canvas import LABELS
from mini_world.identities import ATTRIBUTES, draw_identity, is_held_out
from mini_world.scenes import FRAMINGS, MEDIA, PLACES, ROLES
from mini_world.world import KINDS, SUBJECT_LABELS, THINGS, Scene, draw, sample

SOME = [(0, {}), (7, {"kind": "cat"}), (12, {"kind": "art", "portrait": True, "seed": 3})]
SOME += [(index, {"held_out": True, "seed": 9}) for index in range(3)]


def digest(drawing):
    data = drawing.image.tobytes() + drawing.labels.tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def words(drawing):
    return None if drawing.who is None else tuple(drawing.who.values.items())


# ── the same drawing ──


def test_a_number_determines_a_drawing():
    for index, options in SOME:
        one, other = sample(index, **options), sample(index, **options)
        assert digest(one) == digest(other)
        assert (one.who, one.scene, one.subject) == (other.who, other.scene, other.subject)
    assert len({digest(sample(index)) for index in range(40)}) == 40
    assert digest(sample(3, seed=1)) != digest(sample(3, seed=2))


def test_it_is_the_same_in_another_process():
    code = (
        "import hashlib\nfrom mini_world.world import sample\n"
        f"for index, options in {SOME!r}:\n"
        "    one = sample(index, **options)\n"
        "    data = one.image.tobytes() + one.labels.tobytes()\n"
        "    print(hashlib.sha256(data).hexdigest()[:16])\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [digest(sample(index, **options)) for index, options in SOME]


# ── who is held out ──


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_no_identity_is_on_both_sides(kind):
    rng = random.Random(5)
    sides = {
        held_out: {tuple(draw_identity(kind, rng, held_out=held_out).values.items()) for _ in range(1500)}
        for held_out in (False, True)
    }
    assert not sides[False] & sides[True]
    for held_out, drawn in sides.items():
        assert all(is_held_out(kind, dict(values)) == held_out for values in drawn)
        # Every value of every attribute is seen on both sides: held out is the combination.
        for name, choices in ATTRIBUTES[kind].items():
            assert {dict(values)[name] for values in drawn} == set(choices)


def test_about_one_combination_in_eight_is_held_out():
    rng = random.Random(6)
    found = []
    for _ in range(3000):
        values = {name: rng.choice(choices) for name, choices in ATTRIBUTES["face"].items()}
        found.append(is_held_out("face", values))
    assert 0.1 < sum(found) / len(found) < 0.15


def test_samples_stay_on_their_side_and_pairs_show_one_identity():
    for held_out in (False, True):
        for options in ({}, {"kind": "face", "portrait": True}, {"kind": "art"}):
            drawn = [sample(index, 8, held_out=held_out, **options) for index in range(24)]
            for one, other in zip(drawn[0::2], drawn[1::2], strict=True):
                assert one.who == other.who
                assert digest(one) != digest(other)
            for drawing in drawn:
                if drawing.who is not None:
                    assert is_held_out(drawing.who.kind, drawing.who.values) == held_out
            assert len({words(drawing) for drawing in drawn[0::2]}) > 3


# ── what is drawn ──


def test_drawings_and_label_maps_have_their_shape(drawings):
    for drawing in drawings:
        assert drawing.image.size == (64, 64)
        assert drawing.image.mode == "RGB"
        assert drawing.labels.shape == (64, 64)
        assert drawing.labels.dtype == numpy.uint8
        assert drawing.labels.max() < len(LABELS)
        assert numpy.asarray(drawing.image).std() > 4
    assert {drawing.who.kind if drawing.who else "thing" for drawing in drawings} == set(KINDS)


def test_masks_are_the_subject(drawings):
    for drawing in drawings:
        mask, covered = drawing.mask(), drawing.mask().mean()
        assert (mask == numpy.isin(drawing.labels, SUBJECT_LABELS)).all()
        shown = {LABELS[label] for label in numpy.unique(drawing.labels)}
        if drawing.subject in THINGS:
            assert covered == 0
            assert shown == {"background"}
        elif drawing.subject == "face":
            # Long hair in a close-up is the most there can be.
            assert 0.05 < covered < (0.75 if drawing.scene.framing == "close" else 0.5)
            assert {"skin", "mouth"} <= shown
            assert "animal" not in shown
        else:
            assert 0.05 < covered < 0.5
            assert shown <= {"background", "animal", "accessory"}
        assert ("accessory" in shown) == (drawing.scene.role != "none")


def test_labels_lie_where_the_drawing_is():
    """A face with its head removed: the pixels labelled background have not changed, the head has."""
    who = draw_identity("face", random.Random(1), held_out=False)
    drawing = draw(who, Scene(), random.Random(2))
    other = draw(draw_identity("face", random.Random(4), held_out=False), Scene(), random.Random(2))
    same = (numpy.asarray(drawing.image) == numpy.asarray(other.image)).all(2)
    background = (drawing.labels == 0) & (other.labels == 0)
    # Anti-aliased edges belong to both.
    assert same[background].mean() > 0.9
    assert same[drawing.mask() & other.mask()].mean() < 0.3


@pytest.mark.parametrize(
    ("field", "values"),
    [("place", PLACES), ("role", ROLES), ("medium", MEDIA), ("framing", FRAMINGS)],
)
def test_every_part_of_a_scene_is_visible(field, values):
    who = draw_identity("face", random.Random(1), held_out=False)
    drawn = [digest(draw(who, Scene(**{field: value}), random.Random(2))) for value in values]
    assert len(set(drawn)) == len(values)
    assert getattr(Scene(), field) == values[0]


def test_every_attribute_is_visible():
    """Two identities that differ in one value differ in the drawing: otherwise no encoder could separate them."""
    from mini_world.identities import Identity

    for kind, attributes in ATTRIBUTES.items():
        plain = {name: choices[0] for name, choices in attributes.items()}
        for name, choices in attributes.items():
            drawn = set()
            for value in choices:
                who = Identity(kind, plain | {name: value}, shift=1)
                drawing = draw(who, Scene(), random.Random(2), thing="tree")
                drawn.add(drawing.image.tobytes())
            assert len(drawn) == len(choices), (kind, name)
