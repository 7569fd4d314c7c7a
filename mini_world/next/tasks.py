"""What methods and the base are asked for: prompts with their scenes, overridden attributes, plain words, and single words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from mini_world.next.identities import ATTRIBUTES, DEGREES, Identity
from mini_world.next.scenes import COLOURED_ROLES, FRAMINGS, MEDIA, PLACES, ROLES
from mini_world.next.scores import Reading
from mini_world.next.world import Scene


@dataclass(frozen=True)
class Task:
    """One prompt and what it asks for.

    about: "prompt", "override" (an attribute against the photo) or "class" (the plain word, without the concept).
    thing: what a style is asked for.
    """

    prompt: str
    scene: Scene = Scene()
    thing: str | None = None
    about: str = "prompt"
    override: tuple[str, str] | None = None


SUBJECT_PROMPTS = (
    Task("a photo of S* on the beach", Scene(place="beach")),
    Task("S* in the city", Scene(place="city")),
    Task("S* as an astronaut", Scene(role="astronaut")),
    Task("S* wearing a crown in the forest", Scene(role="crown", place="forest")),
    Task("a photo of S* wearing a red hat", Scene(role="hat", colour="red")),
    Task("S* wearing a blue scarf in the snow", Scene(role="scarf", colour="blue", place="snow")),
    Task("a pencil sketch of S*", Scene(medium="sketch")),
    Task("an oil painting of S* on the beach", Scene(medium="oil", place="beach")),
    Task("pixel art of S*", Scene(medium="pixel")),
    Task("a close-up of S* in space", Scene(framing="close", place="space")),
)
ART_PROMPTS = (
    Task("a tree in the style of S*", Scene(), "tree"),
    Task("a house in the style of S*", Scene(), "house"),
    Task("a boat in the style of S* on the beach", Scene(place="beach"), "boat"),
    Task("a mountain in the style of S* in the snow", Scene(place="snow"), "mountain"),
    Task("a flower in the style of S*", Scene(), "flower"),
    Task("a house in the style of S* in the forest", Scene(place="forest"), "house"),
    Task("a tree in the style of S* in the city", Scene(place="city"), "tree"),
    Task("a close-up of a flower in the style of S*", Scene(framing="close"), "flower"),
)
# The first value that the identity does not have is asked for.
OVERRIDES: dict[str, dict[str, tuple[str, str]]] = {
    "face": {
        "hair_colour": ("pink", "green"),
        "glasses": ("none", "sunglasses"),
        "beard": ("none", "beard"),
        "hair_style": ("long", "short"),
        "mouth": ("smiling", "serious"),
    },
    "cat": {"collar": ("none", "red"), "fur": ("white", "black"), "eyes": ("azure", "jade"), "ears": ("pointed", "folded")},
    "dog": {"collar": ("none", "red"), "fur": ("white", "black"), "ears": ("pointed", "floppy"), "muzzle": ("long", "short")},
    "art": {},
}
CLASS_PICTURES = 4


def prompts_of(kind: str) -> tuple[Task, ...]:
    """The prompts that every method is evaluated on."""
    return ART_PROMPTS if kind == "art" else SUBJECT_PROMPTS


def overrides_of(who: Identity) -> tuple[Task, ...]:
    """Prompts that ask for attributes which the identity does not have, such as "S* with pink hair"."""
    tasks = []
    for name, values in OVERRIDES[who.kind].items():
        value = values[who[name] == values[0]]
        tasks.append(Task(f"a photo of S* {attribute_phrase(who.kind, name, value)}", about="override", override=(name, value)))
    return tuple(tasks)


def class_tasks(kind: str, word: str) -> tuple[Task, ...]:
    """The plain word of a domain, without the concept, several times."""
    if kind == "art":
        return tuple(Task(f"a {t.thing} in the style of {word}", t.scene, t.thing, "class") for t in ART_PROMPTS[:CLASS_PICTURES])
    return (Task(f"a photo of a {word}", about="class"),) * CLASS_PICTURES


def attribute_phrase(kind: str, name: str, value: str) -> str:
    """An attribute's value as the end of a prompt: "with pink hair", "without glasses"."""
    from mini_world.next.words import phrases_of

    phrase = phrases_of(kind, name, value)[0]
    if not phrase.startswith("no "):
        return f"with {phrase}"
    noun = phrase.removeprefix("no ")
    return f"without {noun}" if noun.endswith("s") else f"without a {noun}"


@dataclass(frozen=True)
class Word:
    """One word or phrase that the base is asked for, and what its image must show.

    group: "place", "role", …, or "attribute". facts: parts of the scene; attribute: name and value; degree: name and side (±1).
    """

    kind: str
    group: str
    prompt: str
    facts: Mapping[str, str] = field(default_factory=dict)
    attribute: tuple[str, str] | None = None
    degree: tuple[str, int] | None = None

    def right(self, read: Reading) -> bool:
        """Whether the image shows what the word says; the subject is not counted."""
        if any(getattr(read.scene, name) != value for name, value in self.facts.items() if name != "colour"):
            return False
        if self.attribute is not None:
            name, value = self.attribute
            worn = name != "frame" or read.values["glasses"] in ("round", "square")
            return worn and read.values[name] == value
        return self.degree is None or read.degrees[self.degree[0]] * self.degree[1] > 0

    def bound(self, read: Reading) -> bool | None:
        """Whether the colour of a hat or scarf is right; None without a colour, or without the hat or scarf."""
        if "colour" not in self.facts or read.scene.role != self.facts["role"]:
            return None
        return read.scene.colour == self.facts["colour"]


def base_words(kind: str) -> Iterator[Word]:
    """Every word of the context, of colours, attributes and framings for subjects of one kind; "art" has attributes only."""
    from mini_world.next import words

    if kind == "art":
        subject = "a tree in the style of art"
    else:
        subject = f"a {kind}"
        for place in PLACES[1:]:
            yield Word(kind, "place", f"a photo of {subject} {words.PLACE_PHRASES[place][0]}", {"place": place})
        for role in ROLES[1:]:
            if role == "astronaut":
                yield Word(kind, "role", f"{subject} {words.ASTRONAUT_PHRASES[0]}", {"role": role})
            for colour in ("red", "blue", "green", "yellow") if role in COLOURED_ROLES else ():
                wearing = f"{subject} wearing {words.GARMENTS[role].format(colour)}"
                yield Word(kind, "role", wearing, {"role": role, "colour": colour})
            if role == "crown":
                yield Word(kind, "role", f"{subject} wearing {words.GARMENTS[role]}", {"role": role})
        for medium in MEDIA[1:]:
            noun = words.MEDIUM_NOUNS[medium][0]
            article = {"oil": "an ", "pixel": ""}.get(medium, "a ")
            yield Word(kind, "medium", f"{article}{noun} of {subject}", {"medium": medium})
        for framing in FRAMINGS[1:]:
            prompt = f"a close-up of {subject}" if framing == "close" else f"a photo of {subject} from afar"
            yield Word(kind, "framing", prompt, {"framing": framing})
    for name, values in ATTRIBUTES[kind].items():
        for value in values:
            yield Word(kind, "attribute", f"{subject} {attribute_phrase(kind, name, value)}", attribute=(name, value))
    for name in DEGREES[kind]:
        for side in (-1, 1):
            yield Word(kind, "degree", f"{subject} with {words.degree_phrase(kind, name, side)}", degree=(name, side))
