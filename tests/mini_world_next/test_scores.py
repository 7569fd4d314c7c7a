"""Scores of one image, what drawings hide, intervals over identities, and the resolution of the identity score."""

import random
from dataclasses import replace

import numpy
import pytest

from mini_world.next.identities import ATTRIBUTES, DEGREES, draw_identity
from mini_world.next.intervals import bootstrap, paired, per_identity, resolution
from mini_world.next.scenes import FRAMINGS, MEDIA, ROLES
from mini_world.next.scores import (
    Reading,
    Wanted,
    agreement,
    asked_facts,
    backdrop_visible,
    colour_distance,
    garment_visible,
    independent_distance,
    replaced,
    score,
    visible,
)
from mini_world.next.world import Scene, draw

GREY = (128, 128, 128)


def identities(kind, count, seed=0):
    rng = random.Random(f"{kind} {seed}")
    return [draw_identity(kind, rng, held_out=True) for _ in range(count)]


def reading_of(who, scene, subject=None, garment=GREY, backdrop=GREY):
    """What a perfect judge reads in a drawing."""
    return Reading(subject or who.kind, scene, dict(who.values), dict(who.degrees), garment, backdrop)


def changed(who, name, rng):
    """Another value of the attribute, or a degree that is one away."""
    if name in who.degrees:
        degree = who.degrees[name]
        return replace(who, degrees={**who.degrees, name: degree - 1 if degree > 0 else degree + 1})
    return replaced(who, **{name: rng.choice([value for value in ATTRIBUTES[who.kind][name] if value != who[name]])})


def changed_pixels(who, other, scene):
    images = [numpy.asarray(draw(one, scene, random.Random(5)).image, dtype=int) for one in (who, other)]
    return int((abs(images[0] - images[1]).max(2) > 8).sum())


SCENES = [
    *(Scene(role=role, colour="red" if role in ("hat", "scarf") else "none") for role in ROLES[1:]),
    *(Scene(medium=medium) for medium in MEDIA[1:]),
    *(Scene(framing=framing) for framing in FRAMINGS[1:]),
]


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_what_is_visible_changes_the_drawing(kind):
    rng = random.Random(kind)
    scenes = [Scene(), Scene(framing="afar")] if kind == "art" else [Scene(), *SCENES]
    for who, scene in zip(identities(kind, 2 * len(scenes)), scenes * 2, strict=True):
        for name in [*ATTRIBUTES[kind], *DEGREES[kind]]:
            if visible(who, scene, name):
                assert changed_pixels(who, changed(who, name, rng), scene) >= 8, (name, scene, who)


def test_what_is_covered_does_not_change_the_drawing():
    rng = random.Random(1)
    who = identities("face", 1)[0]
    for glasses, name in (("none", "frame"), ("sunglasses", "frame"), ("sunglasses", "eyes")):
        worn = replaced(who, glasses=glasses)
        assert not visible(worn, Scene(), name)
        assert changed_pixels(worn, changed(worn, name, rng), Scene()) == 0
    scarf = Scene(role="scarf", colour="red")
    dog = replaced(identities("dog", 1)[0], collar="red")
    assert not visible(dog, scarf, "collar")
    assert changed_pixels(dog, replaced(dog, collar="green"), scarf) == 0
    assert visible(dog, Scene(), "collar") and visible(who, scarf, "eyes") == (who["glasses"] != "sunglasses")


def test_a_sketch_has_no_colours():
    for kind in ("face", "cat", "dog"):
        (who,) = identities(kind, 1)
        pixels = numpy.asarray(draw(who, Scene(medium="sketch"), random.Random(2)).image)
        assert (pixels == pixels[..., :1]).all()
        hidden = {name for name in ATTRIBUTES[kind] if not visible(who, Scene(medium="sketch"), name)}
        assert hidden & {"hair_colour", "fur"} and not hidden & {"hair_style", "pattern", "ears", "mouth"}


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_a_perfect_reading_scores_one(kind):
    for who, scene in zip(identities(kind, 8), [Scene(), *SCENES][:8], strict=False):
        found = score(Wanted(who, scene, kind), reading_of(who, scene))
        assert found["identity"] == 1.0 and found["subject"] == 1
        assert found["prompt"] in (None, 1.0) and (found["prompt"] is None) == (not asked_facts(scene))
        assert set(found["right"]) == {name for name in ATTRIBUTES[kind] if visible(who, scene, name)}


def test_identity_is_the_mean_over_attributes_and_degrees():
    (who,) = [one for one in identities("face", 40) if one["glasses"] == "round"][:1]
    wrong = changed(who, "hair_colour", random.Random(3))
    wrong = replace(wrong, degrees={**who.degrees, "width": who.degrees["width"] + 0.25})
    found = score(Wanted(who, Scene(), "face"), reading_of(wrong, Scene()))
    items = 9 + 3
    assert found["identity"] == pytest.approx((items - 1 - 0.5) / items, abs=1e-4)
    assert found["right"]["hair_colour"] == 0 and sum(found["right"].values()) == 8
    assert found["errors"] == {"width": pytest.approx(0.25), "eye_distance": 0, "tint": 0}
    only = score(Wanted(who, Scene(), "face", names=frozenset({"hair_colour", "skin"})), reading_of(wrong, Scene()))
    assert only["identity"] == 0.5 and not only["errors"]


def test_the_prompt_score_leaves_the_subject_out():
    (who,) = identities("cat", 1)
    shown = Scene(place="snow", role="hat", colour="blue", framing="close")
    read = reading_of(who, shown, subject="dog")

    def found(**scene):
        return score(Wanted(who, Scene(**scene), "cat"), read)

    assert found()["prompt"] is None and found()["subject"] == 0
    assert found(place="snow")["prompt"] == 1
    assert found(place="beach")["prompt"] == 0
    assert found(place="snow", role="scarf", colour="blue")["prompt"] == pytest.approx(2 / 3, abs=1e-4)
    assert found(place="snow", role="hat", colour="red")["prompt"] == pytest.approx(2 / 3, abs=1e-4)


def test_a_colour_is_bound_given_its_noun():
    (who,) = identities("face", 1)
    hat = Scene(role="hat", colour="red")
    for shown, bound in (
        (hat, 1),
        (Scene(role="hat", colour="blue"), 0),
        (Scene(role="scarf", colour="red"), None),
        (Scene(), None),
    ):
        assert score(Wanted(who, hat, "face"), reading_of(who, shown))["bound"] == bound
    assert score(Wanted(who, Scene(role="crown"), "face"), reading_of(who, Scene(role="crown")))["bound"] is None


def test_an_override_counts_apart_and_the_rest_is_kept():
    who = replaced(identities("face", 1)[0], glasses="none", hair_colour="black")
    wanted = Wanted(who, Scene(), "face", override=("hair_colour", "pink"))
    asked = score(wanted, reading_of(replaced(who, hair_colour="pink"), Scene()))
    kept = score(wanted, reading_of(who, Scene()))
    assert (asked["override"], asked["identity"]) == (1, 1.0)
    assert (kept["override"], kept["identity"]) == (0, 1.0)
    assert "hair_colour" not in asked["right"]
    # The frame of new glasses, and the eyes behind them, are not in the photo or not in the image.
    for glasses in ("round", "sunglasses"):
        worn = score(Wanted(who, Scene(), "face", override=("glasses", glasses)), reading_of(who, Scene()))
        assert "frame" not in worn["right"] and ("eyes" in worn["right"]) == (glasses == "round")
    with pytest.raises(ValueError, match="no beard"):
        replaced(who, beard="pink")


def test_copied_colours_are_distances_from_the_photo():
    (who,) = identities("face", 1)
    wanted = Wanted(who, Scene(), "face", garment=(10, 20, 30), backdrop=(100, 100, 100))
    found = score(wanted, reading_of(who, Scene(), garment=(13, 24, 30), backdrop=(100, 100, 100)))
    assert found["garment"] == pytest.approx((25 / 3) ** 0.5, abs=0.05) and found["backdrop"] == 0
    absent = score(Wanted(who, Scene(), "face"), reading_of(who, Scene()))
    assert absent["garment"] is None and absent["backdrop"] is None
    assert garment_visible("face", Scene(place="beach")) and not garment_visible("face", Scene(role="astronaut"))
    assert not garment_visible("cat", Scene()) and not garment_visible("face", Scene(medium="oil"))
    assert backdrop_visible("cat", Scene(role="hat", colour="red")) and not backdrop_visible(
        "cat", Scene(place="snow")
    )


def test_independent_colours_are_as_far_apart_as_said():
    rng = numpy.random.default_rng(0)
    a, b = rng.uniform(30, 220, (2, 20_000, 3))
    squares = numpy.square(a - b).mean()
    assert independent_distance(30, 220) == pytest.approx(squares**0.5, rel=0.02)
    assert colour_distance((0, 0, 0), (3, 0, 0)) == pytest.approx(3**0.5)


def test_agreement_of_degrees():
    assert [agreement(error) for error in (0, 0.25, -0.25, 0.5, 1.5)] == [1, 0.5, 0.5, 0, 0]


# ── intervals ──


def test_intervals_cover_the_mean_as_often_as_they_say():
    rng = numpy.random.default_rng(1)
    covered = 0
    for number in range(200):
        found = bootstrap(rng.normal(0.5, 0.1, 60), seed=number)
        covered += found.low <= 0.5 <= found.high
    assert 180 <= covered <= 199
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])


def test_a_paired_difference_is_sharper_than_two_intervals():
    rng = numpy.random.default_rng(2)
    first = dict(enumerate(rng.uniform(0.5, 1, 60)))
    second = {number: value - 0.01 + rng.normal(0, 0.005) for number, value in first.items()}
    found = paired(first, second)
    assert found.excludes_zero and found.mean == pytest.approx(0.01, abs=0.003)
    assert found.high - found.low < 0.2 * (bootstrap(list(first.values())).high - bootstrap(list(first.values())).low)
    assert paired({1: 1.0, 2: 0.5, 3: 9.0}, {2: 0.25, 1: 0.75}).mean == 0.25


def test_rows_are_averaged_over_the_images_of_an_identity():
    rows = [{"number": n, "identity": v} for n, v in ((0, 1.0), (0, 0.5), (1, None), (1, 0.25))]
    assert per_identity(rows, "identity") == {0: 0.75, 1: 0.25}


def test_methods_that_differ_by_one_attribute_in_twenty_are_told_apart():
    assert resolution(simulations=100) >= 0.9
    assert resolution(simulations=100, base_error=0.02, attributes=8, identities=40) >= 0.9  # cats
    assert resolution(simulations=100, share=0.0) <= 0.1
    assert resolution(simulations=100, identities=6) < 0.7
