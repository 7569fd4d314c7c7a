r"""Weights of words: "(red hat:1.2)", "[red]", "\(plain\)"; what they do to hidden states; what a picture records."""

import copy
import json
import random
from dataclasses import replace

import pytest
import torch
from PIL import Image

from e4t_cli.errors import UsageError
from e4t_cli.images.png_metadata import GenerationRecord, png_bytes, read_metadata, read_records
from e4t_cli.models.prompt_embedding import AddedWords, emphasize, tokenize_prompts
from e4t_cli.prompt_weights import LIMIT, read_weights
from e4t_cli.prompts import parse_negative_prompt, parse_prompt

WORDS = ["red", "hat", " ", " on the ", "S*", " S* ", "beach, ", "猫", "10:30 sharp", r"\(", r"\]", r"\\", "don't "]


def weighted(text, placeholder="S*"):
    return parse_prompt(text, placeholder, require_placeholder=False).weighted()


def pairs(prompt):
    """Return each character, None for a placeholder, with its weight."""
    weights = prompt.weights or (1.0,) * len(prompt.segments)
    parts = zip(prompt.segments, weights, strict=True)
    return [(one, weight) for part, weight in parts for one in ([None] if part is None else part)]


@pytest.mark.parametrize(
    ("text", "segments", "weights"),
    [
        ("S* in a (red hat:1.2).", (None, " in a ", "red hat", "."), (1, 1, 1.2, 1)),
        ("(S* as an astronaut:1.3)", (None, " as an astronaut"), (1.3, 1.3)),
        ("((a)) [b] (c)", ("a", " ", "b", " ", "c"), (1.21, 1, 1 / 1.1, 1, 1.1)),
        ("((red:1.5) hat:2)", ("red", " hat"), (3, 2)),
        ("([a])[(b)] ([[c]])", ("ab ", "c"), (1, 1 / 1.1)),
        ("(a: 1.0 ) b", ("a b",), ()),
        ("(a:0)(b:-.5)(c:+2.)", ("a", "b", "c"), (0, -0.5, 2)),
        ("ta(ble:1.2)", ("ta", "ble"), (1, 1.2)),
        (r"\(a\) \[b\] \\ c:1 \(d:1.2\)", (r"(a) [b] \ c:1 (d:1.2)",), ()),
        (r"(9\:30:2)(a\):3)", ("9:30", "a)"), (2, 3)),
        ("(the title: a tale)", ("the title: a tale",), (1.1,)),
        ("(a:b:1.5) (a:(b))", ("a:b", " ", "a:", "b"), (1.5, 1, 1.1, 1.21)),
        ("[a|b] a:1.2 (a:S*)", ("a|b", " a:1.2 ", "a:", None), (1 / 1.1, 1, 1.1, 1.1)),
        ("（ｒｅｄ：１．２）", ("red",), (1.2,)),  # full-width characters are plain ones, here too
    ],
)  # fmt: skip
def test_weights_are_read(text, segments, weights):
    prompt = weighted(text)
    assert prompt.segments == segments
    assert prompt.weights == pytest.approx(weights)
    assert prompt.weighted() == prompt  # it keeps its text


@pytest.mark.parametrize("placeholder", ["(me)", "[v]", "<me:1.2>", ":)"])
def test_a_placeholder_is_no_bracket(placeholder):
    prompt = weighted(f"a ({placeholder} and a hat:1.2)", placeholder)
    assert prompt.segments == ("a ", None, " and a hat") and prompt.weights == (1, 1.2, 1.2)


def nested(source, depth=0):
    """Return a random prompt, its characters with their weights, and its text without the brackets' syntax."""
    written, expected = "", []
    for _ in range(source.randint(1, 4)):
        if depth < 4 and source.random() < 0.5:
            inner, found = nested(source, depth + 1)
            number = source.choice([None, None, 0, 0.5, 1, 1.3, -1])
            if not any(one is None or not one.isspace() for one, _ in found):
                inner, found = "hat", [(one, 1.0) for one in "hat"]
            if number is None and source.random() < 0.5:
                written, weight = f"{written}[{inner}]", 1 / 1.1
            elif number is None:
                written, weight = f"{written}({inner})", 1.1
            else:
                written, weight = f"{written}({inner}:{number})", number
            expected += [(one, own * weight) for one, own in found]
        else:
            word = source.choice(WORDS)
            written += word
            plain = {r"\(": "(", r"\]": "]", r"\\": "\\"}.get(word, word)
            expected += [(one, 1.0) for one in plain]
    return written, expected


def test_of_random_prompts_brackets_go_and_weights_multiply():
    source, several = random.Random(1), 0
    for _ in range(2000):
        written, expected = nested(source)
        segments, weights = read_weights((written,), "the prompt")
        weights = weights or (1.0,) * len(segments)
        found = [(one, weight) for part, weight in zip(segments, weights, strict=True) for one in part]
        assert [one for one, _ in found] == [one for one, _ in expected], written
        assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected]), written
        assert all(one != other for one, other in zip(weights, weights[1:], strict=False)), written
        several += len(set(weights)) > 3
    assert several > 100


def test_escaped_text_is_plain_text():
    """What a record does for other programs: see `GenerationRecord.parameters`."""
    source = random.Random(2)
    for _ in range(1000):
        text = "".join(source.choice(r"ab()[]\: 1.") for _ in range(source.randint(1, 30))).strip() or "a"
        parameters = replace(RECORD, prompt=text, prompt_weights=False).parameters().split("\n")[0]
        segments, weights = read_weights((parameters,), "the prompt")
        assert (segments, weights) == ((text,), ())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("S* (a", r"has a \( that is not closed"), ("S* [a", r"has a \[ that is not closed"),
        ("S* a)", r"has a \) that closes nothing"), ("S* (a]", r"has a \] that closes nothing"),
        ("S* :)", "closes nothing"), (r"S* (a\)", "not closed"),
        ("S* ()", r"without a word: \(\)"), ("S* ( :1.2)", "without a word"), ("S* [ ]", r"without a word: \[\]"),
        ("S* (hat:big)", r"no number behind a colon in brackets, :big\)"), ("S* (hat:)", "no number"),
        ("S* (hat:1,2)", "no number"), ("S* (hat:1.2.3)", "no number"), ("S* (hat:nan)", "no number"),
        ("S* (hat:1e3)", "no number"), ("S* (hat:٣)", "no number"), ("S* (hat:--1)", "no number"),
        ("S* (at 10:30)", "a weight of 30; the limit is 10"), ("S* (((a:9):9):0.1)(b:-11)", "-11; the limit"),
        (f"S* (a:{'9' * 400})", "a weight of inf"), (f"S* ((a:{'9' * 400}):0)", "a weight of nan"),
        ("S* [hat:0.5]", r"a number in square brackets, :0.5\]"), ("S* [a:b:12]", "square brackets"),
        ("S*" + "(" * 4000 + "a" + ")" * 4000, "the limit"),
    ],
)  # fmt: skip
def test_mistakes_are_named(text, words):
    with pytest.raises(UsageError, match=words) as caught:
        weighted(text)
    assert caught.value.message.startswith("the prompt 'S*") and caught.value.hint
    with pytest.raises(UsageError, match="^the negative prompt '"):
        parse_negative_prompt(text, "<me>", weights=True)
    assert parse_negative_prompt(text, "<me>").segments == (text,)


# ── tokens ──


def tokens_of(model, *prompts, **options):
    settings = {"length": 16, "device": torch.device("cpu"), **options}
    return tokenize_prompts(model.tokenizer, prompts, model.descriptor_id("face"), **settings)


def test_every_token_has_the_weight_of_its_word(model):
    tokens = tokens_of(model, weighted("a photo (of S*:1.5) with [red] hat"), parse_prompt("S* (hat)"))
    assert tokens.weights[0].tolist() == pytest.approx([1, 1, 1, 1.5, 1.5, 1, 1 / 1.1, 1] + [1] * 8)
    assert tokens.placeholder[0].nonzero().flatten().tolist() == [4]
    assert tokens.weights[1].tolist() == [1] * 16  # not read
    plain = tokens_of(model, parse_prompt("a photo of S* with red hat"))
    assert torch.equal(tokens.ids[:1], plain.ids) and plain.weights is None
    assert torch.equal(tokens[0:1].weights, tokens.weights[:1])


def test_a_weight_of_one_leaves_no_trace(model):
    for text in ("a (red:1.0) hat on S*", "[(a red)] (hat:1) on (S*:1)", r"((a red hat:1):1.00) on S*"):
        prompt, plain = weighted(text), parse_prompt("a red hat on S*")
        assert (prompt.segments, prompt.weights) == (plain.segments, ())
        assert tokens_of(model, prompt).weights is None
        assert torch.equal(tokens_of(model, prompt).ids, tokens_of(model, plain).ids)


def test_words_of_several_tokens(model):
    words = AddedWords({"anna": torch.ones(3, 4)}, first=len(model.tokenizer))
    tokens = tokens_of(model, weighted("S* (with anna:2) hat"), words=words)
    assert tokens.weights[0].tolist() == [1, 1, 2, 2, 2, 2, 1, 1] + [1] * 8


def test_weights_of_tokens_that_do_not_fit_go_with_them(model):
    several, late = weighted("S* (" + "red " * 11 + ":2) (hat hat hat:3) dog"), weighted("S* " * 14 + "(a:2)")
    tokens = tokens_of(model, several, late)
    assert tokens.weights[0].tolist() == [1, 1] + [2] * 11 + [3] * 2 + [1]
    assert tokens.dropped == ("hat dog", "a")
    assert tokens.weights[1].tolist() == [1] * 16


# ── hidden states ──


@pytest.fixture
def shifted(model, monkeypatch):
    """The tiny base with hidden states whose mean is not 0, as those of Stable Diffusion."""
    text_encoder = copy.deepcopy(model.text_encoder)
    bias = next(value for name, value in text_encoder.named_parameters() if name.endswith("final_layer_norm.bias"))
    torch.nn.init.constant_(bias, 0.2)
    monkeypatch.setattr(model, "text_encoder", text_encoder)
    return model


def test_emphasis_by_its_formula(shifted):
    model = shifted
    prompt = weighted("a photo of (S*:1.4) on [the beach]")
    tokens = tokens_of(model, prompt)
    e_c = torch.randn(1, model.text_encoder.config.hidden_size, generator=torch.Generator().manual_seed(1))
    plain = model.embed_prompts(replace(tokens, weights=None), e_c)[0].tolist()
    rows = [[value * weight for value in row] for row, weight in zip(plain, tokens.weights[0].tolist(), strict=True)]
    before, after = (sum(map(sum, one)) for one in (plain, rows))
    expected = [[value * before / after for value in row] for row in rows]
    assert abs(before / after - 1) > 0.01
    torch.testing.assert_close(model.embed_prompts(tokens, e_c)[0], torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_emphasis_keeps_the_mean_of_each_prompt():
    source = torch.Generator().manual_seed(2)
    text, weights = torch.randn(4, 7, 5, generator=source) + 1, torch.rand(4, 7, generator=source) + 0.5
    weights[3] = 1
    found = emphasize(text, weights)
    torch.testing.assert_close(found.mean((1, 2)), text.mean((1, 2)))
    for index in range(4):
        assert torch.equal(found[index : index + 1], emphasize(text[index : index + 1], weights[index : index + 1]))
    assert torch.equal(found[3], text[3])
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(emphasize(text.to(dtype), torch.ones(4, 7)), text.to(dtype))


def test_where_the_mean_is_no_measure_it_is_not_restored():
    ones, half = torch.ones(1, 2, 3), torch.tensor([[1.0, -1.0]])
    assert emphasize(ones, half).tolist() == [[[1.0] * 3, [-1.0] * 3]]  # a mean of 0 cannot be restored
    assert torch.equal(emphasize(ones, torch.zeros(1, 2)), torch.zeros(1, 2, 3))
    assert emphasize(ones, torch.tensor([[1.0, -3.0]]))[0, 0, 0] == 1  # nor one of another sign
    nothing = torch.tensor([[[1.0, -1.0], [2.0, -2.0]]])
    assert torch.equal(emphasize(nothing, torch.tensor([[1.0, 2.0]]))[0, 1], torch.tensor([4.0, -4.0]))
    assert emphasize(ones, torch.full((1, 2), LIMIT)).tolist() == pytest.approx(ones.numpy())


# ── records ──

RECORD = GenerationRecord(
    prompt="S* (red:1.2)", seed=1, steps=2, guidance=1.0, scheduler="ddim", width=8, height=8, prompt_weights=True
)


def test_a_record_says_whether_brackets_are_weights():
    for record in (RECORD, replace(RECORD, prompt_weights=False)):
        data = png_bytes(Image.new("RGB", (8, 8)), record)
        assert read_records(data) == [record]
        assert ("prompt_weights" in read_metadata(data).details) == record.prompt_weights
    with pytest.raises(Exception, match="prompt_weights is of the wrong type"):
        GenerationRecord.from_dict({**json.loads(json.dumps(RECORD.as_dict())), "prompt_weights": 1})


def test_for_other_programs_brackets_are_weights_only_if_they_were():
    negative = replace(RECORD, negative_prompt=r"[red] \o")
    assert negative.parameters().startswith("S* (red:1.2)\nNegative prompt: [red] \\o\n")
    plain = replace(negative, prompt_weights=False)
    assert plain.parameters().startswith("S* \\(red:1.2\\)\nNegative prompt: \\[red\\] \\\\o\n")
