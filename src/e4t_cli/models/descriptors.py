"""Finds the descriptor of a domain, a word that is one token of a base, in the domain's name."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any, NamedTuple, Union

from e4t_cli.errors import UsageError, printable
from e4t_cli.hub.bases import Base

if TYPE_CHECKING:
    from e4t_cli.models.text_to_image import TextToImageModel


class Vocabulary(NamedTuple):
    """The part of a `TextToImageModel` that is needed here, read without torch."""

    base: Base
    tokenizer: Any  # transformers' CLIPTokenizer, whose type differs between versions

    @classmethod
    def of_base(cls, base: Base) -> Vocabulary:
        """Read the tokenizer of a base on this machine."""
        from transformers import CLIPTokenizer

        return cls(base, CLIPTokenizer.from_pretrained(base.folder / "tokenizer", local_files_only=True))


Model = Union["TextToImageModel", Vocabulary]

# Of a folder's or domain's name: they do not describe the images.
_STOP_WORDS = """
a an and any data dataset domain e4t for from image images in me mine my new of on our ours photo
photos pic pics picture pictures set some test the their train training with your yours
"""


def choose_descriptor(name: str, model: Model) -> str:
    """Return the longest word of a domain's name that is one token of the base.

    Of each word the form in the name is tried first, then its singular: "my_dogs" gives "dogs" if the base has a token
    for it, else "dog".

    Raises:
        UsageError: there is none; the hint lists similar words.
    """
    words = [word for word in re.split(r"[^a-z]+", name) if word and word not in _STOP_WORDS.split()]
    for word in sorted(words, key=len, reverse=True):
        for form in (word, *_singulars(word)):
            if len(form) > 1 and _token_count(model, form) == 1:
                return form
    raise UsageError(
        f"no word of {name!r} is one token to the base {model.base.name}",
        hint=f"name them: --descriptor WORD{_like(words, model)}",
    )


def check_descriptor(word: str, model: Model) -> str:
    """Return the user's descriptor; `UsageError` lists other words if it is not one token."""
    if (count := _token_count(model, word)) != 1:
        raise UsageError(
            f"the descriptor {printable(word)!r} is {count} tokens to the base {model.base.name}; it has to be one",
            hint=f"a more common word will do{_like(re.split(r'[^a-z]+', word.lower()), model)}",
        )
    return word


def _singulars(word: str) -> list[str]:
    """Return the possible singulars of a plural: dogs, boxes, ponies, wolves, mice …"""
    irregular = {"people": "person", "men": "man", "women": "woman", "children": "child"}
    irregular |= {"mice": "mouse", "geese": "goose", "feet": "foot", "teeth": "tooth"}
    found = [irregular[word]] if word in irregular else []
    for ending, singular in (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", "")):
        if word.endswith(ending) and not word.endswith("ss"):
            found.append(word.removesuffix(ending) + singular)
    return sorted(found, key=len, reverse=True)


def _token_count(model: Model, word: str) -> int:
    return len(model.tokenizer(word, add_special_tokens=False, verbose=False).input_ids)


def _like(words: list[str], model: Model) -> str:
    """Return ", such as …": similar words that are one token of the base."""
    vocabulary = model.tokenizer.get_vocab()
    known = [token.removesuffix("</w>") for token in vocabulary if re.fullmatch("[a-z]{3,}</w>", token)]
    near: list[str] = []
    for word in sorted(filter(None, words), key=len, reverse=True):
        near += [form for form in _singulars(word) if form in known]
        near += difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    common = [word for word in ("face", "person", "cat", "dog", "art") if word in known]
    chosen = [word for word in dict.fromkeys([*near, *common]) if _token_count(model, word) == 1][:4]
    return f", such as {', '.join(chosen)}" if chosen else ""
