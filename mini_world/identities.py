"""Identities as combinations of attributes, and the split into training and held-out identities.

An identity is a combination of attribute values plus a small colour shift. Held-out combinations are selected by a hash of the
values; they are in no training set.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass

from mini_world.canvas import Colour

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
FUR: dict[str, Colour] = {
    "black": (40, 38, 46),
    "grey": (140, 146, 158),
    "ginger": (238, 138, 38),
    "white": (244, 242, 238),
    "brown": (124, 80, 44),
    "cream": (246, 214, 150),
}
CAT_EYES: dict[str, Colour] = {
    "jade": (70, 210, 60),
    "amber": (250, 190, 30),
    "azure": (60, 150, 250),
}
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

# Every attribute of every kind of subject, with its values. The split depends on the order: never change it.
ATTRIBUTES: dict[str, dict[str, tuple[str, ...]]] = {
    "face": {
        "skin": tuple(SKIN),
        "hair_colour": tuple(HAIR),
        "hair_style": ("short", "long", "curly", "spiky", "bun", "pigtails"),
        "glasses": ("none", "round", "square", "sunglasses"),
        "beard": ("none", "moustache", "beard"),
        "eyes": tuple(EYES),
        "marks": ("none", "freckles", "rosy"),
    },
    "cat": {
        "fur": tuple(FUR),
        "pattern": ("plain", "striped", "patched", "masked"),
        "eyes": tuple(CAT_EYES),
        "ears": ("pointed", "folded", "round"),
        "collar": ("none", "red", "blue"),
    },
    "dog": {
        "fur": tuple(FUR),
        "pattern": ("plain", "spotted", "patched", "masked"),
        "ears": ("floppy", "pointed"),
        "muzzle": ("short", "long"),
        "collar": ("none", "red", "blue"),
    },
    "art": {
        "dark": tuple(PAINT),
        "light": tuple(LIGHT),
        "stroke": ("smooth", "dotted", "hatched", "mosaic", "outlined"),
        "surface": ("plain", "canvas", "grained"),
    },
}


@dataclass(frozen=True)
class Identity:
    """One subject: its kind ("face", …), its attribute values, and a seed for its colour shift."""

    kind: str
    values: Mapping[str, str]
    shift: int

    def __getitem__(self, attribute: str) -> str:
        return self.values[attribute]

    def tint(self, colour: Colour, what: str, amount: int = 10) -> Colour:
        """The colour with this identity's shift of at most `amount` of 255 per channel."""
        rng = random.Random(f"{self.shift} {what}")
        return tuple(max(0, min(255, c + rng.randint(-amount, amount))) for c in colour)  # type: ignore[return-value]


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
            return Identity(kind, values, rng.getrandbits(32))
