"""The photo's options on the command line: what is saved, which face, and how it ends."""

import json
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
ME = str(EXAMPLES / "me.png")
CAT = str(EXAMPLES / "felix.png")


def test_the_prepared_picture_alone(run, tmp_path):
    command = ["personalize", "face", ME, "--base", "mini", "--save-prepared"]
    ended = run(*command, "seen")
    assert ended.code == 0, ended.err
    assert ended.out.split() == ["seen/me-prepared.png", "seen/me-prepared-mask.png"]
    assert "1 face, turned 0°, mask 3" in ended.err and "tune" not in ended.err
    with Image.open(tmp_path / "seen/me-prepared.png") as picture:
        assert (picture.size, picture.mode) == ((64, 64), "RGB") and list(picture.info) == ["Software"]
    with Image.open(tmp_path / "seen/me-prepared-mask.png") as mask:
        assert (mask.size, mask.mode) == ((64, 64), "L")
    # Nothing is overwritten: a folder gets another name, a file is refused.
    assert run(*command, "seen").out.split()[0] == "seen/me-prepared-2.png"
    assert run(*command, "one.png").code == 0
    again = run(*command, "one.png")
    assert again.code == 2 and "not overwritten" in again.err
    (tmp_path / "one.png").rename(tmp_path / "two.png")
    assert run(*command, "one.png").code == 2  # its mask is still there


def test_what_was_saved_can_be_handed_back_as_a_mask(run, tmp_path):
    run("personalize", "face", ME, "--base", "mini", "--save-prepared", "p.png")
    ended = run(
        "personalize", "face", ME, "--base", "mini", "--mask", "p-mask.png", "--save-prepared",
        "q.png", "--json",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    first, second = (json.loads(line) for line in ended.out.splitlines())
    assert (first["type"], first["path"], first["mask"]) == ("prepared", "q.png", "q-mask.png")
    assert (second["type"], second["path"]) == ("mask", "q-mask.png")
    masks = []
    for name in ("p-mask.png", "q-mask.png"):
        with Image.open(tmp_path / name) as mask:
            masks.append(mask.tobytes())
    assert masks[0] == masks[1]


def test_I11_a_face_can_be_required(run):
    command = ["personalize", "face", CAT, "--base", "mini", "--save-prepared", "x"]
    ended = run(*command, "--require-face")
    assert ended.code == 3 and "no face in the image" in ended.err
    ended = run(*command)
    assert ended.code == 0 and "no face was found" in ended.err
    assert len(ended.out.split()) == 1  # no mask, no second file
    ended = run("personalize", "cat", CAT, "--base", "mini", "--save-prepared", "x", "--require-face")
    assert ended.code == 2 and "looks for no face" in ended.err
    ended = run("personalize", "face", ME, "--base", "mini", "--save-prepared", "x", "--face", "2")
    assert ended.code == 3 and "is 1 face in the image, not 2" in ended.err


@pytest.mark.parametrize("arguments", [["--mask", "words:a face"], ["--mask", "words"]])
def test_words_without_a_network_are_one_sentence(run, arguments):
    ended = run("personalize", "cat", CAT, "--base", "mini", "--offline", "--save-prepared", "x", *arguments)
    assert ended.code == 4
    assert "clipseg" in ended.err and "Traceback" not in ended.err
    assert ended.out == ""


def test_transparency_is_a_mask(run, tmp_path):
    with Image.open(ME) as opened:
        photo = opened.convert("RGBA")
    alpha = Image.new("L", photo.size)
    alpha.paste(255, (64, 0, 192, 256))
    photo.putalpha(alpha)
    photo.save(tmp_path / "cut.png")
    ended = run("personalize", "art", "cut.png", "--base", "mini", "--save-prepared", "p.png")
    assert ended.code == 0, ended.err
    assert "transparent in places" in ended.err
    with Image.open(tmp_path / "p-mask.png") as mask:
        assert mask.getpixel((8, 30)) == 0 and mask.getpixel((32, 30)) == 255


def test_the_concept_remembers_what_was_found(run, tmp_path):
    ended = run(
        "personalize", "face", ME, "S* on the beach", "--base", "mini", "--save", "me.e4t",
        "--save-prepared", "p", "--tune-steps", "0", "--steps", "1", "--seed", "3",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    # The prepared picture comes first: it is there before any tuning.
    assert ended.out.split()[:2] == ["p/me-prepared.png", "p/me-prepared-mask.png"]
    told = json.loads(run("info", "me.e4t", "--json").out)
    assert told["recorded"]["photo"].startswith("1 face, turned 0°, mask 3")
    again = run("generate", "me.e4t", "S* on the beach", "--steps", "1", "--seed", "3", "-o", "x")
    assert again.code == 0, again.err
    first, second = (next((tmp_path / folder).glob("me-s-*.png")) for folder in ("outputs", "x"))
    with Image.open(first) as one, Image.open(second) as other:
        assert one.tobytes() == other.tobytes()


def test_help_speaks_of_consent(run):
    ended = run("personalize", "--help")
    words = " ".join(ended.out.split())
    assert "Use photos of people only with their consent" in words
    for option in ("--face", "--no-align", "--require-face", "--save-prepared"):
        assert option in words
