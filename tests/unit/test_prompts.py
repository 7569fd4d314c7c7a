"""Where the placeholder is (rows P1, P2, P4, P5, P8 of the reliability table) and file names."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e4t_cli.errors import UsageError
from e4t_cli.prompts import SUBJECT_TEMPLATES, parse_prompt, slug, training_prompts

HERE = None  # how a placeholder looks among segments

RULE = [
    ("S* on the beach", (HERE, " on the beach")),
    ("s* on the beach", (HERE, " on the beach")),
    ("a photo of S*", ("a photo of ", HERE)),
    ("S*", (HERE,)),
    ("S* and S*, friends", (HERE, " and ", HERE, ", friends")),
    ("S*'s hat", (HERE, "'s hat")),
    ('"S*," he said', ('"', HERE, '," he said')),
    ("an S*-style house", ("an ", HERE, "-style house")),
    ("(S*)", ("(", HERE, ")")),
    ("<S*> smiling", (HERE, " smiling")),
    ("Ｓ＊ full-width", (HERE, " full-width")),
    ("a face like S*", ("a face like ", HERE)),  # the descriptor may be there too
    ("S*\non two\tlines", (HERE, " on two lines")),
    ("猫と S* 🎨", ("猫と ", HERE, " 🎨")),
]
NOT_THERE = ["a photo of a face", "S * apart", "S**", "**S*", "aS*", "S*x", "_S*", "S", "*", "éS*"]


@pytest.mark.parametrize(("text", "segments"), RULE)
def test_the_rule_finds(text, segments):
    prompt = parse_prompt(text)
    assert prompt.segments == segments
    assert prompt.placeholders == segments.count(HERE)


@pytest.mark.parametrize("text", NOT_THERE)
def test_the_rule_does_not_find(text):
    with pytest.raises(UsageError, match="does not name the concept") as caught:
        parse_prompt(text)
    assert '"S* as an astronaut"' in caught.value.hint
    assert HERE not in parse_prompt(text, require_placeholder=False).segments


@pytest.mark.parametrize(
    ("placeholder", "text", "count"),
    [
        ("<me>", "<me> and <ME>", 2),
        ("sks", "a sks dog, sksy", 1),
        ("@", "hi @there", 1),
        ("V*", "S* is not V*", 1),
    ],
)
def test_any_word_can_be_the_placeholder(placeholder, text, count):
    assert parse_prompt(text, placeholder).placeholders == count


@pytest.mark.parametrize("placeholder", ["", "two words", "x" * 33, "a\0b", "\u202e"])
def test_nonsense_placeholders(placeholder):
    with pytest.raises(UsageError, match="placeholder"):
        parse_prompt("S* here", placeholder)


@pytest.mark.parametrize("text", ["", " \n ", "S* \0", "S* \x1b[31m", "S* \udcff", "S* " * 400_000])
def test_prompts_that_are_refused(text):
    with pytest.raises(UsageError):
        parse_prompt(text)


def test_the_plain_word_in_its_place():
    assert parse_prompt("S* on S*'s bed").without_placeholder("cat") == "cat on cat's bed"


@settings(deadline=None)  # a busy machine is no fault
@given(st.text(max_size=80))
def test_segments_are_the_prompt(text):
    try:
        prompt = parse_prompt(text, require_placeholder=False)
    except UsageError:
        return
    assert "" not in prompt.segments
    if HERE not in prompt.segments:
        assert prompt.segments == (prompt.text,)
    again = parse_prompt(prompt.text, require_placeholder=False)
    assert again == prompt


def test_training_sentences():
    assert len(set(SUBJECT_TEMPLATES)) == len(SUBJECT_TEMPLATES) >= 20
    assert all(prompt.placeholders == 1 for prompt in training_prompts(SUBJECT_TEMPLATES))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("S* as an astronaut", "s-as-an-astronaut"),
        ("../../etc/passwd", "etc-passwd"),
        ("Café — naïve", "cafe-naive"),
        ("猫 🎨", "picture"),
        ("", "picture"),
        ("x" * 99, "x" * 60),
        ("word " * 20, "-".join(["word"] * 12)),
    ],
)
def test_slugs(text, name):
    assert slug(text) == name


@settings(deadline=None)
@given(st.text())
def test_slugs_are_safe(text):
    name = slug(text)
    assert 0 < len(name) <= 60
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert name.strip("-") == name
