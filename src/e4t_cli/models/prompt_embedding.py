"""Tokenizes prompts and injects the concept's embedding at their placeholders (section 3.1).

Words of textual inversions are tokens behind the text encoder's table, which itself stays as it is.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from e4t_cli.errors import UsageError
from e4t_cli.prompts import Prompt, word_rule

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """Tokenized prompts."""

    ids: Tensor  # token ids, padded (batch, length); the descriptor's id stands for the concept
    placeholder: Tensor  # where the concept stands (batch, length), bool
    dropped: tuple[str, ...] = ()  # for each prompt the text that did not fit, "" for none
    weights: Tensor | None = None  # of the tokens' hidden states (batch, length); None: all are 1

    def __getitem__(self, index: Tensor | slice) -> Tokens:
        weights = None if self.weights is None else self.weights[index]
        return Tokens(ids=self.ids[index], placeholder=self.placeholder[index], weights=weights)


@dataclass(frozen=True, eq=False)
class AddedWords:
    """Words with embeddings of their own, one or several in a row: textual inversions.

    Args:
        vectors: of each word (tokens, embedding_width).
        first: the id of the first of them: the size of the text encoder's table.
    """

    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    first: int = 0

    def __bool__(self) -> bool:
        return bool(self.vectors)

    @cached_property
    def _rules(self) -> list[tuple[str, re.Pattern[str], list[int]]]:
        found, start = [], self.first
        for word, vectors in self.vectors.items():
            found.append((word, word_rule(word), list(range(start, start + len(vectors)))))
            start += len(vectors)
        return sorted(found, key=lambda rule: -len(rule[0]))  # of two that begin alike, the longer one is meant

    def split(self, text: str) -> Iterator[tuple[str, list[int] | None]]:
        """Yield the pieces of a text: each word with its ids, and what is between them with None."""
        matches = ((rule.search(text), word, ids) for word, rule, ids in self._rules)
        found = [(match.start(), match.end(), word, ids) for match, word, ids in matches if match]
        if not found:
            yield text, None
            return
        start, end, word, ids = min(found, key=lambda one: one[0])
        yield text[:start], None
        yield word, ids
        yield from self.split(text[end:])

    def without(self, text: str) -> str:
        """Return a text without these words."""
        return " ".join(piece for piece, ids in self.split(text) if ids is None)

    def found_in(self, text: str) -> set[str]:
        """Return those of the words that a text has."""
        return {piece for piece, ids in self.split(text) if ids is not None}

    def decode(self, tokenizer: CLIPTokenizer, ids: Sequence[int]) -> str:
        """Return the text of tokens, some of which may be these words'."""
        names = {one: word for word, _, own in self._rules for one in own}
        runs = itertools.groupby(ids, key=names.get)
        return " ".join(word or str(tokenizer.decode(list(some))).strip() for word, some in runs)

    def attached(self, text_encoder: CLIPTextModel) -> CLIPTextModel:
        """Return a text encoder that shares all layers and knows the words' ids."""
        if not self.vectors:
            return text_encoder
        table = torch.cat(list(self.vectors.values()))
        return _with_table(text_encoder, lambda known: _LongerTable(known, self.first, table))


NO_WORDS = AddedWords()


def tokenize_prompts(
    tokenizer: CLIPTokenizer, prompts: Sequence[Prompt | str], descriptor_id: int, *, length: int,
    device: torch.device, words: AddedWords = NO_WORDS,
) -> Tokens:  # fmt: skip
    """Tokenize prompts segment by segment, so that the placeholders' positions are known.

    Args:
        prompts: parsed prompts, or plain text without a placeholder.
        descriptor_id: the token at the placeholders; its embedding is e_domain.
        length: of every row, including the first and the last token.
        words: that are tokens of their own.

    Segments of different weights are segments, so a weight that begins inside a word cuts the word; see
    `prompt_weights.read_weights`. The weights of tokens that do not fit are dropped with them.

    Raises:
        UsageError: a prompt is so long that its placeholder is never read.
    """
    room = length - 2
    ids, placeholders, dropped, weights = [], [], [], []
    for prompt in prompts:
        tokens: list[int] = []
        concept: list[bool] = []
        own_weights: list[float] = []
        segments = (prompt,) if isinstance(prompt, str) else prompt.segments
        given = () if isinstance(prompt, str) else prompt.weights
        for segment, weight in zip(segments, given or [1.0] * len(segments), strict=True):
            if segment is None:
                tokens.append(descriptor_id)
            for piece, own in words.split(segment or ""):
                tokens += own or tokenizer.encode(piece, add_special_tokens=False, verbose=False)
            concept += [segment is None] * (len(tokens) - len(concept))
            own_weights += [weight] * (len(tokens) - len(own_weights))
        if any(concept) and not any(concept[:room]):
            count = f"the prompt is {len(tokens)} tokens long, this base reads {room}"
            hint = "shorten the prompt, or name the concept earlier"
            raise UsageError(f"{count}, and the placeholder comes after them", hint=hint)
        dropped.append(words.decode(tokenizer, tokens[room:]))
        tokens, concept = tokens[:room], concept[:room]
        padding = room - len(tokens)
        ids.append([tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id] + [tokenizer.pad_token_id] * padding)
        placeholders.append([False, *concept, False] + [False] * padding)
        weights.append([1.0, *own_weights[:room], 1.0] + [1.0] * padding)
    return Tokens(
        ids=torch.tensor(ids, device=device),
        placeholder=torch.tensor(placeholders, device=device),
        dropped=tuple(dropped),
        weights=torch.tensor(weights, device=device) if any(one != 1 for row in weights for one in row) else None,
    )


def emphasize(text: Tensor, weights: Tensor) -> Tensor:
    """Return hidden states times the weights of their tokens, scaled to the mean they had before.

    Departure: the paper has no weights. This is AUTOMATIC1111's "Original" emphasis, with the mean of each prompt by
    itself, so that a prompt does not depend on the others of its batch. Where a factor beyond 0.1 to 10 restores the
    mean, which no weight explains, the mean was close to zero, and the hidden states are not scaled: its "No norm".

    Args:
        text: hidden states (batch, length, width).
        weights: (batch, length).
    """
    before = text.float()
    after = before * weights[..., None]
    factor = before.mean((1, 2), keepdim=True) / after.mean((1, 2), keepdim=True)
    usable = (factor >= 0.1) & (factor <= 10)  # and not NaN; no branch, which would synchronize
    return (after * torch.where(usable, factor, 1.0)).to(text.dtype)


class _InjectedTable(nn.Module):
    """A token table that returns `e_c` at the placeholders."""

    def __init__(self, table: nn.Module, placeholder: Tensor, e_c: Tensor) -> None:
        super().__init__()
        self.table, self.placeholder, self.e_c = table, placeholder, e_c

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.table(ids)
        return torch.where(self.placeholder[..., None], self.e_c[:, None].to(found.dtype), found)


class _LongerTable(nn.Module):
    """A token table with more rows behind its own."""

    def __init__(self, table: nn.Module, first: int, more: Tensor) -> None:
        super().__init__()
        self.table, self.first, self.more = table, first, more

    def forward(self, ids: Tensor) -> Tensor:
        known: Tensor = self.table(ids.clamp(max=self.first - 1))
        added = self.more[(ids - self.first).clamp(min=0)].to(known.dtype)
        return torch.where((ids >= self.first)[..., None], added, known)


def with_embedding(text_encoder: CLIPTextModel, placeholder: Tensor, e_c: Tensor) -> CLIPTextModel:
    """Return a text encoder that shares all layers and returns `e_c` at every placeholder.

    Only the modules between the text encoder and its token table are copied, shallowly: nothing of the shared text
    encoder changes, so threads can use it at once, each prompt of a batch has an embedding of its own, and gradients
    reach it. Where the table is in the text encoder differs between versions of transformers and is looked up.

    Args:
        placeholder: where (batch, length), bool.
        e_c: one embedding for each prompt (batch, embedding_width).
    """
    return _with_table(text_encoder, lambda table: _InjectedTable(table, placeholder, e_c))


def _with_table(text_encoder: CLIPTextModel, change: Callable[[nn.Module], nn.Module]) -> CLIPTextModel:
    table = text_encoder.get_input_embeddings()
    path = next(path for path, module in text_encoder.named_modules() if module is table)
    *parents, name = path.split(".")
    copied = _shallow_copy(text_encoder)
    parent: nn.Module = copied
    for step in parents:
        parent._modules[step] = _shallow_copy(parent.get_submodule(step))
        parent = parent.get_submodule(step)
    parent._modules[name] = change(table)
    return copied


def _shallow_copy(module: Module) -> Module:
    """Return a module with the same parameters and submodules, in a dictionary of its own."""
    copied = object.__new__(type(module))
    copied.__dict__.update(module.__dict__)
    copied.__dict__["_modules"] = dict(module._modules)
    return copied
