"""The words that a base knows, those that it does not, and what of a prompt is no word at all."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e4t_cli.errors import IntegrityError, UsageError
from e4t_cli.hub.bases import find_base
from e4t_cli.hub.vocabulary import FILE, read_vocabulary, words_of
from e4t_cli.prompts import (
    foreign_syntax,
    parse_negative_prompt,
    parse_prompt,
    training_templates,
    unknown_words,
    weight_syntax,
)
from e4t_cli.registry.discovery import find_domain

MINI = find_base("mini").folder


@pytest.fixture(scope="module")
def known():
    return words_of(read_vocabulary(MINI))


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("S* as an astronaut", []),
        ("S* riding a bicycle", ["riding", "bicycle"]),
        ("S* in Paris, 8k", ["paris", "8k"]),
        ("S*'s red hat", []),
        ("a cat's S*, 2 (close-up!)", []),
        ("S* with CURLY pink hair", []),
        ("S* as a king", ["king"]),  # it has a token, and no caption has it
        ("riding S* riding", ["riding"]),
        ("S* don't red_hat", ["don't"]),
        ("S* 在海滩 नमस्ते", ["在海滩", "नमस्ते"]),
        ("S* !? ' – 🎨", []),
    ],
)
def test_unknown_words(known, prompt, unknown):
    assert unknown_words([parse_prompt(prompt)], known) == unknown


@given(st.text(min_size=1))
def test_a_word_is_named_whole_once_and_only_if_unknown(text):
    try:
        prompt = parse_prompt("S* " + text.replace("*", ""))
    except UsageError:
        return
    found = unknown_words([prompt, prompt], {"a"})
    assert len(set(found)) == len(found) and "a" not in found and "" not in found
    assert all(word in prompt.text.lower() and not word.isnumeric() for word in found)


@pytest.mark.parametrize("domain", ["face", "cat", "art"])
def test_the_domains_own_templates_are_known(known, domain):
    value = find_domain(domain)
    prompts = [parse_prompt(one.replace("{}", "S*")) for one in training_templates(value)]
    assert not set(unknown_words(prompts, known)) - {"at", "of", "the", "up", "a", "in", "is", "as"}
    assert value.descriptor in known


def test_the_shipped_list_is_what_the_captions_say(tmp_path):
    from mini_world.base import write_vocabulary

    write_vocabulary(tmp_path)
    assert (tmp_path / FILE).read_bytes() == (MINI / FILE).read_bytes()


def test_every_word_of_a_group_is_one_token(known):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(MINI / "tokenizer", local_files_only=True)
    groups = {key: value for key, value in read_vocabulary(MINI).items() if key != "other"}
    for word in words_of(groups):
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word


def test_captions_have_no_other_words(known):
    import random

    from mini_world.world import sample

    captions = [sample(index, seed=5).caption(random.Random(index)).text for index in range(200)]
    prompts = [parse_prompt(text, require_placeholder=False) for text in captions]
    assert unknown_words(prompts, known) == []


@pytest.mark.parametrize("text", ["", "[]", '{"a": "b"}', '{"a": [1]}', '{"a": null}', "[" * 100_000])
def test_a_damaged_list(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(IntegrityError, match="cannot be used"):
        read_vocabulary(tmp_path)


def test_a_base_without_a_list(tmp_path):
    assert read_vocabulary(tmp_path) is None


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("S* (red hat:1.2)", ["(red hat:1.2)"]),
        ("(S*:.8), (S*: 1)", ["(S*:.8)", "(S*: 1)"]),
        ("((S*)) on [[snow]]", ["((S*))", "[[snow]]"]),
        ("[a:b:0.5] [S*:12]", ["[a:b:0.5]", "[S*:12]"]),
        ("[S*|cat]", ["[S*|cat]"]),
        ("S* <lora:x:0.8> embedding:me", ["<lora:x:0.8>", "embedding:me"]),
        ("S* BREAK a hat AND snow", ["BREAK", "AND"]),
        *((plain, []) for plain in (
            "S* (a portrait)", "S* at 10:30", "S* (at 10:30)", "S* (16:9)", "S* [1]", "<S*> as a: b", "S* AND A CAT",
            "S* (the title: a tale)", "S* and brandy",
        )),
    ],
)  # fmt: skip
def test_what_other_programs_do_not_read_as_words(prompt, parts):
    assert weight_syntax(prompt) + foreign_syntax(prompt) == parts


def test_a_negative_prompt_is_read_as_a_prompt_is():
    assert parse_negative_prompt("  a\tdark\r\nＰｈｏｔｏ ", "S*").text == "a dark Photo"
    assert parse_negative_prompt(" \n", "S*").segments == ()
    assert parse_negative_prompt("S*", "<me>").text == "S*"
    for wrong in ("without S*", "s*'s hat", "<S*>"):
        with pytest.raises(UsageError, match="names the concept"):
            parse_negative_prompt(wrong, "S*")
    for wrong in ("a\x1b[31mb", "a\0b"):
        with pytest.raises(UsageError, match="the negative prompt .* control characters"):
            parse_negative_prompt(wrong, "S*")
    with pytest.raises(UsageError, match="the negative prompt has"):
        parse_negative_prompt("a" * 20_000, "S*")


def test_the_list_is_data(known):
    assert {"astronaut", "beach", "pencil", "curly", "crimson", "dog"} <= known
    assert isinstance(json.loads(Path(MINI / FILE).read_text(encoding="utf-8")), dict)
