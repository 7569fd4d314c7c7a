"""What `personalize` says about photos and prompts that the base does not know, and what --strict refuses."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mini_world.photographs import photograph

ME = str(Path(__file__).parents[2] / "examples" / "me.png")
QUICK = ["--base", "mini", "--steps", "1", "--tune-steps", "1"]


@pytest.fixture
def cup(tmp_path):
    photograph("coffee").save(tmp_path / "cup.png")
    return str(tmp_path / "cup.png")


def test_a_photograph_on_mini(run, cup):
    ended = run("personalize", "face", cup, "S* on the beach", *QUICK)
    assert ended.code == 0 and len(ended.out.split()) == 1
    assert "mini knows drawings only" in ended.err and "photograph needs Stable Diffusion" in ended.err
    assert "e4t personalize face IMAGE" in ended.err and "--base sd14" in ended.err and "GB" in ended.err
    # The parser took parts of the cup for skin: that is no face.
    assert "no face was found" in ended.err and "1 face" not in ended.err


@pytest.mark.parametrize("domain", ["face", "cat"])
def test_strict_refuses_a_photograph(run, cup, domain):
    ended = run("personalize", domain, cup, "S* on the beach", *QUICK, "--strict")
    assert ended.code == 3 and not ended.out and "mini knows drawings only" in ended.err
    assert ("e4t pretrain --domain cat" in ended.err) == (domain == "cat")  # no public weights for cats


def test_strict_takes_a_drawing(run):
    ended = run("personalize", "face", ME, "S* on the beach", *QUICK, "--strict")
    assert ended.code == 0 and "warning" not in ended.err


def test_strict_refuses_what_the_preparation_doubts(run, tmp_path):
    with Image.open(ME) as image:
        image.convert("RGB").resize((64, 64)).crop((0, 0, 64, 20)).resize((640, 200)).save(tmp_path / "hair.png")
    ended = run("personalize", "face", "hair.png", "--base", "mini", "--save-prepared", "x", "--strict")
    assert ended.code == 3 and "no face was found" in ended.err and not ended.out


def test_unknown_words_and_foreign_syntax_are_named(run):
    ended = run(
        "personalize", "face", ME, "S* riding a bicycle", "(S*:1.2) riding", *QUICK, "--negative-prompt", "ugly\nhat"
    )
    assert ended.code == 0
    assert "mini does not know: riding, bicycle, ugly (" in ended.err and "e4t info mini" in ended.err
    assert ended.err.count("(S*:1.2)") == 1 and "plain words" in ended.err


def test_a_negative_prompt_is_checked_and_recorded_on_one_line(run, tmp_path):
    base = ["personalize", "face", ME, "S* on the beach", *QUICK, "--json", "--negative-prompt"]
    ended = run(*base, " ｈａｔ\nSteps: 1 " + "scarf " * 60)
    assert ended.code == 0 and "the negative prompt is too long" in ended.err
    record = json.loads(ended.out.splitlines()[0])
    assert record["negative_prompt"].startswith("hat Steps: 1 scarf")
    with Image.open(tmp_path / record["path"]) as image:
        assert [line[:9] for line in image.text["parameters"].splitlines()] == ["S* on the", "Negative ", "Steps: 1,"]
    ended = run(*base, "no S*")
    assert ended.code == 2 and "names the concept" in ended.err
    ended = run(*base, "a\x1b[31m")
    assert ended.code == 2 and "control characters" in ended.err


def test_info_lists_what_mini_knows(run):
    ended = run("info", "mini")
    assert ended.code == 0
    for words in ("drawings only", "on the beach", "wearing a crown", "pencil sketch", "curly hair", "MB"):
        assert words in ended.out
    about = json.loads(run("info", "mini", "--json").out)
    assert about["type"] == "base" and "on the beach" in about["places"] and about["bytes"] > 10**7
    assert "e4t fetch sd14" in run("info", "sd14").out


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_line_about_the_base_says_what_mini_knows(device):
    from e4t_cli.api.resolve import default_base_name
    from e4t_cli.hub.paths import HubAccess

    name, line = default_base_name(HubAccess(offline=True), device=device)
    assert name == "mini" and line.startswith("base: mini knows drawings only; ")
