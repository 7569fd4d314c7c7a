"""Several photos of one subject, on the command line and in Python."""

import io
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

import e4t_cli
from e4t_cli.api.photos import open_photos
from e4t_cli.cli.photo_arguments import _BEHIND, split_arguments
from e4t_cli.errors import InputError, UsageError
from e4t_cli.images.png_metadata import read_metadata
from e4t_cli.registry.discovery import user_domains_folder
from tests.conftest import drawn_face

ME = str(Path(__file__).parents[2] / "examples" / "me.png")
PROMPT = "S* on the beach"


@pytest.fixture
def photos(tmp_path):
    """Three photos of different sizes, and a text that calls itself one."""
    for name, index, side in (("a", 1, 96), ("b", 2, 80), ("c", 3, 128)):
        drawn_face(index, side)[0].save(tmp_path / f"{name}.png")
    (tmp_path / "bad.png").write_text("no picture")
    return ["a.png", "b.png", "c.png"]


@pytest.fixture
def several(run, world, photos):
    """Run `e4t personalize` in the tiny world, with arguments in place of photo and prompts."""

    def several(*arguments):
        options = ("--base", str(world.base), "--steps", "2", "--tune-steps", "1", "--seed", "3")
        return run("personalize", *options, str(world.pack), *arguments)

    return several


def pixels(path):
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


# ── which argument is a photo ──


class Context:
    def __init__(self, behind):
        self.meta = {} if behind is None else {_BEHIND: behind}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a.png | S* x | S* y", (["a.png"], ["S* x", "S* y"])),
        ("a.png | nothing of it", (["a.png"], ["nothing of it"])),
        ("a.png | b.png | c.png | -- | S* x", (["a.png", "b.png", "c.png"], ["S* x"])),
        ("a.png | -- | -S* x | b.png", (["a.png"], ["-S* x", "b.png"])),
        ("a.png | S* x | -- | --S* y", (["a.png"], ["S* x", "--S* y"])),
        ("a.png | b.png | S* x | -- | S* y", (["a.png", "b.png"], ["S* x", "S* y"])),
        ("a.png | b.png | --", (["a.png", "b.png"], [])),
        ("-- | a.png | S* x", (["a.png"], ["S* x"])),
        ("a.png | - | -- | S* x", (["a.png", "-"], ["S* x"])),
        ("a.png | gone.png | -- | S* x", "no file gone.png"),
        ("a.png | no concept | -- | S* x", "no file no concept"),
        ("a.png | b.png | S* x", "b.png is a file, where a prompt should be"),
        ("- | - | -- | S* x", "only one photo"),
    ],
)
def test_photos_come_before_the_dashes(photos, tmp_path, monkeypatch, line, expected):
    monkeypatch.chdir(tmp_path)
    words = [word.strip() for word in line.split("|")]
    behind = len(words) - words.index("--") - 1 if "--" in words else None
    first, *others = [word for word in words if word != "--"]

    def split():
        return split_arguments(Context(behind), first, others, images=(), placeholder="S*")

    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected) as error:
            split()
        assert "\n" not in error.value.message
    else:
        assert split() == expected


def test_all_ways_to_name_photos_give_the_same_images(several, world, photos):
    ways = {
        "dashes": ("a.png", "b.png", "c.png", "--", PROMPT),
        "options": ("a.png", PROMPT, "--image", "b.png", "--image", "c.png"),
        "both": ("a.png", "b.png", "-o", "both", "--image", "c.png", "--", PROMPT),
        "one": ("a.png", PROMPT),
    }
    found = {}
    for name, arguments in ways.items():
        ended = several("-o", name, "--save", f"{name}.e4t", *arguments)
        assert ended.code == 0, ended.err
        assert [Path(line).name for line in ended.lines] == [f"{name}.e4t", "a-s-on-the-beach-3.png"]
        found[name] = pixels(ended.lines[-1]), Path(f"{name}.e4t").read_bytes()
    assert found["dashes"] == found["options"] == found["both"]
    assert found["one"][0] != found["dashes"][0]
    result = e4t_cli.personalize(
        world.pack, photos, PROMPT, base=world.base, seed=3, sampling={"steps": 2}, tune_steps=1
    )
    assert result.images[0].image.tobytes() == found["dashes"][0]
    assert len(result.concept.photos) == 3 and result.name == "a"


def test_a_photo_that_is_there_twice_is_used_once(several, photos):
    shutil.copy("b.png", "copy.png")
    with Image.open("a.png") as image:
        image.save("a.bmp")
    ended = several("-o", "x", "a.png", "b.png", "copy.png", "a.bmp", "--save", "x.e4t", "--", PROMPT)
    assert ended.code == 0, ended.err
    assert "photo 3 (copy.png) is photo 2 (b.png) again: it is used once" in ended.err
    assert "photo 4 (a.bmp) is photo 1 (a.png) again: it is used once" in ended.err
    assert several("-o", "y", "a.png", "b.png", "--save", "y.e4t", "--", PROMPT).code == 0
    assert Path("x.e4t").read_bytes() == Path("y.e4t").read_bytes()
    ended = several("-o", "z", "a.png", "a.png", "--save", "z.e4t", "--", PROMPT)
    assert ended.code == 0 and several("-o", "one", "a.png", PROMPT, "--save", "one.e4t").code == 0
    assert Path("z.e4t").read_bytes() == Path("one.e4t").read_bytes()
    assert ended.err.count("again") == 1


# ── errors ──


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["a.png", "bad.png", "c.png", "--", PROMPT], 3, "photo 2 (bad.png): "),
        (["a.png", "gone.png", "--", PROMPT], 2, "there is no file gone.png"),
        (["a.png", PROMPT, "--image", "gone.png"], 2, "photo 2 (gone.png): there is no file gone.png"),
        (["a.png", "b.png", "--"], 2, "there is no prompt"),
        (["a.png", "b.png", PROMPT], 2, "several photos end with --"),
        (["a.png", "b.png", "--mask", "a.png", "--", PROMPT], 2, "there is one mask for 2 photos"),
        (["a.png", PROMPT, "--mask", "a.png", "--mask", "none"], 2, "there are 2 masks for one photo"),
        (["a.png", "b.png", "--mask", "a.png", "--mask", "c.jpg", "--", PROMPT], 2, "photo 2 (b.png): there is no"),
        (["-", PROMPT, "--image", "-"], 2, "only one photo can be -"),
        (["a.png", "-", "--", "-"], 2, "only one input can be -"),
        (["-", PROMPT, "--mask", "-"], 2, "only one input can be -"),
        (["a.png", "-", "--mask", "auto", "--mask", "-", "--", PROMPT], 2, "only one input can be -"),
        (["a.png", "--mask", "-", "-f", "-"], 2, "only one input can be -"),
        (["a.png", "b.png", "--", PROMPT, "--steps", "3"], 2, "options come before it"),
        (["a.png", PROMPT, "--image", ""], 2, "photo 2: the name of an image is empty"),
        (["a.png", PROMPT, "--mask", ""], 2, "the name of an image is empty"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_mistakes_end_with_one_sentence(several, arguments, code, message, more):
    ended = several(*more, *arguments)
    assert (ended.code, ended.out) == (code, "")
    assert message in ended.err and "Traceback" not in ended.err
    assert not Path("outputs").exists() or not any(Path("outputs").iterdir())


def test_a_photo_without_a_face_is_named(run, photos):
    Image.new("RGB", (64, 64), (20, 90, 200)).save("sky.png")
    command = ["personalize", "face", "--base", "mini", "--save-prepared", "x", "--require-face", ME, "sky.png", "--"]
    ended = run(*command)
    assert ended.code == 3 and "photo 2 (sky.png): " in ended.err
    command.remove("--require-face")
    ended = run(*command)
    assert ended.code == 0 and "photo 2 (sky.png): no face was found" in ended.err
    assert ended.lines == ["x/me-prepared.png", "x/me-prepared-mask.png", "x/sky-prepared.png"]


def test_more_photos_than_samples(several, photos):
    # A batch of 2, one step.
    ended = several("a.png", "b.png", "c.png", "--", PROMPT)
    assert ended.code == 0 and "tuning draws 2 samples: not all of the 3 photos are used" in ended.err
    assert "not all" not in several("a.png", "b.png", "--", PROMPT).err


# ── files ──


def test_prepared_pictures_have_names_of_their_own(several, photos):
    ended = several("a.png", "b.png", "c.png", "--save-prepared", "x", "--")
    assert ended.code == 0 and ended.lines == ["x/a-prepared.png", "x/b-prepared.png", "x/c-prepared.png"]
    ended = several("a.png", "b.png", "a.png", "--mask", "none", "--save-prepared", "p.png", "--")
    assert ended.code == 0 and ended.lines == ["p.png", "p-2.png"]
    assert pixels("p-2.png") == pixels("x/b-prepared.png")
    Path("p.png").unlink()
    ended = several("a.png", "b.png", "--save-prepared", "p.png", "--")
    assert ended.code == 2 and "p-2.png exists and is not overwritten" in ended.err
    ended = several("a.png", "b.png", "--save-prepared", "q.png", "--save", "q-2.png", "--")
    assert ended.code == 2 and "same name, q-2.png" in ended.err


def test_each_photo_has_its_mask(several, photos):
    for name, side in (("a", 96), ("b", 80), ("c", 128)):
        Image.new("L", (side, side), 255).save(f"{name}-white.png")
    masks = ["--mask", "a-white.png", "--mask", "none", "--mask", "c-white.png"]
    ended = several("a.png", "b.png", "c.png", *masks, "--save-prepared", "x", "--json", "--")
    assert ended.code == 0, ended.err
    found = [json.loads(line) for line in ended.lines]
    assert [Path(one["path"]).name for one in found] == [
        "a-prepared.png", "a-prepared-mask.png", "b-prepared.png", "c-prepared.png", "c-prepared-mask.png",
    ]  # fmt: skip
    ended = several("a.png", "b.png", "c.png", *masks, "--save", "me.e4t", "--")
    concept = e4t_cli.Concept.load("me.e4t")
    assert concept.config.mask and [one.mask is None for one in concept.photos] == [False, True, False]
    ended = several("a.png", "c.png", "--mask", "c-white.png", "--mask", "a-white.png", "--save-prepared", "y", "--")
    assert ended.code == 0  # both are squares: proportions are all that is compared


def test_a_concept_of_several_photos_is_generated_from_again(several, run, world, photos):
    shutil.copytree(world.pack, user_domains_folder() / "my_faces")
    ended = several("a.png", "b.png", "--save", "me.e4t", "--grid", "--", PROMPT)
    assert ended.code == 0, ended.err
    _, picture, sheet = ended.lines
    details = read_metadata(Path(picture).read_bytes()).details
    assert len(details["other_photos_sha256"]) == 1 and details["photo_sha256"] not in details["other_photos_sha256"]
    again = run("generate", "me.e4t", "--like", picture, "-o", "again.png", "--base", str(world.base))
    assert again.code == 0 and "another concept" not in again.err, again.err
    assert pixels("again.png") == pixels(picture)
    with Image.open(sheet) as image:
        assert image.width > 2 * 256  # two photos and one image: two columns of two rows
    assert several("a.png", "--save", "one.e4t", "--").code == 0
    other = run("generate", "one.e4t", "--like", picture, "-o", "other.png", "--base", str(world.base))
    assert other.code == 0 and "another concept (photo)" in other.err
    told = run("info", "me.e4t")
    assert told.code == 0 and "photos" in told.out and "photos" not in run("info", "one.e4t").out


def test_a_dry_run_shows_every_photo(several, photos):
    ended = several("--dry-run", "--json", "a.png", "b.png", "--", PROMPT)
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["photos"] == [{"width": 96, "height": 96}, {"width": 80, "height": 80}]
    ended = several("--dry-run", "--json", "a.png", "b.png", "--save-prepared", "x", "--")
    assert len(json.loads(ended.out)["photos"]) == 2 and not Path("x").exists()
    assert "photos" not in json.loads(several("--dry-run", "--json", "a.png", PROMPT).out)


@pytest.mark.parametrize("more", [["--", PROMPT], ["--save-prepared", "x", "--"]])
def test_a_dry_run_says_that_a_photo_is_there_twice(several, photos, more):
    shutil.copy("b.png", "copy.png")
    ended = several("--dry-run", "a.png", "b.png", "copy.png", *more)
    assert ended.code == 0 and "warning: photo 3 (copy.png) is photo 2 (b.png) again" in ended.err
    ended = several("--dry-run", "--json", "a.png", "b.png", "copy.png", *more)
    assert json.loads(ended.out)["notes"] == ["photo 3 (copy.png) is photo 2 (b.png) again: it is used once"]


@pytest.mark.parametrize("more", [[PROMPT], ["--save-prepared", "x"]])
def test_a_dry_run_reads_stdin_once(several, photos, monkeypatch, more):
    for options in ([], ["--mask", "a.png"]):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(Path("a.png").read_bytes())))
        ended = several("--dry-run", "-", *options, *more)
        assert (ended.code, ended.err) == (0, "") and "96×96" in ended.out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(Path("a.png").read_bytes())))
    ended = several("--dry-run", "a.png", "--mask", "-", *more)
    assert (ended.code, ended.err) == (0, "")


# ── in Python ──


def test_only_bytes_of_several_photos_are_kept(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert all(isinstance(one.source, bytes) for one in open_photos(photos, "auto"))
    (one,) = open_photos(["a.png"], "auto")
    assert one.source.image.size == (96, 96)


def test_no_photo_and_no_image_among_photos(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="there is no photo"):
        open_photos([], "auto")
    with Image.open("a.png") as image, pytest.raises(InputError, match=r"photo 3: .*"):
        open_photos([image, Path("b.png").read_bytes(), b"no picture"], "auto")
