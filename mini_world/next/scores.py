"""Scores of one image: identity, prompt, subject, bound colours, overridden attributes, and colours copied from the photo.

Everything is computed from a `Reading`, what the judge reads in the image, and from the facts asked for. Attributes that a
drawing of the same scene would hide are never counted; `visible` is the one definition of that, for training and scoring.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy

from mini_world.next.identities import ATTRIBUTES, DEGREES, Colour, Identity
from mini_world.next.scenes import COLOURED_ROLES
from mini_world.next.world import Scene

TOLERANCE = 0.5
"""The error of a degree, in units of [-1, 1], at which its agreement is zero."""

# What a drawing does not show of a kind, by a value of its role, medium or framing. A sketch is grey; a scarf lies on a dog's
# collar. All else changes at least a dozen pixels (tests/mini_world_next/test_scores.py compares drawings).
HIDDEN: dict[str, dict[str, tuple[str, ...]]] = {
    "sketch": {
        "face": ("skin", "hair_colour", "frame", "eyes", "tint"),
        "cat": ("fur", "eyes", "collar", "nose", "tint"),
        "dog": ("fur", "collar", "tint"),
    },
    "scarf": {"dog": ("collar",)},
}
"""Attributes and degrees of each kind that a role, medium or framing hides."""


def visible(who: Identity, scene: Scene, name: str) -> bool:
    """Whether a drawing of `who` in `scene` shows the attribute or degree `name`."""
    if name == "frame" and who["glasses"] not in ("round", "square"):
        return False
    if who.kind == "face" and name == "eyes" and who["glasses"] == "sunglasses":
        return False
    return not any(name in HIDDEN.get(part, {}).get(who.kind, ()) for part in (scene.role, scene.medium, scene.framing))


def fact_visible(scene: Scene, fact: str) -> bool:
    """Whether a drawing of `scene` shows this fact of it: all but the colour of a hat or scarf in a sketch."""
    return not (fact == "colour" and scene.role in COLOURED_ROLES and scene.medium == "sketch")


def garment_visible(kind: str, scene: Scene) -> bool:
    """Whether the colour of a face's clothes can be measured: a scarf and a suit cover them, and other media change colours."""
    return kind == "face" and scene.role not in ("astronaut", "scarf") and scene.medium == "photo"


def backdrop_visible(kind: str, scene: Scene) -> bool:
    """Whether the colour of a plain background can be measured; a style has its own colours."""
    return kind != "art" and scene.place == "plain" and scene.medium == "photo"


def replaced(who: Identity, **values: str) -> Identity:
    """The identity with other values of some categorical attributes.

    Raises:
        ValueError: a value that the attribute does not have.
    """
    for name, value in values.items():
        if value not in ATTRIBUTES[who.kind].get(name, ()):
            raise ValueError(f"{who.kind} has no {name} {value!r}")
    return replace(who, values={**who.values, **values})


@dataclass(frozen=True)
class Reading:
    """What the judge reads in one image; `values` and `degrees` as if it showed a subject of the kind that was asked for.

    garment, backdrop: RGB in 0..255, of use where `garment_visible` and `backdrop_visible`.
    """

    subject: str
    scene: Scene
    values: Mapping[str, str]
    degrees: Mapping[str, float]
    garment: tuple[float, float, float]
    backdrop: tuple[float, float, float]


@dataclass(frozen=True)
class Wanted:
    """What an image should show: the identity of the photo in a scene.

    subject: the word: the kind, or the thing that a style is asked for.
    override: an attribute and the value that the prompt asks for against the photo.
    garment, backdrop: the photo's colours; None where the prompt asks for others or they cannot be measured.
    names: the attributes and degrees that count; None for all.
    """

    who: Identity
    scene: Scene
    subject: str
    override: tuple[str, str] | None = None
    garment: Colour | None = None
    backdrop: Colour | None = None
    names: frozenset[str] | None = None


def agreement(error: float) -> float:
    """The agreement of a degree, 1 without error and 0 from `TOLERANCE` on."""
    return max(0.0, 1.0 - abs(error) / TOLERANCE)


def colour_distance(a: Colour | tuple[float, ...], b: Colour | tuple[float, ...]) -> float:
    """Root mean square difference of two colours over R, G and B, 0..255; the Euclidean distance is √3 times as large."""
    return float(numpy.sqrt(numpy.mean(numpy.square(numpy.subtract(a, b)))))


def independent_distance(low: float, high: float) -> float:
    """The root mean square distance of two independent colours whose channels are uniform between `low` and `high`."""
    return float((high - low) / 6**0.5)


def asked_facts(scene: Scene) -> dict[str, str]:
    """The facts of a scene that differ from a plain photo: those that a prompt names."""
    plain = Scene()
    named = {field.name: getattr(scene, field.name) for field in fields(scene)}
    return {name: value for name, value in named.items() if value != getattr(plain, name) and fact_visible(scene, name)}


def score(wanted: Wanted, read: Reading) -> dict:
    """The scores of one image.

    right: 0 or 1 of every categorical attribute that can be seen, but for an overridden one; errors: of every degree.
    identity: mean of `right` and of the degrees' agreements, None if nothing of the identity can be seen.
    prompt: share of the context facts asked for, without the subject; None if the prompt asks for none.
    subject: whether the subject word is right. bound: whether the colour of a hat or scarf is right, given the hat or scarf.
    override: whether the overridden attribute has the value asked for.
    garment, backdrop: distances of the colours from the photo's (`colour_distance`); small means copied.
    """
    who, scene = wanted.who, wanted.scene
    shown = who if wanted.override is None else replaced(who, **dict([wanted.override]))
    fixed = wanted.override[0] if wanted.override else None

    def counts(name: str) -> bool:
        if wanted.names is not None and name not in wanted.names:
            return False
        # Both: the photo must show it, and so must the image; new glasses have a frame that the photo does not.
        return name != fixed and visible(who, Scene(), name) and visible(shown, scene, name)

    right = {name: int(read.values[name] == who[name]) for name in ATTRIBUTES[who.kind] if counts(name)}
    errors = {name: round(abs(read.degrees[name] - who.degrees[name]), 3) for name in DEGREES[who.kind] if counts(name)}
    items = [*map(float, right.values()), *map(agreement, errors.values())]
    asked = asked_facts(scene)
    held = {name: int(getattr(read.scene, name) == value) for name, value in asked.items()}
    bound = held["colour"] if "colour" in held and held.get("role") else None
    return {
        "identity": round(sum(items) / len(items), 4) if items else None,
        "prompt": round(sum(held.values()) / len(held), 4) if held else None,
        "subject": int(read.subject == wanted.subject),
        "bound": bound,
        "override": int(read.values[fixed] == wanted.override[1]) if wanted.override and fixed else None,
        "garment": None if wanted.garment is None else round(colour_distance(read.garment, wanted.garment), 1),
        "backdrop": None if wanted.backdrop is None else round(colour_distance(read.backdrop, wanted.backdrop), 1),
        "right": right,
        "errors": errors,
        "held": held,
    }
