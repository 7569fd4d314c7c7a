"""Captions of drawings: the subject word, most of its attributes in varied wording, and always the context.

Attributes are expressed in one of three ways: in phrases ("with curly pink hair and round glasses"), as adjectives ("a curly
pink face"), or folded into the subject's word, whose input embedding is then the sum of the word embeddings of the subject and
the attributes. Folding trains what a large text encoder can do already and Textual Inversion relies on: that a single embedding
can represent an appearance.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mini_world.identities import ATTRIBUTES, Identity

SUBJECT_WORDS = ("face", "cat", "dog", "art", "tree", "house", "mountain", "boat", "flower")
# One word for each absent attribute, because absence is part of the appearance too.
ABSENT = {"glasses": "barefaced", "beard": "shaven", "marks": "clear", "collar": "collarless"}
PLACE_PHRASES = {
    "plain": ("",),
    "beach": ("on the beach", "at the beach"),
    "snow": ("in the snow",),
    "forest": ("in the forest", "in a forest"),
    "city": ("in the city", "in a city"),
    "space": ("in space",),
}
ROLE_PHRASES = {
    "none": ("",),
    "astronaut": ("as an astronaut",),
    "crown": ("wearing a crown", "with a crown"),
    "hat": ("wearing a red hat", "in a red hat"),
    "scarf": ("wearing a scarf", "in a scarf"),
}
MEDIUM_PHRASES = {
    "photo": (
        "a photo of",
        "a picture of",
        "a good photo of",
        "a nice picture of",
        "a clean photo of",
        "a rendering of",
        "a bright photo of",
        "an image of",
        "a depiction of",
        "",
    ),
    "sketch": ("a pencil sketch of", "a sketch of"),
    "pixel": ("pixel art of", "a pixel art picture of"),
    "oil": ("an oil painting of",),
}
PLURALS = {"face": "faces", "cat": "cats", "dog": "dogs", "art": "styles"}
ARTICLES = ("a", "a", "a", "the", "my", "one", "")
# Words that prompts may contain and captions seldom do; each has to be one token.
FURTHER_WORDS = (
    "portrait",
    "drawing",
    "painting",
    "style",
    "in",
    "of",
    "cropped",
    "close",
    "up",
    "dark",
    "small",
    "large",
    "cool",
    "weird",
    "view",
    "front",
    "this",
    "that",
    "person",
    "man",
    "woman",
    "animal",
    "pet",
    "made",
    "by",
    "piece",
    "work",
    "artwork",
    "detail",
    "detailed",
    "and",
    "with",
    "no",
    "sks",
    "walking",
    "smiling",
    "sitting",
    "standing",
    "night",
    "day",
    "mars",
    "king",
    "queen",
    "very",
    "high",
    "quality",
    "low",
    "blurry",
    "is",
    "here",
    "at",
    "on",
)


@dataclass(frozen=True)
class Caption:
    """A caption: the text, and the words folded into the embedding of its subject word (empty: none)."""

    text: str
    subject: str
    folded: tuple[str, ...] = ()


def word_of(attribute: str, value: str) -> str:
    """The single word for this attribute's value."""
    return ABSENT[attribute] if value == "none" else value


def _phrases(who: Identity, named: list[str], rng: random.Random) -> list[str]:
    said = []
    if "hair_colour" in named and "hair_style" in named:
        said.append(f"{who['hair_style']} {who['hair_colour']} hair")
    for name in named:
        value = who[name]
        both = "hair_colour" in named and "hair_style" in named
        if name in ("hair_colour", "hair_style"):
            if not both:
                said.append(f"{value} hair")
        elif name == "skin":
            said.append(f"{value} skin")
        elif name == "glasses":
            said.append({"none": "no glasses", "sunglasses": "sunglasses"}.get(value, f"{value} glasses"))
        elif name == "beard":
            said.append("no beard" if value == "none" else f"a {value}")
        elif name == "eyes":
            said.append(f"{value} eyes")
        elif name == "marks":
            said.append({"none": "clear skin", "rosy": "rosy cheeks", "freckles": "freckles"}[value])
        elif name == "fur":
            said.append(f"{value} fur")
        elif name in ("ears", "muzzle"):
            said.append(f"{value} {name}")
        elif name == "collar":
            said.append("no collar" if value == "none" else f"a {value} collar")
        else:
            said.append(f"{value} coat" if name == "pattern" else value)
    rng.shuffle(said)
    return said


def _pick_attributes(who: Identity, rng: random.Random) -> list[str]:
    kind = rng.random()
    names = list(ATTRIBUTES[who.kind])
    if kind < 0.12:
        return []
    if kind > 0.55:
        return names
    return [name for name in names if rng.random() < 0.6]


def write_caption(
    subject: str,
    who: Identity | None,
    place: str,
    role: str,
    medium: str,
    framing: str,
    rng: random.Random,
) -> Caption:
    """Describe a drawing in a random wording from `rng`."""
    style = who is not None and who.kind == "art"
    named = _pick_attributes(who, rng) if who is not None else []
    way = rng.random()
    folded: tuple[str, ...] = ()
    adjectives, tail = "", ""
    if named and who is not None:
        words = [word_of(name, who[name]) for name in named]
        rng.shuffle(words)
        if way < 0.35:
            folded = tuple(words)
        elif way < 0.65 or style:
            adjectives = " ".join(words)
        else:
            tail = "with " + " and ".join(_phrases(who, named, rng))
    parts = [rng.choice(MEDIUM_PHRASES[medium])]
    if framing == "close":
        parts.append("a close-up of")
    if style:
        parts += [rng.choice(ARTICLES), subject, "in the style of", adjectives, "art"]
    else:
        parts += [rng.choice(ARTICLES), adjectives, subject, tail]
    context = [rng.choice(ROLE_PHRASES[role]), rng.choice(PLACE_PHRASES[place])]
    if framing == "afar":
        context.append("from afar")
    parts += context
    return Caption(" ".join(part for part in parts if part), "art" if style else subject, folded)


def all_words() -> list[str]:
    """Every word of every caption, and `FURTHER_WORDS`: each is one token of the tokenizer."""
    texts = list(FURTHER_WORDS) + list(SUBJECT_WORDS) + list(ABSENT.values()) + list(ARTICLES)
    for table in (PLACE_PHRASES, ROLE_PHRASES, MEDIUM_PHRASES):
        texts += [phrase for phrases in table.values() for phrase in phrases]
    for attributes in ATTRIBUTES.values():
        texts += [value for values in attributes.values() for value in values]
    texts += ["hair skin glasses eyes cheeks fur coat ears muzzle collar style from afar close up"]
    words = {word for text in texts for word in text.lower().replace("-", " ").split()}
    return sorted(words)


def vocabulary(templates: Iterable[str] = ()) -> dict[str, list[str]]:
    """What captions say, by group, for `vocabulary.json` of the base.

    "other" are words that change nothing in an image, in captions or in `templates`, the prompts that domains are trained with.
    The rest of `FURTHER_WORDS` has tokens, and no caption uses it: the base learned nothing about it.
    """
    groups = {
        "subjects": list(SUBJECT_WORDS),
        "places": _spoken(PLACE_PHRASES),
        "roles and garments": _spoken(ROLE_PHRASES),
        "media": _spoken(MEDIUM_PHRASES),
        "framing": ["a close-up of", "from afar"],
    }
    for kind, attributes in ATTRIBUTES.items():
        values = [(name, value) for name, values in attributes.items() for value in values]
        said = [_phrases(Identity(kind, {name: value}, 0), [name], random.Random(0))[0] for name, value in values]
        groups[f"attributes of {PLURALS[kind]}"] = list(dict.fromkeys(said))
    known = {word for phrases in groups.values() for phrase in phrases for word in _words(phrase)}
    texts = [*templates, *ABSENT.values(), *ARTICLES, "and in the style of with"]
    groups["other"] = sorted({word for text in texts for word in _words(text)} - known)
    return groups


def _spoken(table: Mapping[str, Sequence[str]]) -> list[str]:
    return [phrase for phrases in table.values() for phrase in phrases if phrase]


def _words(text: str) -> list[str]:
    return re.findall("[a-z]+", text.lower())
