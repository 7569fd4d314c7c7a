"""Drawings in memory and on disk have the pixels of the scenes they were drawn from."""

import random

import numpy

from mini_world.data import load_drawings
from mini_world.world import sample

KEYS = ("images", "labels", "facts", "values")


def test_drawings_are_drawn_once_and_read_back(tmp_path):
    options = {"seed": 5, "held_out": True}
    drawn = load_drawings(tmp_path, "some", 24, **options)
    (stored,) = (tmp_path / "drawings").iterdir()
    before = stored.stat().st_mtime_ns
    again = load_drawings(tmp_path, "some", 24, **options)
    assert stored.stat().st_mtime_ns == before
    assert len(drawn) == len(again) == 24
    for key in KEYS:
        one, other = getattr(drawn, key), getattr(again, key)
        assert one.dtype == other.dtype
        assert numpy.array_equal(one, other)
    for row in range(24):
        picture = sample(row, **options)
        assert numpy.array_equal(drawn.images[row], numpy.asarray(picture.image))
        assert numpy.array_equal(drawn.labels[row], picture.labels)
        who = again.identity(row)
        assert (who and (who.kind, who.values)) == (picture.who and (picture.who.kind, picture.who.values))
        # Captions need nothing but what is stored.
        assert again.caption(row, random.Random(row)) == picture.caption(random.Random(row))


def test_another_number_of_drawings_is_another_file(tmp_path):
    load_drawings(tmp_path, "some", 2)
    more = load_drawings(tmp_path, "some", 4, kind="thing")
    assert len(more) == 4
    assert {path.name for path in (tmp_path / "drawings").iterdir()} == {
        "some-2.npz",
        "some-4.npz",
    }
    assert more.identity(0) is None
    assert (more.values == -1).all()
