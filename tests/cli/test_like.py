"""`generate --like PICTURE.png`: a picture drawn again from its record."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import e4t_cli
from e4t_cli.errors import UsageError
from e4t_cli.images.png_metadata import GenerationRecord, png_bytes, read_metadata
from e4t_cli.registry.discovery import user_domains_folder

RECORD = {"prompt": "S*", "seed": 1, "steps": 2, "guidance": 1.0, "scheduler": "ddim", "width": 8, "height": 8}
ME = str(Path(__file__).parents[2] / "examples" / "me.png")


def pixels(path):
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def told(path):
    return read_metadata(Path(path).read_bytes()).details


@pytest.fixture
def drawn(run, world):
    """A concept, three pictures with settings of their own, and their contact sheet."""
    shutil.copytree(world.pack, user_domains_folder() / "my_faces")
    ended = run(
        *world.personalize(
            "--save", "me.e4t", "--seed", "3,9", "--scheduler", "euler", "--guidance", "3", "--concept-scale", "0.8",
            "--negative-prompt", "red", "--placeholder", "<me>", "--grid", prompts=("<me> x", "a <me>"),
        )
    )  # fmt: skip
    assert ended.code == 0, ended.err
    return ended.lines


def test_a_picture_is_drawn_again_to_the_byte(run, world, drawn):
    _, *images, sheet = drawn
    again = run("generate", "me.e4t", "--like", images[1], "--base", str(world.base))
    assert again.code == 0, again.err
    assert pixels(again.lines[0]) == pixels(images[1]) != pixels(images[0])
    assert told(again.lines[0]) == told(images[1])
    assert "the picture was made" not in again.err
    all_again = run("generate", "me.e4t", "--like", sheet, "--base", str(world.base), "-o", "again").lines
    assert [pixels(path) for path in all_again] == [pixels(path) for path in images]
    library = e4t_cli.generate("me.e4t", like=images[0], base=world.base)
    assert library.images[0].image.tobytes() == pixels(images[0])


def test_options_stand_in_place_of_what_is_recorded(run, world, drawn):
    _, *images, sheet = drawn

    def made(like, *more):
        ended = run("generate", "me.e4t", "--like", like, "--base", str(world.base), "--json", *more)
        assert ended.code == 0, ended.err
        return [(one["prompt"], one["seed"], one["steps"], one["guidance"]) for one in map(json.loads, ended.lines)]

    assert made(images[0], "--steps", "1", "--guidance", "5") == [("<me> x", 3, 1, 5.0)]
    assert made(images[0], "--seed", "4-5") == [("<me> x", 4, 2, 3.0), ("<me> x", 5, 2, 3.0)]
    assert made(images[0], "-n", "2") == [("<me> x", 3, 2, 3.0), ("<me> x", 4, 2, 3.0)]
    assert made(images[1], "<me> y") == [("<me> y", 9, 2, 3.0)]
    assert made(sheet, "--seed", "1") == [("<me> x", 1, 2, 3.0), ("a <me>", 1, 2, 3.0)]
    assert made(sheet, "<me> y") == [("<me> y", 3, 2, 3.0), ("<me> y", 9, 2, 3.0)]
    one_name = run("generate", "me.e4t", "--like", images[0], "--base", str(world.base), "-o", "x.png")
    assert one_name.lines == ["x.png"]
    assert run("generate", "me.e4t", "--like", sheet, "-o", "y.png").code == 2


def test_of_another_concept_it_says_so(run, world, drawn, tmp_path):
    Image.open(world.photo).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "tom.png")
    command = world.personalize("--save", "tom.e4t", "--seed", "1", prompts=())
    command[2] = "tom.png"
    assert run(*command).code == 0
    ended = run("generate", "tom.e4t", "--like", drawn[1], "--base", str(world.base))
    assert ended.code == 0
    assert "of another concept (photo, tuning): its prompt, seed and settings are used" in ended.err
    assert pixels(ended.lines[0]) != pixels(drawn[1])


STRANGE = [
    ({"steps": 10**9}, "1 to 1000"), ({"guidance": float("nan")}, "0 to 100"), ({"seed": -1}, "seeds must be"),
    ({"prompt": "nobody"}, "does not name the concept"), ({"scheduler": "os"}, "no scheduler"),
    ({"concept_scale": 1e30}, "0 to 2"), ({"placeholder": ""}, "must be one word"),
]  # fmt: skip


def test_a_record_is_checked_as_options_are(run, world, drawn):
    for strange, words in STRANGE:
        record = GenerationRecord(**{**RECORD, **strange})
        with pytest.raises(UsageError, match=words):
            e4t_cli.generate("me.e4t", like=png_bytes(Image.new("RGB", (8, 8)), record), base=world.base)


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("bare.png", 3, "--no-metadata"),
        ("other.png", 3, "no record of e4t"),
        ("plain.png", 3, "no record of e4t"),
        ("me.e4t", 3, "not a readable PNG"),
        ("missing.png", 2, "no file"),
    ],
)
def test_pictures_that_cannot_be_drawn_again(run, tmp_path, name, code, words):
    image, other = Image.new("RGB", (8, 8)), PngInfo()
    record = GenerationRecord(**RECORD)
    other.add_text("parameters", "a cat\nSteps: 20, Sampler: Euler a, Seed: 1")
    (tmp_path / "bare.png").write_bytes(png_bytes(image, record, metadata=False))
    image.save(tmp_path / "other.png", pnginfo=other)
    image.save(tmp_path / "plain.png")
    (tmp_path / "me.e4t").write_bytes(b"no matter what")
    ended = run("generate", "me.e4t", "--like", name)
    assert (ended.code, ended.out) == (code, "")
    assert words in ended.err


def test_on_the_packaged_base(run):
    quick = ["--base", "mini", "--tune-steps", "1", "--steps", "1", "--seed", "3", "--device", "cpu"]
    ended = run("personalize", "face", ME, "S* on the beach", "--save", "me.e4t", *quick)
    assert ended.code == 0, ended.err
    again = run("generate", "me.e4t", "--like", ended.lines[1], "--device", "cpu", "-o", "again.png")
    assert again.code == 0, again.err
    assert pixels("again.png") == pixels(ended.lines[1])
