"""`--prompt-weights`: pictures with weights of words, in commands, prompt files, and pictures drawn again."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

import e4t_cli
from e4t_cli.cli.prompt_files import parse_line
from e4t_cli.errors import UsageError
from e4t_cli.prompts import PromptRequest
from e4t_cli.registry.discovery import user_domains_folder
from e4t_cli.schedulers import SamplingConfig

ME = str(Path(__file__).parents[2] / "examples" / "me.png")
MINI = ["--base", "mini", "--steps", "2", "--tune-steps", "1", "--seed", "3", "--device", "cpu"]


def pixels(path):
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


@pytest.fixture
def images(run, world):
    """Return a function that generates the pictures of some prompts and returns their pixels."""
    shutil.copytree(world.pack, user_domains_folder() / "my_faces")
    assert run(*world.personalize("--save", "me.e4t", "--seed", "3", prompts=())).code == 0

    def images(*arguments):
        common = ["--base", str(world.base), "--steps", "2", "--seed", "3", "--guidance", "3"]
        ended = run("generate", "me.e4t", *arguments, *common)
        assert ended.code == 0, ended.err
        return [pixels(path) for path in ended.lines]

    return images


def test_a_weight_changes_the_picture_and_a_weight_of_one_does_not(images):
    plain, off = images("S* with a red hat", "S* with a (red hat:1.4)")
    on = images("S* with a red hat", "S* with a (red hat:1.4)", "S* with a (red hat:1.0)", "--prompt-weights")
    assert on[0] == on[2] == plain and len({plain, off, on[1]}) == 3
    assert images("[(S*)] with a (red:1) hat", "--prompt-weights") == [plain]
    concept, escaped = images("(S*:1.4) with a red hat", r"S* with a \(red hat:1.4\)", "--prompt-weights")
    assert concept not in (plain, on[1]) and escaped == off


def test_the_weights_of_a_negative_prompt(images):
    def against(text, *more):
        (found,) = images("S* with a hat", "--negative-prompt", text, *more)
        return found

    plain = against("red beach")
    assert against("(red:1.0) beach", "--prompt-weights") == plain
    assert len({plain, against("(red:1.4) beach", "--prompt-weights"), against("(red:1.4) beach")}) == 3


def test_each_prompt_of_a_file_has_its_own_setting(images, tmp_path):
    """And a picture is the same alone and among others."""
    lines = ["S* (hat:1.5) --prompt-weights", "S* (hat:1.5)", "(S*:0.5) hat --prompt-weights on", "S* hat"]
    (tmp_path / "p.txt").write_text("\n".join(lines))
    found = images("-f", "p.txt")
    assert found == [
        *images("S* (hat:1.5)", "--prompt-weights"), *images("S* (hat:1.5)"),
        *images("(S*:0.5) hat", "--prompt-weights"), *images("S* hat"),
    ]  # fmt: skip
    assert len(set(found)) == 4
    ends = ("", "--prompt-weights off", "--prompt-weights=off --n 1")
    (tmp_path / "q.txt").write_text("\n".join(f"S* (hat:1.5) {end}" for end in ends))
    assert images("-f", "q.txt", "--prompt-weights") == [found[0], found[1], found[1]]


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("S* --prompt-weights", True), ("S* --prompt_weights on --n 2", True), ("S* --prompt-weights=off", False),
    ],
)  # fmt: skip
def test_the_setting_in_a_line(line, value):
    found = parse_line(line)
    assert found == PromptRequest("S*", found.num_images, sampling={"prompt_weights": value})


@pytest.mark.parametrize("line", ["S* --prompt-weights 1.2", "--prompt-weights S*", "S* --no-prompt-weights"])
def test_lines_that_give_it_a_value(line):
    with pytest.raises(UsageError):
        parse_line(line)


def test_a_picture_with_weights_is_drawn_again(run, images, world, tmp_path):
    common = ["--base", str(world.base), "--steps", "2", "--seed", "3", "--negative-prompt", "(red:0.5)", "--json"]
    ended = run("generate", "me.e4t", "S* (hat:1.5)", "--prompt-weights", "-o", "one.png", *common)
    assert ended.code == 0 and json.loads(ended.lines[0])["prompt_weights"] is True
    again = run("generate", "me.e4t", "--like", "one.png", "--base", str(world.base), "-o", "again.png")
    assert again.code == 0 and pixels("again.png") == pixels("one.png")
    (tmp_path / "off.txt").write_text("S* (hat:1.5) --prompt-weights off\n")
    more = ["-f", "off.txt", "-o", "o.png"]
    plain = run("generate", "me.e4t", "--like", "one.png", "--base", str(world.base), *more)
    assert plain.code == 0 and pixels("o.png") != pixels("one.png")
    library = e4t_cli.generate("me.e4t", like="one.png", base=world.base)
    assert library.images[0].image.tobytes() == pixels("one.png") and library.images[0].record.prompt_weights
    with Image.open("one.png") as image:
        assert image.text["parameters"].startswith("S* (hat:1.5)\nNegative prompt: (red:0.5)\n")
    with Image.open("o.png") as image:
        assert image.text["parameters"].startswith("S* \\(hat:1.5\\)\nNegative prompt: \\(red:0.5\\)\n")


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("prompt", "more", "words"),
    [
        ("S* (hat", [], "the prompt 'S* (hat' has a ( that is not closed"),
        ("S* (hat:big)", [], "no number behind a colon"),
        ("S* hat", ["--negative-prompt", "red)"], "the negative prompt 'red)' has a ) that closes nothing"),
    ],
)
def test_mistakes_end_it_before_anything_is_loaded(run, monkeypatch, tmp_path, prompt, more, words, dry):
    from e4t_cli.api.session import Session

    monkeypatch.setattr(Session, "running", lambda *_: pytest.fail("too late"))
    command = ["personalize", "face", ME, prompt, *MINI, *more, *dry]
    ended = run(*command, "--prompt-weights")
    assert ended.code == 2 and not ended.out and words in ended.err and r"\(" in ended.err
    (tmp_path / "p.txt").write_text(f"# weights\n{prompt} {' '.join(more)} --prompt-weights\n")
    ended = run("personalize", "face", ME, "-f", "p.txt", *MINI, *dry)
    assert ended.code == 2 and f"p.txt:2: the {'negative ' if more else ''}prompt" in ended.err
    if dry:
        assert run(*command).code == 0  # brackets are text


def test_a_dry_run_finds_a_concept_behind_the_last_token(run):
    late = "a (red:1.2) " + "hat " * 40 + "S*"
    for dry in ([], ["--dry-run"]):
        ended = run("personalize", "face", ME, late, *MINI, "--prompt-weights", *dry)
        assert ended.code == 2 and "the placeholder comes after them" in ended.err


def test_one_note_names_the_option(run):
    ended = run("personalize", "face", ME, "S* in a (red hat:1.2)", "((S*)) on the beach", *MINI, "-n", "2")
    assert ended.code == 0 and ended.err.count("--prompt-weights") == 1
    assert "(red hat:1.2), ((S*)): read as plain words; --prompt-weights reads weights" in ended.err
    ended = run("personalize", "face", ME, "S* in a (red hat:1.2)", "[S*|a hat] (at 10:3)", *MINI, "--prompt-weights")
    assert ended.code == 0 and "--prompt-weights" not in ended.err and "(red hat" not in ended.err
    assert "[S*|a hat]: read as plain words, without the meaning it has in other programs" in ended.err


def test_a_long_prompt_gets_the_same_note_as_without_weights(run):
    ended = run("personalize", "face", ME, "(S* with a hat:1.2) " + "(red:1.1) " * 40, *MINI, "--prompt-weights")
    assert ended.code == 0 and "the prompt is too long; left out: 'red red" in ended.err


def test_the_setting_is_on_or_off():
    with pytest.raises(UsageError, match="on or off"):
        SamplingConfig(prompt_weights=1.2)
