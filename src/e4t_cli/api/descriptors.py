"""The everyday word for a new domain: one token of the base, found in the domain's name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable

from e4t_cli.base_model import TextToImageModel
from e4t_cli.errors import UsageError, printable

_SAY_NOTHING = {
    *(
        "a",
        "an",
        "and",
        "any",
        "data",
        "dataset",
        "domain",
        "e4t",
        "for",
        "from",
        "image",
        "images",
    ),
    *("in", "me", "mine", "my", "new", "of", "on", "our", "ours", "photo", "photos", "pic", "pics"),
    *("picture", "pictures", "set", "some", "test", "the", "their", "train", "training", "with"),
    *("your", "yours"),
}
"""Words of a folder's or domain's name that do not say what is in the pictures."""


def choose_descriptor(name: str, model: TextToImageModel) -> str:
    """Return the longest word of a domain's name that the base holds as one token.

    Of each word the name's own form is tried first, then its singular: "my_dogs" is "dogs" to a
    base that knows the plural, "dog" to one that does not.

    Raises:
        UsageError: there is none; the hint names words that are near.
    """
    words = [word for word in re.split(r"[^a-z]+", name) if word and word not in _SAY_NOTHING]
    for word in sorted(words, key=len, reverse=True):
        for form in (word, *_singulars(word)):
            if len(form) > 1 and _tokens(model)(form) == 1:
                return form
    raise UsageError(
        f"no word of {name!r} is one token to the base {model.base.name}",
        hint=f"say what they are: --descriptor WORD{_like(words, model)}",
    )


def check_descriptor(word: str, model: TextToImageModel) -> str:
    """Return a word that the user chose, if it is one token.

    Raises:
        UsageError: it is not; the hint names words that are.
    """
    count = _tokens(model)(word)
    if count == 1:
        return word
    raise UsageError(
        f"the descriptor {printable(word)!r} is {count} tokens to the base {model.base.name}; "
        "it has to be one",
        hint=f"a more common word will do{_like(re.split(r'[^a-z]+', word.lower()), model)}",
    )


def _singulars(word: str) -> list[str]:
    """Return what a plural may be the plural of: dogs, boxes, ponies, wolves, mice …"""
    irregular = {"people": "person", "men": "man", "women": "woman", "children": "child"}
    irregular |= {"mice": "mouse", "geese": "goose", "feet": "foot", "teeth": "tooth"}
    found = [irregular[word]] if word in irregular else []
    for ending, singular in (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", "")):
        if word.endswith(ending) and not word.endswith("ss"):
            found.append(word.removesuffix(ending) + singular)
    return sorted(found, key=len, reverse=True)


def _tokens(model: TextToImageModel) -> Callable[[str], int]:
    tokenizer = model.tokenizer
    return lambda word: len(tokenizer(word, add_special_tokens=False, verbose=False).input_ids)


def _like(words: list[str], model: TextToImageModel) -> str:
    """Return ", such as …": words of the base that are near, and that are one token for sure."""
    endings = [token.removesuffix("</w>") for token in model.tokenizer.get_vocab()
               if token.endswith("</w>")]  # fmt: skip
    known = [word for word in endings if len(word) > 2 and re.fullmatch("[a-z]+", word)]
    near: list[str] = []
    for word in sorted(filter(None, words), key=len, reverse=True):
        near += [form for form in _singulars(word) if form in known]
        near += difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    common = [word for word in ("face", "person", "cat", "dog", "art") if word in known]
    chosen = [word for word in dict.fromkeys([*near, *common]) if _tokens(model)(word) == 1][:4]
    return f", such as {', '.join(chosen)}" if chosen else ""
