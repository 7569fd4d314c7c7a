"""Prompts in which one word's embedding is given from outside (section 3.1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from e4t_cli.errors import UsageError
from e4t_cli.prompts import Prompt


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """Tokenised prompts.

    Args:
        ids: token ids, padded (batch, length); the descriptor's id stands for the concept.
        placeholder: where the concept stands (batch, length), bool.
        dropped: for each prompt the text that did not fit, "" for none.
    """

    ids: Tensor
    placeholder: Tensor
    dropped: tuple[str, ...] = ()

    def __getitem__(self, index: Tensor | slice) -> Tokens:
        return Tokens(ids=self.ids[index], placeholder=self.placeholder[index])


def tokenize_prompts(
    tokenizer: CLIPTokenizer, prompts: Sequence[Prompt | str], descriptor_id: int, length: int
) -> Tokens:
    """Tokenise prompts around their placeholders, whose positions are thereby known.

    Args:
        prompts: parsed prompts, or plain text without a placeholder.
        descriptor_id: the token to stand where the concept does.
        length: of every row, the first and the last token among them.

    Raises:
        UsageError: a prompt is so long that its placeholder is never read.
    """
    room = length - 2
    ids, places, dropped = [], [], []
    for prompt in prompts:
        words: list[int] = []
        concept: list[bool] = []
        for segment in (prompt,) if isinstance(prompt, str) else prompt.segments:
            if segment is None:
                found = [descriptor_id]
            else:
                found = tokenizer(segment, add_special_tokens=False, verbose=False).input_ids
            words += found
            concept += [segment is None] * len(found)
        if any(concept) and not any(concept[:room]):
            raise UsageError(
                f"the prompt is {len(words)} tokens long, this base reads {room}, and the "
                "placeholder comes after them",
                hint="shorten the prompt, or name the concept earlier",
            )
        dropped.append(tokenizer.decode(words[room:]).strip())
        words, concept = words[:room], concept[:room]
        padding = room - len(words)
        ids.append(
            [tokenizer.bos_token_id, *words, tokenizer.eos_token_id]
            + [tokenizer.pad_token_id] * padding
        )
        places.append([False, *concept, False] + [False] * padding)
    return Tokens(ids=torch.tensor(ids), placeholder=torch.tensor(places), dropped=tuple(dropped))


@contextmanager
def inject_embeddings(table: nn.Module, placeholder: Tensor, e_c: Tensor | None) -> Iterator[None]:
    """Let a text encoder's token table answer e_c at every placeholder inside a `with` block.

    A hook on the table rather than a new row in it: every prompt of a batch has an embedding of
    its own, gradients reach it, and nothing about the text encoder's inside is assumed, which
    differs between versions of transformers.

    Args:
        placeholder: where (batch, length), bool.
        e_c: one embedding a prompt (batch, embedding_width); None leaves the descriptor's.
    """
    if e_c is None:
        yield
        return

    def replace(table: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return torch.where(placeholder[..., None], e_c[:, None].to(output.dtype), output)

    handle = table.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
