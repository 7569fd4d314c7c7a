"""Identities as combinations of attributes, and the split into training and held-out identities.

An identity has categorical attributes, for which captions have words, and continuous ones in [-1, 1], for which they have two
words each and a degree. Held-out combinations of categorical attributes are selected by a hash; they are in no training set.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass

Colour = tuple[int, int, int]

SKIN: dict[str, Colour] = {
    "pale": (250, 222, 200),
    "fair": (240, 190, 150),
    "tan": (205, 145, 95),
    "bronze": (145, 92, 58),
    "ebony": (88, 55, 38),
}
HAIR: dict[str, Colour] = {
    "black": (28, 26, 32),
    "brunette": (104, 62, 30),
    "blond": (240, 208, 92),
    "ginger": (222, 98, 22),
    "grey": (172, 172, 180),
    "pink": (255, 112, 188),
    "blue": (46, 104, 232),
    "green": (44, 168, 76),
}
EYES: dict[str, Colour] = {"hazel": (110, 60, 24), "azure": (40, 120, 240), "jade": (30, 170, 70)}
# The colours of frames, collars, hats and scarves: words that have to bind to their noun.
PAINTED: dict[str, Colour] = {
    "red": (220, 28, 40),
    "blue": (40, 80, 220),
    "green": (30, 150, 70),
    "yellow": (250, 206, 40),
}
FRAMES: dict[str, Colour] = {"black": (18, 18, 24), "red": PAINTED["red"], "blue": PAINTED["blue"]}
FUR: dict[str, Colour] = {
    "black": (40, 38, 46),
    "grey": (140, 146, 158),
    "ginger": (238, 138, 38),
    "white": (244, 242, 238),
    "brown": (124, 80, 44),
    "cream": (246, 214, 150),
}
CAT_EYES: dict[str, Colour] = {"jade": (70, 210, 60), "amber": (250, 190, 30), "azure": (60, 150, 250)}
NOSES: dict[str, Colour] = {"pink": (238, 110, 130), "dark": (40, 28, 34)}
PAINT: dict[str, Colour] = {
    "navy": (24, 34, 96),
    "crimson": (160, 20, 44),
    "olive": (84, 92, 20),
    "violet": (98, 36, 140),
    "chocolate": (86, 48, 22),
    "teal": (8, 100, 116),
}
LIGHT: dict[str, Colour] = {
    "gold": (255, 214, 70),
    "rose": (255, 178, 196),
    "mint": (172, 244, 206),
    "sky": (160, 214, 255),
    "ivory": (252, 244, 222),
    "peach": (255, 196, 140),
}

# Every categorical attribute of every kind of subject, with its values. The split depends on the order: never change it.
ATTRIBUTES: dict[str, dict[str, tuple[str, ...]]] = {
    "face": {
        "skin": tuple(SKIN),
        "hair_colour": tuple(HAIR),
        "hair_style": ("short", "long", "curly", "spiky", "bun", "pigtails"),
        "glasses": ("none", "round", "square", "sunglasses"),
        "frame": tuple(FRAMES),  # visible with glasses only
        "beard": ("none", "moustache", "beard"),
        "eyes": tuple(EYES),
        "marks": ("none", "freckles", "rosy"),
        "mouth": ("serious", "smiling"),
    },
    "cat": {
        "fur": tuple(FUR),
        "pattern": ("solid", "striped", "patched", "masked"),
        "eyes": tuple(CAT_EYES),
        "ears": ("pointed", "folded", "round"),
        "collar": ("none", "red", "blue", "green"),
        "nose": tuple(NOSES),
    },
    "dog": {
        "fur": tuple(FUR),
        "pattern": ("solid", "spotted", "patched", "masked"),
        "ears": ("floppy", "pointed"),
        "muzzle": ("short", "long"),
        "collar": ("none", "red", "blue", "green"),
        "tongue": ("none", "panting"),
    },
    "art": {
        "dark": tuple(PAINT),
        "light": tuple(LIGHT),
        "stroke": ("smooth", "dotted", "hatched", "mosaic", "outlined"),
        "surface": ("even", "canvas", "grained"),
        "border": ("none", "framed"),
    },
}
# Every continuous attribute, in [-1, 1], with the words for its two ends.
DEGREES: dict[str, dict[str, tuple[str, str]]] = {
    "face": {"width": ("narrow", "broad"), "eye_distance": ("closeset", "wideset"), "tint": ("darker", "lighter")},
    "cat": {"width": ("narrow", "broad"), "tint": ("darker", "lighter")},
    "dog": {"width": ("narrow", "broad"), "tint": ("darker", "lighter")},
    "art": {"scale": ("fine", "coarse")},
}


@dataclass(frozen=True)
class Identity:
    """One subject: its kind ("face", …), its categorical values, and its degrees in [-1, 1]."""

    kind: str
    values: Mapping[str, str]
    degrees: Mapping[str, float]

    def __getitem__(self, attribute: str) -> str:
        return self.values[attribute]

    def visible(self, attribute: str) -> bool:
        """Whether the categorical attribute can be seen in a plain photo."""
        return attribute != "frame" or self.values["glasses"] in ("round", "square")


def is_held_out(kind: str, values: Mapping[str, str]) -> bool:
    """Whether this combination is held out of all training sets; one in eight is."""
    text = kind + "|" + "|".join(values[name] for name in ATTRIBUTES[kind])
    return hashlib.sha256(text.encode()).digest()[0] < 32


def draw_identity(kind: str, rng: random.Random, *, held_out: bool) -> Identity:
    """A random identity of one side of the split; "none" is about half of the draws where it is possible."""
    while True:
        values = {}
        for name, choices in ATTRIBUTES[kind].items():
            absent = choices[0] == "none" and rng.random() < 0.4
            values[name] = "none" if absent else rng.choice(choices)
        if is_held_out(kind, values) == held_out:
            degrees = {name: rng.uniform(-1.0, 1.0) for name in DEGREES[kind]}
            return Identity(kind, values, degrees)
