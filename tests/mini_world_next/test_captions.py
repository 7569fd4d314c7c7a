"""Captions of the next embedded base: what is drawn, all of the context, folded words with weights, and overrides."""

import random
import re
from dataclasses import dataclass

import pytest

from e4t_cli.prompts import training_templates
from e4t_cli.registry.discovery import find_domain
from mini_world.next.captions import CLEAR_DEGREE, MAXIMUM_TOKENS, Caption, count_tokens, vocabulary, write_caption
from mini_world.next.identities import ATTRIBUTES, DEGREES
from mini_world.next.read_out import CATEGORIES, UNSAID, draw_statement, read_caption
from mini_world.next.scenes import COLOURS, FRAMINGS, MEDIA, PLACES, ROLES
from mini_world.next.things import THINGS
from mini_world.next.words import (
    ASTRONAUT_PHRASES,
    FRAMING_ENDS,
    GARMENTS,
    IDENTIFIERS,
    MEDIUM_ENDS,
    MEDIUM_NOUNS,
    PLACE_PHRASES,
    SUBJECT_WORDS,
    all_words,
    degree_phrase,
    degree_word,
    phrases_of,
    word_of,
)

COUNT = 1500


@dataclass
class Written:
    subject: str
    who: object
    scene: object
    caption: Caption
    statement: object

    @property
    def words(self):
        return re.findall("[a-z]+", self.caption.text)


def write(seed, count):
    rng = random.Random(seed)
    for _ in range(count):
        said = draw_statement(rng)
        yield Written(said.subject, said.who, said.scene, write_caption(said.subject, said.who, said.scene, rng), said)


@pytest.fixture(scope="module")
def written():
    return list(write(1, COUNT))


def mentions(text, phrase):
    return f" {phrase} " in f" {text.replace(',', ' ')} "


def words_of(who):
    """The words that may stand for this identity in any of the three ways."""
    values = {word_of(name, who[name]) for name in who.values}
    return values | {degree_word(who.kind, name, degree) for name, degree in who.degrees.items()}


def test_every_caption_names_subject_and_context(written):
    for one in written:
        text, scene = one.caption.text, one.scene
        if "subject" in one.caption.said:
            assert mentions(text, one.subject), text
        assert mentions(text, one.caption.subject), text
        # The name of a place, a role or a medium is in its caption, and no other one.
        assert {place for place in PLACES[1:] if mentions(text, place)} == {scene.place} - {"plain"}, text
        roles = {role for role in ROLES[1:] if mentions(text, role) and not mentions(text, f"without a {role}")}
        assert roles == {scene.role} - {"none"}, text
        media = {"sketch": "sketch", "pixel": "pixel art", "oil": "oil painting"}
        assert {medium for medium, noun in media.items() if mentions(text, noun)} == {scene.medium} - {"photo"}, text
        close = mentions(text, "close-up") or mentions(text, "up close")
        afar = any(mentions(text, word) for word in ("distant", "afar", "far", "distance"))
        assert (close, afar) == (scene.framing == "close", scene.framing == "afar"), text


def test_colours_stand_before_their_noun(written):
    named = 0
    for one in written:
        if one.scene.role in ("hat", "scarf"):
            said = mentions(one.caption.text, f"{one.scene.colour} {one.scene.role}")
            assert said == ("colour" in one.caption.said), one.caption
            assert said or mentions(one.caption.text, f"a {one.scene.role}")
            named += said
        else:
            assert "colour" not in one.caption.said
        for colour in COLOURS[1:]:
            for noun in ("hat", "scarf"):
                assert not mentions(one.caption.text, f"{colour} {noun}") or (colour, noun) == (
                    one.scene.colour,
                    one.scene.role,
                )
    assert named > 100


def test_several_coloured_things_stand_in_one_caption(written):
    def coloured(text):
        return len(re.findall(r"\b(red|blue|green|yellow|black|pink|grey|ginger)\b", text)) > 1

    both = [one for one in written if "colour" in one.caption.said and coloured(one.caption.text)]
    assert len(both) > 40
    joined = re.compile(r"wearing .*(glasses|sunglasses) and a (\w+ )?(hat|scarf|crown)")
    assert any(joined.search(one.caption.text) for one in both)


def test_text_and_folded_words_are_true_except_for_overrides(written):
    ways = {"folded": 0, "text": 0}
    painted = {"red", "blue", "green", "yellow", "black", "pink", "dark"}  # of hats, scarves, hair or frames
    every = {
        kind: {word_of(name, value) for name, values in table.items() for value in values}
        for kind, table in ATTRIBUTES.items()
    }
    for one in written:
        if one.who is None:
            assert not one.caption.folded
            continue
        folded = {word for word, _ in one.caption.folded}
        if not one.caption.overridden:
            assert folded <= words_of(one.who), one.caption
            ways["folded"] += bool(folded)
        said = set(one.words) & every[one.who.kind] - painted
        absent = {"glasses", "beard", "collar"}  # "no beard"
        true = set(one.who.values.values()) | words_of(one.who)
        assert said - absent <= true, one.caption
        ways["text"] += bool(said)
    assert min(ways.values()) > 150


def test_said_names_exactly_what_is_expressed(written):
    for one in written:
        if one.who is None:
            assert one.caption.said <= {"subject", "colour"}
            continue
        text, folded = one.caption.text, {word for word, _ in one.caption.folded}
        for name in one.who.values:
            value, kind = one.who[name], one.who.kind
            adjective = word_of(name, value) in {*one.words, *folded}
            phrased = any(mentions(text, phrase) for phrase in phrases_of(kind, name, value))
            if name in one.caption.said:
                joined = name in ("hair_colour", "hair_style", "glasses", "frame") and value in one.words
                without = value == "none" and "without" in text
                assert adjective or phrased or joined or without or name in one.caption.overridden, (name, one.caption)
            elif name == "skin":
                assert not (adjective or phrased), (name, one.caption)


def test_degrees_are_said_when_clear_and_weighted_when_folded(written):
    folded = 0
    for one in written:
        if one.who is None:
            continue
        weights = dict(one.caption.folded)
        for name, degree in one.who.degrees.items():
            words = DEGREES[one.who.kind][name]
            spoken = any(word in one.words for word in words)
            if spoken:
                assert abs(degree) > CLEAR_DEGREE
                assert name in one.caption.said
                assert words[degree > 0] in one.words
            inside = [word for word in words if word in weights]
            if inside and name not in one.caption.overridden:
                assert inside == [words[degree > 0]]
                assert weights[inside[0]] == pytest.approx(abs(degree))
                folded += 1
    assert folded > 150


def test_weights_of_categories_are_near_one_and_all_can_be_folded(written):
    sizes = {kind: set() for kind in ATTRIBUTES}
    for one in written:
        for word, weight in one.caption.folded:
            if word not in {side for kind in DEGREES for words in DEGREES[kind].values() for side in words}:
                assert 0.8 <= weight <= 1.15
        assert len({word for word, _ in one.caption.folded}) == len(one.caption.folded)
        if one.who is not None:
            sizes[one.who.kind].add(len(one.caption.folded))
    for kind, found in sizes.items():
        assert max(found) == len(ATTRIBUTES[kind]) + len(DEGREES[kind])


def test_an_override_is_corrected_by_a_phrase(written):
    some = [one for one in written if one.caption.overridden]
    assert len(some) > 75
    seen = set()
    for one in some:
        text, weights, who = one.caption.text, dict(one.caption.folded), one.who
        for name in one.caption.overridden:
            seen.add((who.kind, name))
            assert name in one.caption.said
            if name in who.degrees:
                assert degree_word(who.kind, name, who.degrees[name]) not in weights
                assert mentions(text, degree_phrase(who.kind, name, who.degrees[name]))
                continue
            if not (name == "frame" and "glasses" in one.caption.overridden):
                assert word_of(name, who[name]) not in weights, one.caption
            # Its true value is in the text: "pink", "glasses" after "without", …
            value = who[name]
            spoken = {"none": "glasses|beard|collar|tongue|border|clear", "freckles": "freckles"}.get(value, value)
            assert re.search(spoken.replace("smiling", "smil"), text), one.caption
    assert {("face", "glasses"), ("face", "hair_colour"), ("face", "beard"), ("cat", "fur"), ("cat", "collar")} <= seen


def test_negations_are_written_both_ways():
    texts = [one.caption.text for one in write(5, 1200)]
    for phrase in ("no glasses", "without glasses", "no beard", "without a beard", "no collar", "without a collar"):
        assert any(mentions(text, phrase) for text in texts), phrase


def test_identifiers_stand_before_the_subject_in_a_small_share():
    captions = [one.caption for one in write(6, 2000)]
    rare = [caption for caption in captions if caption.identifier != "none"]
    assert 0.04 < len(rare) / len(captions) < 0.08
    assert {caption.identifier for caption in rare} == set(IDENTIFIERS)
    for caption in captions:
        words = caption.text.split()
        named = [word for word in words if word in IDENTIFIERS]
        assert named == ([caption.identifier] if caption.identifier != "none" else [])
        if named:
            assert words.index(named[0]) < max(k for k, word in enumerate(words) if word.strip(",") == caption.subject)


def test_every_word_is_known_and_every_caption_fits(written):
    known = set(all_words())
    for one in written:
        assert {*one.words, *(word for word, _ in one.caption.folded)} <= known
        assert count_tokens(one.caption.text) <= MAXIMUM_TOKENS
        assert not re.search(r"  | ,|,,|^,|,$", one.caption.text), one.caption.text
        assert "{" not in one.caption.text


def test_the_longest_fit_too():
    """Every attribute, the longest context: the context is whole, and attributes are left out."""
    rng = random.Random(8)
    for _ in range(100):
        said = draw_statement(rng)
        while said.who is None or said.scene.role != "scarf" or "normal" in vars(said.scene).values():
            said = draw_statement(rng)
        text = write_caption(said.subject, said.who, said.scene, rng).text
        assert count_tokens(text) <= MAXIMUM_TOKENS
        assert mentions(text, "scarf")


def test_captions_repeat_with_their_generator():
    one = next(iter(write(3, 1)))
    texts = {write_caption(one.subject, one.who, one.scene, random.Random(seed)).text for seed in range(30)}
    assert len(texts) > 20
    first, second = (write_caption(one.subject, one.who, one.scene, random.Random(4)) for _ in range(2))
    assert first == second


def test_places_media_and_framings_vary_in_position(written):
    texts = [one.caption.text for one in written]
    for pattern in (
        r"\bas pixel art\b",
        r"^pixel art of",
        r", an oil painting$",
        r"^a close-up of",
        r", close-up\b",
        r"\bup close\b",
        r"\bfrom afar\b",
        r"^in (the )?snow, ",
        r"forest.* wearing",
        r"wearing.* forest",
        r"^here is",
    ):
        assert any(re.search(pattern, text) for text in texts), pattern


def test_readings_say_what_the_caption_says(written):
    for one in written[:300]:
        categories, degrees = read_caption(one.statement, one.caption)
        for (kind, name, values), position in zip(CATEGORIES, categories, strict=True):
            if kind == "scene" or position < 0:
                continue
            assert one.who.kind == kind
            assert values[position] == (one.who[name] if name in one.caption.said else UNSAID)
        assert sum(value == value for value in degrees) == (len(one.who.degrees) if one.who else 0)


# ── tables that have to agree ──


def test_the_phrases_are_those_of_the_scenes():
    assert tuple(PLACE_PHRASES) == PLACES
    assert set(GARMENTS) | {"none", "astronaut"} == set(ROLES)
    assert tuple(MEDIUM_NOUNS) == tuple(MEDIUM_ENDS) == MEDIA
    assert tuple(FRAMING_ENDS) == FRAMINGS
    assert all("astronaut" in phrase for phrase in ASTRONAUT_PHRASES)
    assert (*ATTRIBUTES, *THINGS) == SUBJECT_WORDS


@pytest.mark.parametrize("kind", list(ATTRIBUTES))
def test_a_folded_word_has_one_meaning(kind):
    words = [word_of(name, value) for name, values in ATTRIBUTES[kind].items() for value in values]
    words += [side for sides in DEGREES[kind].values() for side in sides]
    assert len(set(words)) == len(words)
    assert not set(words) & {*SUBJECT_WORDS, *IDENTIFIERS}


def test_the_vocabulary_lists_every_word_that_changes_an_image():
    groups = vocabulary(training_templates(find_domain("face")))
    other = groups.pop("other")
    spoken = {word for phrases in groups.values() for phrase in phrases for word in phrase.split()}
    assert {"blue", "hat", "scarf", "afar", "wideset", "pixel", "astronaut"} <= spoken
    assert set(IDENTIFIERS) <= set(other)
