"""Prompt files: comments, options of a line, and complaints that say where."""

import io
import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e4t_cli.cli import prompt_files
from e4t_cli.cli.prompt_files import OPTIONS, gather_prompts, parse_line
from e4t_cli.errors import UsageError
from e4t_cli.prompts import PromptRequest


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("S* at sea", PromptRequest("S* at sea")),
        ("S* at sea --n 4 --s 7", PromptRequest("S* at sea", 4, 7)),
        ("S* at sea --num-images=4 --seed=7", PromptRequest("S* at sea", 4, 7)),
        ("S* don't --neg don't blur", PromptRequest("S* don't", sampling={"negative_prompt": "don't blur"})),
        ("S* --neg a, b --n 2", PromptRequest("S*", 2, sampling={"negative_prompt": "a, b"})),
        ('S* --neg "say --no" --n 2', PromptRequest("S*", 2, sampling={"negative_prompt": "say --no"})),
        ("S* --neg 'a b'", PromptRequest("S*", sampling={"negative_prompt": "a b"})),
        ('S* --neg "a" and "b"', PromptRequest("S*", sampling={"negative_prompt": '"a" and "b"'})),
        (r'S* --neg "a \"b\""', PromptRequest("S*", sampling={"negative_prompt": 'a "b"'})),
        ("S* --neg", PromptRequest("S*", sampling={"negative_prompt": ""})),
        ("S* -- a dash, e-mail --- and -x", PromptRequest("S* -- a dash, e-mail --- and -x")),
        ('--prompt "S* on a --sale" --steps 30', PromptRequest("S* on a --sale", sampling={"steps": 30})),
        ("--prompt S* at sea --negative_prompt x", PromptRequest("S* at sea", sampling={"negative_prompt": "x"})),
        ("S* --guidance 3.5 --scheduler euler", PromptRequest("S*", sampling={"guidance": 3.5, "scheduler": "euler"})),
        ("S* --concept-scale 0.8", PromptRequest("S*", sampling={"concept_scale": 0.8})),
        ('"S*" in quotes', PromptRequest('"S*" in quotes')),
    ],
)  # fmt: skip
def test_a_line(line, expected):
    assert parse_line(line) == expected


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("S* --nonsense 3", "no option --nonsense"),
        ("S* --w 512 --h 512", "no option --w"),  # of programs whose pictures have other sizes
        ("S* --n low quality", "negative prompt is --negative-prompt"),
        ("S* --n 0", "--n 0: it takes a whole number, 1 to 10000"),
        ("S* --seed -1", "0 to 4294967295"),
        ("S* --seed", "it takes a whole number"),
        ("S* --steps 1001", "1 to 1000"),
        ("S* --guidance nan", "--guidance nan: it takes a number, 0 to 100"),
        ("S* --concept-scale 3", "0 to 2"),
        ("S* --n 1 --num-images 2", "given twice"),
        ("S* --prompt S*", "there twice"),
        ("no concept", "does not name the concept"),
        ("--n 3", "the prompt is empty"),
        ("S* \x07", "control characters"),
    ],
)
def test_complaints_name_file_and_line(run, tmp_path, line, words):
    (tmp_path / "p.txt").write_text(f"# comment\n\nS* fine\n{line}\n")
    ended = run("personalize", "face", "me.jpg", "-f", "p.txt")
    assert ended.code == 2
    assert ended.err.startswith("error: p.txt:4: ") and words in ended.err
    assert len(ended.err.splitlines()) <= 2


def test_a_concepts_own_placeholder_is_missed_with_the_line(tmp_path):
    """`generate` learns the placeholder from the concept, after the file was read."""
    from e4t_cli.api.requests import parse_prompts

    (tmp_path / "p.txt").write_text("<me> fine\nnobody\n")
    prompts = gather_prompts([], str(tmp_path / "p.txt"), placeholder=None)
    with pytest.raises(UsageError, match=r"p\.txt:2: the prompt 'nobody' does not name"):
        parse_prompts(prompts, "<me>")


def test_comments_and_every_end_of_line(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeff# a list\r\nS* one\r\n  # more\r  S* two\n\nS* \u2028 three\n".encode())
    found = gather_prompts(["S* zero"], str(file), placeholder="S*")
    assert [(one.prompt, one.source.rpartition(":")[2]) for one in found] == [
        ("S* zero", ""), ("S* one", "2"), ("S* two", "4"), ("S* \u2028 three", "6"),
    ]  # fmt: skip


@given(st.text(st.characters(blacklist_categories=("Cs", "Cc"))))
def test_a_line_without_double_dashes_is_a_prompt_as_it_is(text):
    if "--" not in text and text.strip():
        assert parse_line(text.strip()) == PromptRequest(text.strip())


@given(
    st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=30),
    st.integers(1, 10_000),
    st.integers(0, 2**32 - 1),
)
def test_quoted_text_comes_back(text, number, seed):
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    found = parse_line(f'S* --neg "{quoted}" --n {number} --s {seed}')
    assert found == PromptRequest("S*", number, seed, {"negative_prompt": text})


def test_the_longest_line_takes_no_time():
    with pytest.raises(UsageError):
        parse_line("S* --n " + " " * prompt_files.MAX_FILE_BYTES + "x")


def test_options_of_a_line_are_those_of_sampling():
    from dataclasses import fields

    from e4t_cli.schedulers import SamplingConfig

    own = {name.replace("-", "_") for name in OPTIONS} - {"prompt", "num_images", "seed"}
    assert own == {field.name for field in fields(SamplingConfig)}


def test_stdin_may_be_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="stdin is closed"):
        gather_prompts(["-"], None, placeholder="S*")


@pytest.mark.parametrize(
    ("name", "code", "words"), [("d", 3, "d cannot be read: Is a directory"), ("n" * 300, 3, "File name too long")]
)
def test_paths_that_are_no_files(run, tmp_path, name, code, words):
    (tmp_path / "d").mkdir()
    ended = run("personalize", "face", "me.jpg", "-f", name)
    assert ended.code == code and words in ended.err


def test_prompts_from_a_pipe_are_read(tmp_path):
    """`-f <(grep ... )`: a pipe is as good as a file here."""
    ours, theirs = os.pipe()
    os.write(theirs, b"S* at sea\n")
    os.close(theirs)
    assert gather_prompts([], f"/dev/fd/{ours}", placeholder="S*")[0].prompt == "S* at sea"
    os.close(ours)


def test_stdin_is_a_list_of_prompts(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"S* one --n 2\n# no\nS* two\n")))
    assert [one.num_images for one in gather_prompts(["-"], None, placeholder="S*")] == [2, None]


def test_every_line_is_generated_with_its_own_settings(run, world, tmp_path):
    """Files, metadata and pixels are those of single commands with the same options."""
    import json

    from PIL import Image

    lines = ["S* on the beach", "S* red --n 2 --s 40 --neg hat --steps 3", "S* --concept-scale 0.5"]
    (tmp_path / "p.txt").write_text("\n".join(lines))
    ended = run(*world.personalize("-f", "p.txt", "--seed", "5", "--json", prompts=()))
    assert ended.code == 0, ended.err
    told = [json.loads(line) for line in ended.lines]
    assert [(one["prompt"], one["seed"], one["steps"], one["negative_prompt"]) for one in told] == [
        ("S* on the beach", 5, 2, ""), ("S* red", 40, 3, "hat"), ("S* red", 41, 3, "hat"), ("S*", 5, 2, ""),
    ]  # fmt: skip
    single = ("--seed", "5", "--concept-scale", "0.5", "-o", "alone")
    alone = run(*world.personalize(*single, prompts=("S*",))).lines[0]
    with Image.open(told[3]["path"]) as one, Image.open(alone) as other:
        assert one.tobytes() == other.tobytes()
    plan = json.loads(run(*world.personalize("-f", "p.txt", "--dry-run", "--json", prompts=())).out)
    assert (plan["prompts"], plan["images"]) == (3, 4)


@pytest.mark.parametrize("placeholder", ["S*", None])
@pytest.mark.parametrize("option", ["--base", "-n", "--seed=4", "--"])
def test_options_behind_the_dashes(placeholder, option):
    with pytest.raises(UsageError, match=f"^{option} comes after --, where everything is a prompt$") as raised:
        gather_prompts(["S* x", option, "sd14"], None, placeholder=placeholder)
    assert raised.value.hint.startswith("options come before it: e4t … ")
    for prompt in ("-S* x", "--S*", "- S* x", "-1 S*", "--a S*"):
        assert [one.prompt for one in gather_prompts([prompt], None, placeholder=placeholder)] == [prompt]


def test_a_command_ends_at_an_option_behind_the_dashes(run, world, tmp_path):
    ended = run("generate", "--dry-run", "me.e4t", "--", "S* x", "--steps", "3")
    assert (ended.code, ended.out) == (2, "") and "--steps comes after --" in ended.err
