"""The tokenizer knows every word whole; folded words are a sum of embeddings and nothing else."""

import random

import pytest
import torch
from transformers import CLIPTokenizer

from mini_world.captions import Caption, all_words
from mini_world.data import load_drawings
from mini_world.scenes import PLACES
from mini_world.text import (
    LENGTH,
    WIDTH,
    CaptionEncoder,
    CaptionTokenizer,
    build_text_encoder,
    build_tokenizer,
    tokenize_drawings,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def caption_encoder(tokenizer, text_encoder):
    hidden_states, read = CaptionEncoder(text_encoder), CaptionTokenizer(tokenizer)
    return lambda captions: hidden_states(read(captions))


@pytest.fixture(scope="module")
def text_encoder(tokenizer):
    torch.manual_seed(0)
    encoder = build_text_encoder(tokenizer).eval().requires_grad_(False)
    with torch.no_grad():
        encoder.get_input_embeddings().weight.mul_(10)  # larger than the position embeddings
    return encoder


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_every_word_is_one_token_before_and_after_the_disk(folder, tokenizer, tmp_path):
    built = build_tokenizer(tmp_path / "again")
    words = all_words()
    tokens = [ids(tokenizer, word) for word in words]
    assert all(len(token) == 1 for token in tokens)
    assert len({token[0] for token in tokens}) == len(words)
    assert tokens == [ids(built, word) for word in words]
    assert len(tokenizer) == len(built)
    for name in ("vocab.json", "merges.txt"):
        path = folder / name
        if path.exists():
            assert path.read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert tokenizer.model_max_length == LENGTH
    assert tokenizer.decode(ids(tokenizer, "a face on the beach")).strip() == "a face on the beach"


def test_a_sentence_is_its_words(tokenizer, drawings):
    rng = random.Random(1)
    for drawing in drawings[:60]:
        text = drawing.caption(rng).text
        apart = [token for word in text.split() for token in ids(tokenizer, word)]
        assert ids(tokenizer, text) == apart
        assert len(apart) <= LENGTH - 2
    assert ids(tokenizer, "A Photo") == ids(tokenizer, "a photo")


def test_other_words_fall_apart_and_end_nothing(tokenizer):
    pieces = ids(tokenizer, "zebra")
    assert len(pieces) > 1
    assert tokenizer.eos_token_id not in pieces
    assert tokenizer.decode(pieces).strip() == "zebra"


FOLDED = Caption("a photo of my face in the snow", "face", ("curly", "pink", "round"))
PLAIN = [Caption("a cat on the beach", "cat"), Caption("", ""), Caption(FOLDED.text, "face")]


def test_folding_is_a_sum_of_word_embeddings(caption_encoder, tokenizer, text_encoder):
    (hidden, ends) = caption_encoder([FOLDED])
    table = text_encoder.get_input_embeddings().weight
    face, *others = (ids(tokenizer, word)[0] for word in ("face", *FOLDED.folded))
    own = table[face].clone()
    try:
        table[face] = own + table[others].sum(0)
        expected, expected_ends = caption_encoder([Caption(FOLDED.text, "face")])
    finally:
        table[face] = own
    torch.testing.assert_close(hidden, expected)
    torch.testing.assert_close(ends, expected_ends)
    plain, _ = caption_encoder([Caption(FOLDED.text, "face")])
    place = 1 + ids(tokenizer, FOLDED.text).index(face)
    # Attention is causal: nothing before the word depends on it.
    assert torch.equal(hidden[:, :place], plain[:, :place])
    assert (hidden[:, place:] - plain[:, place:]).abs().amax(-1).min() > 1e-3


def test_the_other_rows_of_a_batch_do_not_change(caption_encoder):
    among, _ = caption_encoder([PLAIN[0], FOLDED, *PLAIN[1:]])
    without, _ = caption_encoder([PLAIN[0], PLAIN[2], *PLAIN[1:]])
    assert torch.equal(among[[0, 2, 3]], without[[0, 2, 3]])
    assert not torch.equal(among[1], without[1])
    # No state remains.
    again, _ = caption_encoder([PLAIN[0], PLAIN[2], *PLAIN[1:]])
    assert torch.equal(again, without)


def test_folding_does_not_depend_on_word_order(caption_encoder):
    turned = Caption(FOLDED.text, "face", FOLDED.folded[::-1])
    torch.testing.assert_close(caption_encoder([FOLDED])[0], caption_encoder([turned])[0])


def test_states_are_those_of_the_encoder_and_ends_stand_at_the_end(caption_encoder, tokenizer, text_encoder):
    hidden, ends = caption_encoder(PLAIN)
    assert hidden.shape == (3, LENGTH, WIDTH)
    for row, caption in enumerate(PLAIN):
        padded = tokenizer(caption.text, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
        own = text_encoder(input_ids=padded).last_hidden_state[0]
        torch.testing.assert_close(hidden[row], own)
        assert torch.equal(ends[row], hidden[row, 1 + len(ids(tokenizer, caption.text))])


def test_every_drawing_can_be_folded(caption_encoder, drawings):
    """The subject's word is found in the text, and it is the first that reads like it."""
    rng = random.Random(6)
    captions = [drawing.caption(rng) for drawing in drawings]
    assert any(caption.folded for caption in captions)
    hidden, _ = caption_encoder(captions)
    assert hidden.isfinite().all()


def test_drawings_are_worded_in_their_order(tokenizer, tmp_path):
    """Row i · variants + k is a wording of drawing i, and says where it is."""
    drawings = load_drawings(tmp_path, "some", 40, seed=3)
    captions_per_image = tokenize_drawings(drawings, tokenizer, 3)
    assert len(captions_per_image) == 120
    for row, place in enumerate(PLACES[int(number)] for number in drawings.facts[:, 1]):
        texts = {
            tokenizer.decode(captions_per_image.ids[3 * row + k].long(), skip_special_tokens=True) for k in range(3)
        }
        for text in texts:
            said = [name for name in PLACES if name != "plain" and f" {name}" in f" {text}"]
            assert said == ([] if place == "plain" else [place])
    again = tokenize_drawings(drawings, tokenizer, 3)
    assert torch.equal(again.ids, captions_per_image.ids)
    assert torch.equal(again.folded, captions_per_image.folded)
