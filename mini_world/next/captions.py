"""Captions of drawings: the subject word, most of its attributes in varied wording, and always the context.

Attributes are expressed in one of three ways: in phrases ("with curly pink hair and round red glasses"), as adjectives ("a curly
pink face"), or folded into the subject's word, whose input embedding is then its sum with the weighted word embeddings of the
attributes. Folding trains what a large text encoder can do already and Textual Inversion relies on: that a single embedding can
represent an appearance. Some folded captions contain a wrong word and a phrase that corrects it: an override, which teaches that
a phrase of the prompt has precedence over what the embedding says.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mini_world.next.identities import ATTRIBUTES, DEGREES, Identity
from mini_world.next.words import (
    ARTICLES,
    ASTRONAUT_PHRASES,
    FRAMING_ADJECTIVES,
    FRAMING_ENDS,
    GARMENTS,
    IDENTIFIERS,
    MEDIUM_ENDS,
    MEDIUM_NOUNS,
    NEUTRAL_ADJECTIVES,
    NEUTRAL_ENDS,
    NEUTRAL_FRONTS,
    PLACE_PHRASES,
    PLAIN_BACKGROUND,
    STYLE_FRONTS,
    STYLE_LINKS,
    SUBJECT_WORDS,
    WITHOUT_GARMENT,
    degree_phrase,
    degree_word,
    phrases_of,
    word_of,
)

if TYPE_CHECKING:
    from mini_world.next.world import Scene

MAXIMUM_TOKENS = 38  # of 40, without start and end
CLEAR_DEGREE = 0.5  # a smaller one is not said, in phrases and as adjective
GLAZED = ("round", "square")  # glasses whose frame has a visible colour


@dataclass(frozen=True)
class Caption:
    """A caption: the text, and the words folded into the embedding of its subject word, with their weights (empty: none).

    `said`: the names of the attributes that the caption expresses in any of the three ways, and "colour" and "subject" where it
    names the garment's colour and the subject. `overridden`: those of which a wrong value is folded and a phrase has the true
    one. `identifier`: the rare word in the text, or "none".
    """

    text: str
    subject: str
    folded: tuple[tuple[str, float], ...] = ()
    said: frozenset[str] = frozenset()
    overridden: frozenset[str] = frozenset()
    identifier: str = "none"


def count_tokens(text: str) -> int:
    """The number of tokens of a caption, whose words are all one token."""
    return len(re.findall("[a-z]+|[^a-z ]", text))


def write_caption(subject: str, who: Identity | None, scene: Scene, rng: random.Random) -> Caption:
    """Describe a drawing in a random wording from `rng`: `subject` is its word, `who` its identity or style, if it has one."""
    identifier = rng.choice(IDENTIFIERS) if rng.random() < 0.06 else "none"
    colour = scene.role in ("hat", "scarf") and rng.random() < 0.88
    folded: tuple[tuple[str, float], ...] = ()
    phrases: list[str] = []
    adjectives: list[str] = []
    named, inside, overridden = _names(who, rng), list[str](), frozenset[str]()
    if named and who is not None:
        way = rng.random()
        if way < 0.42:
            inside = named
            folded, overridden = _fold(who, named, rng)
            phrases = sorted(overridden)
            if not phrases and rng.random() < 0.2:
                phrases = _clear(who, rng.sample(named, 1))
        else:
            clear = _clear(who, named)
            split = rng.random() < 0.3
            adjectives = [name for name in clear if way >= 0.7 and not (split and rng.random() < 0.5)]
            phrases = [name for name in clear if name not in adjectives]
    rng.shuffle(phrases)
    style = who is not None and who.kind == "art"
    thing = not style or rng.random() < 0.85
    while True:
        text = _sentence(subject if thing else "", who, scene, identifier, colour, adjectives, phrases, rng)
        if count_tokens(text) <= MAXIMUM_TOKENS:
            break
        # The context stays whole, and so does an override; an attribute is left out.
        (phrases if len(phrases) > len(overridden) else adjectives).pop()
    said = {*inside, *phrases, *adjectives} | ({"colour"} if colour else set()) | ({"subject"} if thing else set())
    return Caption(text, "art" if style else subject, folded, frozenset(said), overridden, identifier)


def _names(who: Identity | None, rng: random.Random) -> list[str]:
    """The attributes that a caption is to name: none, all, or some."""
    if who is None:
        return []
    names = [name for name in ATTRIBUTES[who.kind] if who.visible(name)] + list(DEGREES[who.kind])
    share = rng.random()
    if share < 0.12:
        return []
    return names if share > 0.55 else [name for name in names if rng.random() < 0.55]


def _clear(who: Identity, names: list[str]) -> list[str]:
    return [name for name in names if name not in who.degrees or abs(who.degrees[name]) > CLEAR_DEGREE]


def _fold(who: Identity, names: list[str], rng: random.Random) -> tuple[tuple[tuple[str, float], ...], frozenset[str]]:
    """The folded words with weights, and the names of those that are wrong and have to be corrected by a phrase."""
    values, degrees = dict(who.values), dict(who.degrees)
    wrong: set[str] = set()
    if rng.random() < 0.35:
        wrong = set(rng.sample(_clear(who, names), min(len(_clear(who, names)), rng.choice((1, 1, 2)))))
    for name in sorted(wrong):
        if name in degrees:
            degrees[name] = -degrees[name] * rng.uniform(0.2, 1.0)
        else:
            values[name] = rng.choice([value for value in ATTRIBUTES[who.kind][name] if value != who[name]])
    folded_names = [name for name in names if name != "frame" or values["glasses"] in GLAZED]
    if "glasses" in wrong and values["glasses"] in GLAZED and "frame" not in folded_names:
        folded_names.append("frame")
    if "glasses" in wrong and "frame" in names:
        wrong.add("frame")  # the phrase for the glasses needs their colour, which may not be folded
    # The embedding of S* can be scaled, and its directions are not of one length.
    scale = (1.0, 1.0) if rng.random() < 0.7 else (0.8, 1.15)
    folded = []
    for name in folded_names:
        if name in degrees:
            folded.append((degree_word(who.kind, name, degrees[name]), abs(degrees[name])))
        else:
            folded.append((word_of(name, values[name]), rng.uniform(*scale)))
    return tuple(folded), frozenset(wrong)


def _noun_phrases(who: Identity, names: list[str], rng: random.Random) -> list[str]:
    """Noun phrases for these attributes; those of hair and of glasses are joined."""
    said, left = [], list(names)
    if {"hair_colour", "hair_style"} <= set(left):
        style, colour = who["hair_style"], who["hair_colour"]
        tied = [
            f"{colour} hair in {'a bun' if style == 'bun' else style}",
            f"a {colour} bun" if style == "bun" else f"{colour} {style}",
        ]
        said.append(rng.choice(tied if style in ("bun", "pigtails") else [f"{style} {colour} hair", f"{colour} {style} hair"]))
        left = [name for name in left if name not in ("hair_colour", "hair_style")]
    if {"glasses", "frame"} <= set(left) and who["glasses"] in GLAZED:
        shape, colour = who["glasses"], who["frame"]
        framed = f"{shape} glasses with a {colour} frame"
        said.append(rng.choice((f"{shape} {colour} glasses", f"{colour} {shape} glasses", framed)))
        left = [name for name in left if name not in ("glasses", "frame")]
    for name in left:
        if name in who.degrees:
            said.append(degree_phrase(who.kind, name, who.degrees[name]))
        else:
            said.append(rng.choice(phrases_of(who.kind, name, who[name])))
    rng.shuffle(said)
    return said


def _joined(parts: list[str], rng: random.Random) -> str:
    """One of "a and b and c", "a , b and c" and "a , b , c"."""
    if len(parts) < 2:
        return "".join(parts)
    comma, last = rng.choice(((" and ", " and "), (", ", " and "), (", ", ", ")))
    return comma.join(parts[:-1]) + last + parts[-1]


def _garment(scene: Scene, colour: bool) -> str:
    named = scene.colour if colour else ""
    return GARMENTS[scene.role].format(named).replace("a  ", "a ") if scene.role in GARMENTS else ""


def _description(who: Identity | None, scene: Scene, colour: bool, phrases: list[str], rng: random.Random) -> tuple[str, str]:
    """What follows the subject's word: its attributes, and its role."""
    said = _noun_phrases(who, phrases, rng) if who is not None else []
    garment = _garment(scene, colour)
    role = rng.choice(ASTRONAUT_PHRASES) if scene.role == "astronaut" else ""
    if garment:
        role = f"{rng.choice(('wearing', 'wearing', 'in', 'with'))} {garment}"
        worn = [phrase for phrase in said if "glasses" in phrase and not phrase.startswith("no ")]
        if worn and rng.random() < 0.5:
            # Several coloured things in one phrase.
            said = [phrase for phrase in said if phrase not in worn]
            role = "wearing " + " and ".join(rng.sample([garment, *worn], 2))
    elif scene.role == "none" and who is not None and who.kind != "art" and rng.random() < 0.03:
        role = rng.choice(WITHOUT_GARMENT)
    missing = [phrase for phrase in said if phrase.startswith("no ") and rng.random() < 0.6]
    said = [phrase for phrase in said if phrase not in missing]
    rest = [_with_article(phrase.removeprefix("no ")) for phrase in missing]
    first = "wearing" if len(said) == 1 and "glasses" in said[0] and rng.random() < 0.4 else "with"
    if first == "wearing" and said[0].startswith("no "):
        first = "with"
    parts = [f"{first} {_joined(said, rng)}" if said else "", f"without {_joined(rest, rng)}" if rest else ""]
    rng.shuffle(parts)
    return " ".join(part for part in parts if part), role


def _with_article(noun: str) -> str:
    return noun if noun in ("glasses",) else f"a {noun}"


def _front(scene: Scene, styled: bool, rng: random.Random) -> tuple[str, bool, bool]:
    """What stands before the subject; whether it names the medium, and whether it names the framing."""
    photo = scene.medium == "photo"
    medium = rng.random() < 0.65
    framing = scene.framing != "normal" and rng.random() < 0.6
    if framing and (not medium or rng.random() < 0.5):
        # "a close-up of", for which the medium follows at the end.
        return ("a close-up of" if scene.framing == "close" else "a distant view of"), photo, True
    if not medium:
        return (rng.choice(NEUTRAL_FRONTS) if photo and not styled and rng.random() < 0.15 else ""), photo, False
    noun = rng.choice(MEDIUM_NOUNS[scene.medium])
    if framing:
        noun = f"{FRAMING_ADJECTIVES[scene.framing]} {noun}"
    elif rng.random() < 0.2:
        noun = f"{rng.choice(NEUTRAL_ADJECTIVES)} {noun}"
    if noun.endswith("pixel art") and rng.random() < 0.8:
        return f"{noun} of", True, framing
    article = "an" if noun[0] in "aeiou" else "a"
    return f"{rng.choice((article, article, article, 'the', 'one'))} {noun} of", True, framing


def _sentence(
    subject: str,
    who: Identity | None,
    scene: Scene,
    identifier: str,
    colour: bool,
    adjectives: list[str],
    phrases: list[str],
    rng: random.Random,
) -> str:
    """One wording; an empty `subject` leaves out the thing that is shown in a style."""
    styled = who is not None and who.kind == "art"
    words = [_adjective(who, name) for name in adjectives] if who is not None else []
    rng.shuffle(words)
    described, role = _description(who, scene, colour, phrases, rng)
    rare = "" if identifier == "none" else identifier
    front, medium, framing = _front(scene, styled, rng)
    article = rng.choice(ARTICLES)
    if styled:
        subject = f"{article} {subject}" if subject else rng.choice(STYLE_FRONTS)
        noun = f"{subject} {rng.choice(STYLE_LINKS)} {' '.join([rare, *words])} art {described}"
    else:
        order = [rare, *words] if rng.random() < 0.5 else [*words, rare]
        noun = f"{article} {' '.join(order)} {subject} {described}"
    place = rng.choice(PLACE_PHRASES[scene.place])
    if scene.place == "plain" and rng.random() < 0.06:
        place = PLAIN_BACKGROUND
    context = [part for part in (role, place) if part]
    if rng.random() < 0.35:
        context.reverse()
    if not framing:
        context.insert(rng.randint(0, len(context)), rng.choice(FRAMING_ENDS[scene.framing]))
    if not medium:
        context.append(rng.choice(MEDIUM_ENDS[scene.medium]))
    if not context and not styled and rng.random() < 0.05:
        context = [rng.choice(NEUTRAL_ENDS)]
    comma = " , " if rng.random() < 0.2 else " "
    text = comma.join(part for part in (f"{front} {noun}", *context) if part)
    if place and rng.random() < 0.04 and not styled:
        # The place first: "in the snow, a photo of …".
        context.remove(place)
        text = comma.join(part for part in (f"{place} , {front} {noun}", *context) if part)
    text = re.sub(r"\s*,[\s,]*", ", ", text)
    return re.sub(r"\s+", " ", text).strip(" ,")


def _adjective(who: Identity, name: str) -> str:
    return degree_word(who.kind, name, who.degrees[name]) if name in who.degrees else word_of(name, who[name])


def vocabulary(templates: Iterable[str] = ()) -> dict[str, list[str]]:
    """What captions say, by group, for `vocabulary.json` of the base.

    "other" are words that change nothing in an image, in captions or in `templates`, the prompts that domains are trained with.
    """
    plurals = {"face": "faces", "cat": "cats", "dog": "dogs", "art": "styles"}
    colours = ("red", "blue", "green", "yellow")
    garments = [f"wearing {GARMENTS[role].format(colour)}" for role in ("hat", "scarf") for colour in colours]
    nouns = dict.fromkeys(noun for nouns in MEDIUM_NOUNS.values() for noun in nouns)
    media = [f"{'an' if noun[0] in 'aeiou' else 'a'} {noun} of" for noun in nouns]
    groups = {
        "subjects": list(SUBJECT_WORDS),
        "places": _spoken(PLACE_PHRASES),
        "roles and garments": [*ASTRONAUT_PHRASES, "wearing a crown", *garments],
        "media": [*media, "pixel art of", *_spoken(MEDIUM_ENDS)],
        "framing": ["a close-up of", "a distant view of", *_spoken(FRAMING_ENDS)],
    }
    for kind, attributes in ATTRIBUTES.items():
        said = [phrases_of(kind, name, value)[0] for name, values in attributes.items() for value in values]
        said += [degree_phrase(kind, name, side) for name in DEGREES[kind] for side in (-1.0, 1.0)]
        groups[f"attributes of {plurals[kind]}"] = list(dict.fromkeys(said))
    known = {word for phrases in groups.values() for phrase in phrases for word in _words(phrase)}
    texts = [*templates, *IDENTIFIERS, *ARTICLES, *NEUTRAL_ADJECTIVES, *NEUTRAL_FRONTS, *NEUTRAL_ENDS]
    texts += [*STYLE_FRONTS, *STYLE_LINKS]
    texts += [word_of(name, value) for table in ATTRIBUTES.values() for name, values in table.items() for value in values]
    groups["other"] = sorted({word for text in [*texts, "and with without"] for word in _words(text)} - known)
    return groups


def _spoken(table: Mapping[str, Iterable[str]]) -> list[str]:
    return [phrase.strip(" ,") for phrases in table.values() for phrase in phrases if phrase]


def _words(text: str) -> list[str]:
    return re.findall("[a-z]+", text.lower())
