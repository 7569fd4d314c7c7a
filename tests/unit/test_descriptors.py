"""The descriptor of a new domain, derived from its name."""

import pytest

from e4t_cli.errors import UsageError
from e4t_cli.models.descriptors import _singulars, check_descriptor, choose_descriptor


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("dog", "dog"),
        ("my_dogs", "dog"),
        ("my-red-hats", "hat"),  # of "red" and "hats" the longer word is tried first
        ("astronauts_on_the_beach", "astronaut"),
        ("cats2026", "cat"),
        ("beaches", "beach"),
        ("photos_of_faces", "face"),
        ("the_zebra_dogs", "dog"),  # zebra is longer, but several tokens
    ],
)
def test_the_longest_word_that_is_one_token(model, name, word):
    assert choose_descriptor(name, model) == word


def test_the_plural_comes_first_where_the_base_knows_it(model, monkeypatch):
    from e4t_cli.models import descriptors

    monkeypatch.setattr(descriptors, "_token_count", lambda model, word: 1)
    assert choose_descriptor("my_dogs", model) == "dogs"


@pytest.mark.parametrize("name", ["zebra", "my_photos", "2026", "x"])
def test_a_name_without_such_a_word(model, name):
    with pytest.raises(UsageError, match=f"no word of '{name}' is one token to the base tiny") as e:
        choose_descriptor(name, model)
    assert e.value.hint.startswith("name them: --descriptor WORD, such as ")
    assert e.value.exit_code == 2


def test_candidates_are_near_and_usable(model):
    with pytest.raises(UsageError, match="'dogz' is 3 tokens to the base tiny") as caught:
        check_descriptor("dogz", model)
    candidates = caught.value.hint.partition("such as ")[2].split(", ")
    assert candidates[0] == "dog"
    assert all(check_descriptor(word, model) == word for word in candidates)
    with pytest.raises(UsageError, match="one") as caught:
        check_descriptor("astronauts", model)
    assert "such as astronaut" in caught.value.hint


@pytest.mark.parametrize(
    ("plural", "singular"),
    [
        ("ponies", "pony"), ("boxes", "box"), ("wolves", "wolf"), ("knives", "knife"),
        ("mice", "mouse"), ("horses", "horse"), ("children", "child"),
    ],
)  # fmt: skip
def test_singulars(plural, singular):
    assert singular in _singulars(plural)


def test_no_plural():
    assert _singulars("glass") == _singulars("dog") == []
