"""The words of captions: one for every value of an attribute, phrases for every part of the context, and neutral words."""

from __future__ import annotations

from mini_world.next.identities import ATTRIBUTES, DEGREES

SUBJECT_WORDS = ("face", "cat", "dog", "art", "tree", "house", "mountain", "boat", "flower")
# Words without a meaning, for DreamBooth: captions contain them, and no drawing depends on them.
IDENTIFIERS = ("sks", "ohwx", "zwx", "vkt", "qjp")

# The single word of a value where it is not the value itself. It is unique among the attributes of a kind, so that a sum of
# word embeddings determines the identity: "blue" alone could be hair or a frame.
_OWN_WORDS: dict[str, dict[str, str]] = {
    "glasses": {"none": "barefaced"},
    "frame": {"black": "blackrimmed", "red": "redrimmed", "blue": "bluerimmed"},
    "beard": {"none": "shaven", "moustache": "moustached", "beard": "bearded"},
    "marks": {"none": "clear", "freckles": "freckled"},
    "collar": {"none": "collarless", "red": "redcollared", "blue": "bluecollared", "green": "greencollared"},
    "nose": {"pink": "pinknosed", "dark": "darknosed"},
    "tongue": {"none": "quiet"},
    "border": {"none": "borderless"},
}

PLACE_PHRASES: dict[str, tuple[str, ...]] = {
    "plain": ("",),
    "beach": ("on the beach", "at the beach", "on a beach"),
    "snow": ("in the snow", "in snow"),
    "forest": ("in the forest", "in a forest"),
    "city": ("in the city", "in a city"),
    "space": ("in space", "in outer space"),
}
PLAIN_BACKGROUND = "on a plain background"
# Of a role, after "wearing", "in" or "with"; {} is the colour.
GARMENTS = {"crown": "a crown", "hat": "a {} hat", "scarf": "a {} scarf"}
ASTRONAUT_PHRASES = ("as an astronaut", "dressed as an astronaut")
WITHOUT_GARMENT = ("without a hat", "without a scarf", "without a crown")
# What stands between an article and "of".
MEDIUM_NOUNS: dict[str, tuple[str, ...]] = {
    "photo": ("photo", "photo", "picture", "picture", "image", "snapshot", "view", "depiction", "rendering", "portrait"),
    "sketch": ("pencil sketch", "sketch"),
    "pixel": ("pixel art", "pixel art picture"),
    "oil": ("oil painting",),
}
# After the subject; a photo is not named there.
MEDIUM_ENDS: dict[str, tuple[str, ...]] = {
    "photo": ("",),
    "sketch": (", a pencil sketch", "as a pencil sketch", ", a sketch"),
    "pixel": (", pixel art", "as pixel art", "in pixel art"),
    "oil": (", an oil painting", "as an oil painting", ", oil painting"),
}
FRAMING_ADJECTIVES = {"close": "close-up", "afar": "distant"}
FRAMING_ENDS: dict[str, tuple[str, ...]] = {
    "normal": ("",),
    "close": ("up close", ", close-up", "in close-up"),
    "afar": ("from afar", "from afar", "from far away", "far away", "in the distance"),
}
ARTICLES = ("a", "a", "a", "the", "my", "one", "this", "")
NEUTRAL_ADJECTIVES = ("good", "nice", "clean", "bright", "dark", "sharp", "blurry", "small", "large", "cropped", "cool", "weird")
NEUTRAL_FRONTS = ("here is", "this is", "the head of")
NEUTRAL_ENDS = ("looking at the camera", "looking up", "at rest", "here")
STYLE_FRONTS = ("a picture", "a painting", "a drawing", "a work", "something", "an image", "a detail")
STYLE_LINKS = ("in the style of", "in the style of", "in the style of", "in the manner of", "done as")
# Words of prompts that no caption uses; each is one token nevertheless.
FURTHER_WORDS = (
    "small large view front that person man woman animal pet made by piece example work artwork detail detailed no walking "
    "sitting standing night day mars king queen very high quality low is here at on well lit riding bicycle horse sea rain hill "
    "paris mirror dog like same sign blue red green yellow pink black white wearing dressed background"
)


def word_of(attribute: str, value: str) -> str:
    """The single word of this attribute's value."""
    return _OWN_WORDS.get(attribute, {}).get(value, value)


def degree_word(kind: str, attribute: str, degree: float) -> str:
    """The word for the side of a continuous attribute."""
    return DEGREES[kind][attribute][degree > 0]


def phrases_of(kind: str, attribute: str, value: str) -> tuple[str, ...]:
    """Noun phrases for one categorical value, after "with"; where it is an absence, those beginning with "no"."""
    if attribute == "hair_style":
        return {"bun": ("hair in a bun", "a bun"), "pigtails": ("hair in pigtails", "pigtails")}.get(value, (f"{value} hair",))
    if attribute == "glasses":
        return {"none": ("no glasses",), "sunglasses": ("sunglasses",)}.get(value, (f"{value} glasses",))
    if attribute == "frame":
        return (f"{value} glasses", f"{value} glasses", f"a {value} frame")
    if attribute == "beard":
        return ("no beard",) if value == "none" else (f"a {value}",)
    if attribute == "marks":
        return {"none": ("clear skin",), "rosy": ("rosy cheeks",), "freckles": ("freckles",)}[value]
    if attribute == "mouth":
        return {"smiling": ("a smile", "a smiling mouth"), "serious": ("a serious mouth",)}[value]
    if attribute == "collar":
        return ("no collar",) if value == "none" else (f"a {value} collar",)
    if attribute == "tongue":
        return ("no tongue",) if value == "none" else ("a panting tongue",)
    if attribute == "border":
        return ("no border",) if value == "none" else ("a framed border",)
    if attribute == "hair_colour":
        return (f"{value} hair",)
    noun = {"fur": "fur", "pattern": "coat", "dark": "shadows", "light": "lights", "stroke": "strokes"}.get(attribute, attribute)
    return (f"{value} {noun}",)


def degree_phrase(kind: str, attribute: str, degree: float) -> str:
    """The noun phrase for the side of a continuous attribute."""
    nouns = {"eye_distance": "{} eyes", "scale": "{} strokes", "width": "a {} face" if kind == "face" else "a {} head"}
    noun = nouns.get(attribute, "{} hair" if kind == "face" else "{} fur")
    return noun.format(degree_word(kind, attribute, degree))


def all_words() -> list[str]:
    """Every word of every caption, and `FURTHER_WORDS`: each is one token of the tokenizer."""
    texts = [FURTHER_WORDS, *SUBJECT_WORDS, *IDENTIFIERS, *ARTICLES, *ASTRONAUT_PHRASES, *WITHOUT_GARMENT, *NEUTRAL_ADJECTIVES]
    texts += [*NEUTRAL_FRONTS, *NEUTRAL_ENDS, *STYLE_FRONTS, *STYLE_LINKS, *GARMENTS.values(), *FRAMING_ADJECTIVES.values()]
    texts += [PLAIN_BACKGROUND, "red blue green yellow an and with without wearing in of no"]
    for table in (PLACE_PHRASES, MEDIUM_NOUNS, MEDIUM_ENDS, FRAMING_ENDS):
        texts += [phrase for phrases in table.values() for phrase in phrases]
    for kind, attributes in ATTRIBUTES.items():
        for name, values in attributes.items():
            texts += [word_of(name, value) for value in values]
            texts += [phrase for value in values for phrase in phrases_of(kind, name, value)]
        for name, words in DEGREES[kind].items():
            texts += [*words, *(degree_phrase(kind, name, side) for side in (-1.0, 1.0))]
    letters = str.maketrans({",": " ", "-": " ", "{": " ", "}": " "})
    return sorted({word for text in texts for word in text.lower().translate(letters).split()})
