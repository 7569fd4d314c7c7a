"""Captions of drawings: the context always, the identity only where it is the drawing's."""

import random
import re

import pytest

from e4t_cli.prompts import training_templates
from e4t_cli.registry.discovery import find_domain
from mini_world.canvas import LABELS
from mini_world.captions import (
    ABSENT,
    MEDIUM_PHRASES,
    PLACE_PHRASES,
    ROLE_PHRASES,
    SUBJECT_WORDS,
    all_words,
    word_of,
)
from mini_world.data import SUBJECTS, WHO_KINDS
from mini_world.evaluate import VALUES, tasks_of
from mini_world.identities import ATTRIBUTES
from mini_world.scenes import FRAMINGS, MEDIA, PLACES, ROLES
from mini_world.world import KINDS, SUBJECT_LABELS, THINGS, Scene

ATTRIBUTE_WORDS = {
    kind: {word_of(name, value) for name, values in table.items() for value in values}
    for kind, table in ATTRIBUTES.items()
}
EVERY_ATTRIBUTE_WORD = set().union(*ATTRIBUTE_WORDS.values())


def mentions(text, phrase):
    return f" {phrase} " in f" {text} "


def scene_of(text):
    """Read the context back from a text; each part by the phrases of its table."""

    def one(table, usual):
        found = {
            value
            for value, phrases in table.items()
            if value != usual and any(mentions(text, phrase) for phrase in phrases if phrase)
        }
        assert len(found) <= 1, (text, found)
        return found.pop() if found else usual

    framing = "close" if mentions(text, "a close-up of") else "normal"
    return Scene(
        place=one(PLACE_PHRASES, "plain"),
        role=one(ROLE_PHRASES, "none"),
        medium=one(MEDIUM_PHRASES, "photo"),
        framing="afar" if mentions(text, "from afar") else framing,
    )


def test_captions_name_the_subject_and_all_of_the_context(drawings):
    rng = random.Random(1)
    for drawing in drawings:
        for _ in range(4):
            caption = drawing.caption(rng)
            assert mentions(caption.text, drawing.subject)
            assert mentions(caption.text, caption.subject)
            assert scene_of(caption.text) == drawing.scene


def test_captions_name_no_attribute_that_is_not_there(drawings):
    rng = random.Random(2)
    named = folded = 0
    for drawing in drawings:
        # A red hat is context; so is no beard where "beard" could be read.
        if drawing.who is None or drawing.scene.role == "hat":
            continue
        who = drawing.who
        own = {word_of(name, value) for name, value in who.values.items()}
        for _ in range(4):
            caption = drawing.caption(rng)
            text = caption.text.replace("no beard", "")
            said = set(text.split()) & ATTRIBUTE_WORDS[who.kind]
            assert said <= own, (caption.text, own)
            assert set(caption.folded) <= own
            assert not (said and caption.folded)
            named, folded = named + bool(said), folded + bool(caption.folded)
    assert named > 100
    assert folded > 100


def test_every_word_of_every_caption_is_known(drawings):
    known, rng = set(all_words()), random.Random(3)
    for drawing in drawings:
        caption = drawing.caption(rng)
        words = {*caption.text.replace("-", " ").split(), *caption.folded}
        assert words <= known, words - known


def test_wordings_vary_and_repeat_with_their_chooser(drawings):
    texts = {drawings[0].caption(random.Random(seed)).text for seed in range(30)}
    assert len(texts) > 15
    assert drawings[0].caption(random.Random(4)) == drawings[0].caption(random.Random(4))


@pytest.mark.parametrize("name", ["face", "cat", "art"])
def test_the_prompt_templates_name_no_attribute(name):
    """Otherwise a drawing could keep an attribute because the template names it."""
    for template in training_templates(find_domain(name)):
        said = set(re.findall(r"[a-z]+", template.lower())) & EVERY_ATTRIBUTE_WORD
        assert not said, (template, said)


# ── tables that have to agree ──


def test_the_phrases_are_those_of_the_scenes():
    assert tuple(PLACE_PHRASES) == PLACES
    assert tuple(ROLE_PHRASES) == ROLES
    assert tuple(MEDIUM_PHRASES) == MEDIA
    assert PLACE_PHRASES["plain"] == ROLE_PHRASES["none"] == ("",)
    for table in (PLACE_PHRASES, ROLE_PHRASES, MEDIUM_PHRASES):
        for value, phrases in table.items():
            if value not in ("plain", "none", "photo"):
                assert all(mentions(phrase, value) for phrase in phrases), value
                assert not any(phrase == "" for phrase in phrases)
    usual = Scene()
    assert (usual.place, usual.role, usual.medium, usual.framing) == tuple(
        values[0] for values in (PLACES, ROLES, MEDIA, FRAMINGS)
    )


def test_the_subjects_are_the_same_everywhere():
    assert (*WHO_KINDS, *THINGS) == SUBJECT_WORDS
    assert (*WHO_KINDS, "thing") == KINDS
    assert tuple(ATTRIBUTES) == WHO_KINDS
    assert (*(kind for kind in WHO_KINDS if kind != "art"), *THINGS) == SUBJECTS
    assert VALUES["subject"] == SUBJECTS


def test_absences_have_words_of_their_own():
    absent = {name for table in ATTRIBUTES.values() for name, choices in table.items() if "none" in choices}
    assert set(ABSENT) == absent
    for table in ATTRIBUTES.values():
        said = [[word_of(name, value) for value in choices] for name, choices in table.items()]
        assert all(len(set(values)) == len(values) for values in said)
        assert not {word for values in said for word in values} & set(SUBJECT_WORDS)


def test_what_the_face_domain_calls_a_head_is_what_is_drawn_as_one():
    from e4t_domains.face_parsing import HEAD

    drawn = {LABELS[label] for label in SUBJECT_LABELS} - {"animal"}
    assert set(HEAD) & set(LABELS) == drawn


@pytest.mark.parametrize("kind", ["face", "cat", "art"])
def test_the_prompts_of_the_evaluation_ask_for_their_scenes(kind):
    for task in tasks_of(kind):
        assert mentions(task.prompt, "S*")
        assert scene_of(task.prompt) == task.scene
        assert (task.thing is not None) == (kind == "art")
        if task.thing is not None:
            assert mentions(task.prompt, task.thing)
        # "red" is the hat's; no other attribute may be named.
        said = set(task.prompt.replace("a red hat", "").split()) & EVERY_ATTRIBUTE_WORD
        assert not said, task.prompt
