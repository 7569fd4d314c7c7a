"""The tokenizer and the text encoder of `mini`, and tokenized captions with folded attributes (see captions.py)."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mini_world.next.captions import Caption, write_caption
from mini_world.next.identities import ATTRIBUTES, DEGREES
from mini_world.next.words import all_words

if TYPE_CHECKING:
    from mini_world.next.data import Drawings

LENGTH = 40
WIDTH = 160
LAYERS = 4
NO_WORD = -1
MAXIMUM_FOLDED = max(len(ATTRIBUTES[kind]) + len(DEGREES[kind]) for kind in ATTRIBUTES)
END_OF_WORD = "</w>"


def _byte_letters() -> list[str]:
    """The 256 printable characters that stand for bytes in byte-level BPE (the convention of GPT-2 and CLIP)."""
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
    """Write and load a byte-pair tokenizer in which every word of the captions is one token.

    Words are added one by one. Each appends only the merges that it still needs, so that no later word changes how an earlier
    one is split. Any other word is split into shorter tokens. The folder has vocab.json and merges.txt, which diffusers' own
    scripts load, and tokenizer.json.
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
    """A CLIP text encoder of four layers, untrained, float32 in its config too."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        hidden_act="quick_gelu",
        dtype="float32",
    )
    return CLIPTextModel(config)


@dataclass(frozen=True)
class TokenizedCaptions:
    """Tokenized captions; row i of every tensor is caption i.

    ids (N, LENGTH): token ids; ends (N,): position of the end token; subjects (N,): position of the subject's word; folded
    (N, MAXIMUM_FOLDED): token ids of the words whose embeddings are added to it, NO_WORD where there is none; weights
    (N, MAXIMUM_FOLDED): the factors of these embeddings.
    """

    ids: Tensor
    ends: Tensor
    subjects: Tensor
    folded: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows) -> TokenizedCaptions:
        return TokenizedCaptions(*(column[rows] for column in vars(self).values()))

    def to(self, device: torch.device) -> TokenizedCaptions:
        return TokenizedCaptions(*(column.to(device) for column in vars(self).values()))

    def shortened(self, length: int) -> TokenizedCaptions:
        """The same with the first `length` tokens of each; none of the captions may be longer."""
        return replace(self, ids=self.ids[:, :length])

    @staticmethod
    def concatenate(parts: Sequence[TokenizedCaptions]) -> TokenizedCaptions:
        """Concatenate several."""
        return TokenizedCaptions(*(torch.cat(columns) for columns in zip(*(vars(part).values() for part in parts), strict=True)))


class CaptionTokenizer:
    """Tokenizes captions, with a cache of the words."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._tokenizer = tokenizer
        self._ids: dict[str, list[int]] = {}

    def _word_ids(self, word: str) -> list[int]:
        if word not in self._ids:
            self._ids[word] = self._tokenizer(word, add_special_tokens=False).input_ids
        return self._ids[word]

    def __call__(self, captions: Sequence[Caption]) -> TokenizedCaptions:
        return TokenizedCaptions(*map(torch.from_numpy, self.columns(captions)))

    def columns(self, captions: Sequence[Caption]) -> tuple[numpy.ndarray, ...]:
        """The same as small arrays, which are cheap to send between processes."""
        count = len(captions)
        ids = numpy.full((count, LENGTH), self.eos, numpy.int16)
        ends, subjects = numpy.zeros(count, numpy.int16), numpy.zeros(count, numpy.int16)
        folded = numpy.full((count, MAXIMUM_FOLDED), NO_WORD, numpy.int16)
        weights = numpy.zeros((count, MAXIMUM_FOLDED), numpy.float32)
        for row, caption in enumerate(captions):
            tokens = [t for word in caption.text.split() for t in self._word_ids(word)][: LENGTH - 2]
            ids[row, 0] = self.bos
            ids[row, 1 : len(tokens) + 1] = tokens
            ends[row] = len(tokens) + 1
            if caption.folded:
                subjects[row] = 1 + tokens.index(self._word_ids(caption.subject)[0])
            for column, (word, weight) in enumerate(caption.folded):
                folded[row, column], weights[row, column] = self._word_ids(word)[0], weight
        return ids, ends, subjects, folded, weights


def caption_of(drawings: Drawings, row: int, rng: random.Random) -> Caption:
    """A random caption of drawing `row`."""
    return write_caption(drawings.subject(row), drawings.identity(row), drawings.scene(row), rng)


def tokenize_drawings(drawings: Drawings, tokenizer: CLIPTokenizer, variants: int, processes: int = 1) -> TokenizedCaptions:
    """Several captions of every drawing; drawing i has the rows i · variants … (i + 1) · variants − 1."""
    starts = range(0, len(drawings), 4000)
    parts = [drawings.select(slice(start, start + 4000)) for start in starts]
    # Without the images, which would have to be sent to the other processes.
    parts = [replace(part, images=part.images[:, :0], labels=part.labels[:, :0]) for part in parts]
    arguments = (parts, [tokenizer] * len(parts), [variants] * len(parts), starts)
    if processes > 1:
        with ProcessPoolExecutor(processes) as pool:
            columns = list(pool.map(_word_chunk, *arguments))
    else:
        columns = list(map(_word_chunk, *arguments))
    return TokenizedCaptions(*(torch.from_numpy(numpy.concatenate(rows)) for rows in zip(*columns, strict=True)))


def _word_chunk(drawings: Drawings, tokenizer: CLIPTokenizer, variants: int, start: int) -> tuple[numpy.ndarray, ...]:
    rng = random.Random(f"wordings {start}")
    captions = [caption_of(drawings, row, rng) for row in range(len(drawings)) for _ in range(variants)]
    return CaptionTokenizer(tokenizer).columns(captions)


class CaptionEncoder:
    """Encodes captions; the input embedding of a subject's word is its sum with those of the folded words, weighted."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        self.text_encoder = text_encoder
        self._captions: TokenizedCaptions | None = None
        text_encoder.get_input_embeddings().register_forward_hook(self._add_folded_words)

    def _add_folded_words(self, module: torch.nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        if self._captions is None:
            return output
        words = self._captions.folded.long()
        weights = self._captions.weights.to(output.dtype) * (words != NO_WORD)
        extra = (module.weight[words.clamp(min=0)] * weights[..., None]).sum(1).to(output.dtype)
        places = (torch.arange(len(words), device=words.device), self._captions.subjects.long())
        return output + torch.zeros_like(output).index_put(places, extra)

    def __call__(self, captions: TokenizedCaptions) -> tuple[Tensor, Tensor]:
        """Hidden states (B, length, WIDTH) after the final norm, and those at the end tokens (B, WIDTH)."""
        self._captions = captions
        try:
            hidden = self.text_encoder(input_ids=captions.ids.long()).last_hidden_state
        finally:
            self._captions = None
        return hidden, hidden[torch.arange(len(captions), device=hidden.device), captions.ends.long()]
