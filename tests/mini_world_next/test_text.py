"""Every word is one token; folded words are a weighted sum; the text encoder learns what captions say."""

import json
import random
import re

import numpy
import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from mini_world.next import read_out
from mini_world.next.captions import MAXIMUM_TOKENS, Caption, write_caption
from mini_world.next.clip import (
    ABSENT,
    DEGREE_HEADS,
    HEADS,
    attribute_targets,
    build_heads,
    build_tower,
    class_tokens,
    degree_loss,
    degree_targets,
    probe,
    train_tower,
)
from mini_world.next.data import load_drawings
from mini_world.next.scenes import PLACES
from mini_world.next.text import (
    LENGTH,
    MAXIMUM_FOLDED,
    NO_WORD,
    WIDTH,
    CaptionEncoder,
    CaptionTokenizer,
    TokenizedCaptions,
    build_text_encoder,
    build_tokenizer,
    tokenize_drawings,
)
from mini_world.next.words import IDENTIFIERS, all_words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def text_encoder(tokenizer):
    torch.manual_seed(0)
    encoder = build_text_encoder(tokenizer).eval().requires_grad_(False)
    with torch.no_grad():
        encoder.get_input_embeddings().weight.mul_(10)  # larger than the position embeddings
    return encoder


@pytest.fixture(scope="module")
def caption_encoder(tokenizer, text_encoder):
    hidden_states, read = CaptionEncoder(text_encoder), CaptionTokenizer(tokenizer)
    return lambda captions: hidden_states(read(captions))


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    return load_drawings(tmp_path_factory.mktemp("drawings"), "some", 24, processes=1, seed=3)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_every_word_is_one_token_before_and_after_the_disk(folder, tokenizer):
    words = all_words()
    tokens = [ids(tokenizer, word) for word in words]
    assert all(len(token) == 1 for token in tokens)
    assert len({token[0] for token in tokens}) == len(words)
    assert set(IDENTIFIERS) <= set(words)
    assert tokenizer.model_max_length == LENGTH
    assert tokenizer.decode(ids(tokenizer, "a face on the beach")).strip() == "a face on the beach"
    assert len(ids(tokenizer, "zebra")) > 1


def test_the_folder_has_the_files_of_clip(folder, tokenizer):
    """diffusers' own scripts load vocab.json and merges.txt."""
    assert tokenizer.get_vocab() == json.loads((folder / "vocab.json").read_text())
    assert (folder / "merges.txt").read_text().startswith("#version")


def test_the_text_encoder_is_float32_on_disk_too(text_encoder, tmp_path):
    text_encoder.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    loaded = CLIPTextModel.from_pretrained(tmp_path, local_files_only=True)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert loaded.config.num_hidden_layers == 4
    assert loaded.config.hidden_size == WIDTH


def test_the_longest_caption_has_its_end_token(tokenizer):
    rng, longest = random.Random(1), 0
    captions = []
    for _ in range(400):
        said = read_out.draw_statement(rng)
        captions.append(write_caption(said.subject, said.who, said.scene, rng))
    tokens = CaptionTokenizer(tokenizer)(captions)
    for row, caption in enumerate(captions):
        whole = ids(tokenizer, caption.text)
        longest = max(longest, len(whole))
        assert tokens.ids[row, 1 : len(whole) + 1].tolist() == whole
        assert tokens.ends[row] == len(whole) + 1 < LENGTH
        assert tokens.ids[row, tokens.ends[row]] == tokenizer.eos_token_id
        if caption.folded:
            assert tokens.ids[row, tokens.subjects[row]] == ids(tokenizer, caption.subject)[0]
            assert (tokens.folded[row] != NO_WORD).sum() == len(caption.folded) <= MAXIMUM_FOLDED
    assert longest > MAXIMUM_TOKENS - 4


FOLDED = Caption("a photo of my face in the snow", "face", (("curly", 1.0), ("pink", 0.9), ("broad", 0.25)))
PLAIN = [Caption("a cat on the beach", "cat"), Caption("", ""), Caption(FOLDED.text, "face")]


def test_folding_adds_weighted_word_embeddings(caption_encoder, tokenizer, text_encoder):
    (hidden, ends) = caption_encoder([FOLDED])
    table = text_encoder.get_input_embeddings().weight
    face = ids(tokenizer, "face")[0]
    own = table[face].clone()
    try:
        table[face] = own + sum(weight * table[ids(tokenizer, word)[0]] for word, weight in FOLDED.folded)
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


def test_a_larger_weight_has_a_larger_effect(caption_encoder):
    def states(weight):
        return caption_encoder([Caption(FOLDED.text, "face", (("broad", weight),))])[0]

    effects = [float((states(weight) - states(0.0)).norm()) for weight in (0.25, 0.5, 1.0)]
    assert 0 < effects[0] < effects[1] < effects[2]


def test_the_other_rows_of_a_batch_do_not_change(caption_encoder):
    among, _ = caption_encoder([PLAIN[0], FOLDED, *PLAIN[1:]])
    without, _ = caption_encoder([PLAIN[0], PLAIN[2], *PLAIN[1:]])
    assert torch.equal(among[[0, 2, 3]], without[[0, 2, 3]])
    assert not torch.equal(among[1], without[1])


def test_a_shortened_batch_has_the_same_states(tokenizer):
    tokens = CaptionTokenizer(tokenizer)([FOLDED, PLAIN[0]])
    encode = CaptionEncoder(build_text_encoder(tokenizer).eval())
    with torch.no_grad():
        whole, ends = encode(tokens)
        short, short_ends = encode(tokens.shortened(12))
    torch.testing.assert_close(short, whole[:, :12])
    torch.testing.assert_close(short_ends, ends)


def test_drawings_are_worded_in_their_order(tokenizer, drawings):
    tokens = tokenize_drawings(drawings, tokenizer, 3)
    assert len(tokens) == 3 * len(drawings)
    for row, place in enumerate(PLACES[int(number)] for number in drawings.facts[:, 1]):
        for k in range(3):
            text = tokenizer.decode(tokens.ids[3 * row + k].long(), skip_special_tokens=True)
            said = {name for name in PLACES[1:] if re.search(rf"\b{name}\b", text)}
            assert said == {place} - {"plain"}, text
    again = tokenize_drawings(drawings, tokenizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(vars(again).values(), vars(tokens).values(), strict=True))
    both = TokenizedCaptions.concatenate([tokens, again])
    assert len(both) == 2 * len(tokens)


# ── training ──


def test_captions_are_read_after_a_few_steps(tokenizer, tmp_path):
    """Held-out captions too are read better than by heads that did not learn."""
    torch.manual_seed(1)
    encoder = build_text_encoder(tokenizer)
    heads = read_out.train_text(tmp_path, tokenizer, encoder, steps=24, batch=16, captions=400)
    first = read_out.ReadOut()
    tokens, targets = read_out.draw_captions(tokenizer, 128, seed=77, held_out=True)
    states = CaptionEncoder(encoder.eval())
    with torch.no_grad():
        hidden, _ = states(tokens)
        losses = [read_out.read_out_loss(h(hidden, tokens.ends), targets)["words"] for h in (first, heads)]
    assert losses[1] < 0.98 * losses[0], losses
    accuracy = read_out.read_out_accuracy(states, heads, tokens, targets)
    assert {"scene.identifier", "face.glasses", "overridden", "face.width error"} <= set(accuracy)


def test_noise_is_in_training_only(tokenizer):
    heads, hidden = read_out.ReadOut(), torch.randn(2, LENGTH, WIDTH)
    ends = torch.tensor([4, 9])
    calm = [heads(hidden, ends)[1][0] for _ in range(2)]
    assert torch.equal(*calm)
    noisy = heads(hidden, ends, torch.Generator().manual_seed(1))[1][0]
    assert (noisy - calm[0]).abs().max() > 0.01


def test_word_distances_compare_position_by_position(text_encoder, tokenizer):
    phrases = read_out.measured_phrases()
    assert {*IDENTIFIERS, "blond", "in a blue hat", "on the beach"} <= set(phrases)
    encode = CaptionEncoder(text_encoder)
    found = read_out.word_distances(encode, tokenizer, {key: phrases[key] for key in ("sks", "in a blue hat")})
    sks = CaptionTokenizer(tokenizer)([Caption("a photo of a sks face", ""), Caption("a photo of a face", "")])
    (named, unnamed), _ = encode(sks)
    rest = [k for k in range(LENGTH) if k != 5]
    assert found["sks"] == pytest.approx(float((named[rest] - unnamed[:-1]).norm() / unnamed[:-1].norm()), abs=1e-3)
    assert found["in a blue hat"] > 0.01


def test_tower_targets_are_what_was_drawn(drawings):
    values, degrees = attribute_targets(drawings), degree_targets(drawings)
    for row in range(len(drawings)):
        who = drawings.identity(row)
        for (kind, name, _), value in zip(HEADS, values[row].tolist(), strict=True):
            mine = who is not None and who.kind == kind and who.visible(name)
            assert (value != ABSENT) == mine
        for (kind, name), value in zip(DEGREE_HEADS, degrees[row].tolist(), strict=True):
            mine = who is not None and who.kind == kind
            assert (value == value) == mine
            assert not mine or value == pytest.approx(who.degrees[name], abs=1e-3)


def test_degrees_that_do_not_apply_have_no_gradient():
    values = torch.zeros(3, 2, requires_grad=True)
    degree_loss(values, torch.tensor([[0.5, float("nan")]] * 3)).backward()
    assert values.grad[:, 0].abs().min() > 0
    assert values.grad[:, 1].abs().max() == 0
    assert degree_loss(values, torch.full((3, 2), float("nan"))) == 0


def test_the_tower_trains_with_a_text_encoder_that_does_not(tokenizer, drawings, tmp_path):
    torch.manual_seed(1)
    encoder = build_text_encoder(tokenizer)
    state = {key: value.clone() for key, value in encoder.state_dict().items()}
    captions = tokenize_drawings(drawings, tokenizer, 2)
    tower, heads = train_tower(tmp_path, drawings, encoder, captions, steps=3, pairs=4)
    assert all(torch.equal(state[key], value) for key, value in encoder.state_dict().items())
    tokens = class_tokens(tower, torch.zeros(2, 3, 128, 128))
    assert [tuple(token.shape) for token in tokens] == [(2, 128)] * 4
    found = probe(tower, heads, drawings)
    assert 0 <= found["retrieval"] <= 1
    assert any(name.endswith("error") for name in found)
    assert len(build_heads()["attributes"]) == 3
    assert sum(p.numel() for p in build_tower().parameters()) < 2e6
    assert numpy.isfinite(list(found.values())).all()
