"""What is said of a picture: the subject word, most of its attributes in varied wording, and always the context.

Attributes are said in one of three ways, so that looks have directions in the text space as they have in a large one:
in phrases ("with curly pink hair and round glasses"), as adjectives ("a curly pink face"), or folded into the subject's
own word, whose input embedding is then the sum of the subject's and the attributes' words. The last is the drawn world's
stand-in for what a large text encoder knows already (Textual Inversion works on it): that one vector can hold a look.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from mini_world.identities import ATTRIBUTES, Identity

SUBJECT_WORDS = ("face", "cat", "dog", "art", "tree", "house", "mountain", "boat", "flower")
# One word for each absence, because an attribute that is absent is a look as well.
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
ARTICLES = ("a", "a", "a", "the", "my", "one", "")
# Words that prompts may hold and captions seldom do; they only have to be whole tokens.
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
    """The single word that says this attribute's value."""
    return ABSENT[attribute] if value == "none" else value


def _phrases(who: Identity, named: list[str], chooser: random.Random) -> list[str]:
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
    chooser.shuffle(said)
    return said


def _pick_attributes(who: Identity, chooser: random.Random) -> list[str]:
    kind = chooser.random()
    names = list(ATTRIBUTES[who.kind])
    if kind < 0.12:
        return []
    if kind > 0.55:
        return names
    return [name for name in names if chooser.random() < 0.6]


def write_caption(
    subject: str,
    who: Identity | None,
    place: str,
    role: str,
    medium: str,
    framing: str,
    chooser: random.Random,
) -> Caption:
    """Say what is in a picture, in a wording drawn from `chooser`; every call may say it otherwise."""
    style = who is not None and who.kind == "art"
    named = _pick_attributes(who, chooser) if who is not None else []
    way = chooser.random()
    folded: tuple[str, ...] = ()
    adjectives, tail = "", ""
    if named and who is not None:
        words = [word_of(name, who[name]) for name in named]
        chooser.shuffle(words)
        if way < 0.35:
            folded = tuple(words)
        elif way < 0.65 or style:
            adjectives = " ".join(words)
        else:
            tail = "with " + " and ".join(_phrases(who, named, chooser))
    parts = [chooser.choice(MEDIUM_PHRASES[medium])]
    if framing == "close":
        parts.append("a close-up of")
    if style:
        parts += [chooser.choice(ARTICLES), subject, "in the style of", adjectives, "art"]
    else:
        parts += [chooser.choice(ARTICLES), adjectives, subject, tail]
    context = [chooser.choice(ROLE_PHRASES[role]), chooser.choice(PLACE_PHRASES[place])]
    if framing == "afar":
        context.append("from afar")
    parts += context
    return Caption(" ".join(part for part in parts if part), "art" if style else subject, folded)


def all_words() -> list[str]:
    """Every word of every caption, and the further ones: the tokenizer makes each a token of its own."""
    texts = list(FURTHER_WORDS) + list(SUBJECT_WORDS) + list(ABSENT.values()) + list(ARTICLES)
    for table in (PLACE_PHRASES, ROLE_PHRASES, MEDIUM_PHRASES):
        texts += [phrase for phrases in table.values() for phrase in phrases]
    for attributes in ATTRIBUTES.values():
        texts += [value for values in attributes.values() for value in values]
    texts += ["hair skin glasses eyes cheeks fur coat ears muzzle collar style from afar close up"]
    words = {word for text in texts for word in text.lower().replace("-", " ").split()}
    return sorted(words)
