"""The tokenizer and the text encoder of `mini`, and captions whose attributes are folded into the subject's word."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mini_world.captions import Caption, all_words

LENGTH = 40
WIDTH = 160
END_OF_WORD = "</w>"


def _byte_letters() -> list[str]:
    """The 256 printable letters that byte-level BPE writes bytes with (the convention of GPT-2 and CLIP)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in plain]
    letters += [chr(256 + k) for k in range(256 - len(plain))]
    return letters


def _merge(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    while len(pieces) > 1:
        pairs = [(ranks.get(pair, 1 << 30), k) for k, pair in enumerate(zip(pieces, pieces[1:], strict=False))]
        rank, k = min(pairs)
        if rank == 1 << 30:
            break
        pieces = [*pieces[:k], pieces[k] + pieces[k + 1], *pieces[k + 2 :]]
    return pieces


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write and load a byte-pair tokenizer in which every word of the drawn world is one token.

    Words are added one by one; each adds, at the end of the ranks, just the merges that it still needs, so that no later
    word changes how an earlier one is split. Any other word falls apart into shorter pieces.
    """
    letters = _byte_letters()
    ranks: dict[tuple[str, str], int] = {}
    vocabulary = letters + [letter + END_OF_WORD for letter in letters]
    for word in all_words():
        pieces = _merge([*word[:-1], word[-1] + END_OF_WORD], ranks)
        while len(pieces) > 1:
            ranks[(pieces[0], pieces[1])] = len(ranks)
            vocabulary.append(pieces[0] + pieces[1])
            pieces = _merge([*word[:-1], word[-1] + END_OF_WORD], ranks)
    vocabulary = list(dict.fromkeys(vocabulary)) + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in ranks))
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        model_max_length=LENGTH,
        unk_token="<|endoftext|>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text encoder of four layers, not trained."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        hidden_act="quick_gelu",
    )
    return CLIPTextModel(config)


class Captioner:
    """Turns captions into hidden states: tokens once per wording, folded words as sums of input embeddings."""

    def __init__(self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
        self.text_encoder = text_encoder
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._tokenizer = tokenizer
        self._ids: dict[str, list[int]] = {}
        self._folds: tuple[Tensor, Tensor, Tensor] | None = None
        text_encoder.get_input_embeddings().register_forward_hook(self._add_folded_words)

    def _word_ids(self, word: str) -> list[int]:
        if word not in self._ids:
            self._ids[word] = self._tokenizer(word, add_special_tokens=False).input_ids
        return self._ids[word]

    def _add_folded_words(self, module: torch.nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        if self._folds is None:
            return output
        rows, positions, words = self._folds
        extra = torch.zeros_like(output)
        extra = extra.index_put((rows, positions), module.weight[words].to(output.dtype), accumulate=True)
        return output + extra

    def __call__(self, captions: Sequence[Caption]) -> tuple[Tensor, Tensor]:
        """Hidden states (B, LENGTH, WIDTH) after the final norm, and each caption's state at its end token (B, WIDTH)."""
        device = self.text_encoder.device
        ids = torch.full((len(captions), LENGTH), self.eos)
        ends, folds = [], []
        for row, caption in enumerate(captions):
            tokens = [t for word in caption.text.split() for t in self._word_ids(word)][: LENGTH - 2]
            ids[row, : len(tokens) + 1] = torch.tensor([self.bos, *tokens])
            ends.append(len(tokens) + 1)
            if caption.folded:
                position = 1 + tokens.index(self._word_ids(caption.subject)[0])
                folds += [(row, position, self._word_ids(word)[0]) for word in caption.folded]
        self._folds = tuple(torch.tensor(column, device=device) for column in zip(*folds, strict=True)) if folds else None  # type: ignore[assignment]
        hidden = self.text_encoder(input_ids=ids.to(device)).last_hidden_state
        self._folds = None
        return hidden, hidden[torch.arange(len(captions)), torch.tensor(ends)]
