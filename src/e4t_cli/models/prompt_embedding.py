"""Tokenizes prompts and injects the concept's embedding at their placeholders (section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from e4t_cli.errors import UsageError
from e4t_cli.prompts import Prompt

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """Tokenized prompts."""

    ids: Tensor  # token ids, padded (batch, length); the descriptor's id stands for the concept
    placeholder: Tensor  # where the concept stands (batch, length), bool
    dropped: tuple[str, ...] = ()  # for each prompt the text that did not fit, "" for none

    def __getitem__(self, index: Tensor | slice) -> Tokens:
        return Tokens(ids=self.ids[index], placeholder=self.placeholder[index])


def tokenize_prompts(
    tokenizer: CLIPTokenizer, prompts: Sequence[Prompt | str], descriptor_id: int, *, length: int, device: torch.device
) -> Tokens:
    """Tokenize prompts segment by segment, so that the placeholders' positions are known.

    Args:
        prompts: parsed prompts, or plain text without a placeholder.
        descriptor_id: the token at the placeholders; its embedding is e_domain.
        length: of every row, including the first and the last token.

    Raises:
        UsageError: a prompt is so long that its placeholder is never read.
    """
    room = length - 2
    ids, placeholders, dropped = [], [], []
    for prompt in prompts:
        tokens: list[int] = []
        concept: list[bool] = []
        for segment in (prompt,) if isinstance(prompt, str) else prompt.segments:
            if segment is None:
                found = [descriptor_id]
            else:
                found = tokenizer.encode(segment, add_special_tokens=False, verbose=False)
            tokens += found
            concept += [segment is None] * len(found)
        if any(concept) and not any(concept[:room]):
            count = f"the prompt is {len(tokens)} tokens long, this base reads {room}"
            hint = "shorten the prompt, or name the concept earlier"
            raise UsageError(f"{count}, and the placeholder comes after them", hint=hint)
        dropped.append(str(tokenizer.decode(tokens[room:])).strip())
        tokens, concept = tokens[:room], concept[:room]
        padding = room - len(tokens)
        ids.append([tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id] + [tokenizer.pad_token_id] * padding)
        placeholders.append([False, *concept, False] + [False] * padding)
    return Tokens(
        ids=torch.tensor(ids, device=device),
        placeholder=torch.tensor(placeholders, device=device),
        dropped=tuple(dropped),
    )


class _InjectedTable(nn.Module):
    """A token table that returns `e_c` at the placeholders."""

    def __init__(self, table: nn.Module, placeholder: Tensor, e_c: Tensor) -> None:
        super().__init__()
        self.table, self.placeholder, self.e_c = table, placeholder, e_c

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.table(ids)
        return torch.where(self.placeholder[..., None], self.e_c[:, None].to(found.dtype), found)


def with_embedding(text_encoder: CLIPTextModel, placeholder: Tensor, e_c: Tensor) -> CLIPTextModel:
    """Return a text encoder that shares all layers and returns `e_c` at every placeholder.

    Only the modules between the text encoder and its token table are copied, shallowly: nothing of the shared text
    encoder changes, so threads can use it at once, each prompt of a batch has an embedding of its own, and gradients
    reach it. Where the table is in the text encoder differs between versions of transformers and is looked up.

    Args:
        placeholder: where (batch, length), bool.
        e_c: one embedding for each prompt (batch, embedding_width).
    """
    table = text_encoder.get_input_embeddings()
    path = next(path for path, module in text_encoder.named_modules() if module is table)
    *parents, name = path.split(".")
    copied = _shallow_copy(text_encoder)
    parent: nn.Module = copied
    for step in parents:
        parent._modules[step] = _shallow_copy(parent.get_submodule(step))
        parent = parent.get_submodule(step)
    parent._modules[name] = _InjectedTable(table, placeholder, e_c)
    return copied


def _shallow_copy(module: Module) -> Module:
    """Return a module with the same parameters and submodules, in a dictionary of its own."""
    copied = object.__new__(type(module))
    copied.__dict__.update(module.__dict__)
    copied.__dict__["_modules"] = dict(module._modules)
    return copied
