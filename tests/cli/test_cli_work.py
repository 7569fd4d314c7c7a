"""The commands at work, on a world small enough for a test."""

import io
import json
import shutil
import sys

import pytest
from PIL import Image, ImageChops

from e4t_cli.images.png_metadata import read_metadata
from e4t_cli.registry.discovery import user_domains_folder


def pixels(path):
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def test_personalize_says_the_paths_and_nothing_else(run, world, tmp_path):
    ended = run(*world.personalize("--seed", "7", "-n", "2"))
    assert ended.code == 0, ended.err
    names = ["me-s-on-the-beach-7.png", "me-s-on-the-beach-8.png"]
    assert ended.lines == [f"outputs/{name}" for name in names]
    for name in names:
        with Image.open(tmp_path / "outputs" / name) as image:
            assert image.size == (32, 32)
    stages = [line.split()[0] for line in ended.err.splitlines()]
    assert stages[:4] == ["load", "prepare", "tune", "generate"]
    assert "loss" in ended.err
    assert ended.err.splitlines()[-1].startswith("seed 7; ")
    assert "\x1b" not in ended.out + ended.err


def test_nothing_is_overwritten_and_a_seed_repeats(run, world):
    first = run(*world.personalize("--seed", "7")).lines[0]
    again = run(*world.personalize("--seed", "7")).lines[0]
    assert again == first.replace("-7.png", "-7-2.png")
    assert pixels(first) == pixels(again)
    other = run(*world.personalize("--seed", "8")).lines[0]
    assert pixels(other) != pixels(first)


def test_without_a_seed_one_is_drawn_and_reported(run, world):
    ended = run(*world.personalize("--json"))
    seed = json.loads(ended.out)["seed"]
    assert f"-{seed}.png" in json.loads(ended.out)["path"]
    assert json.loads(run(*world.personalize("--json")).out)["seed"] != seed


def test_json_is_one_object_a_file(run, world):
    ended = run(*world.personalize("--json", "--grid", "--save", "me.e4t", "-n", "2", "--seed", "1"))
    assert ended.code == 0, ended.err
    told = [json.loads(line) for line in ended.lines]
    assert [one["type"] for one in told] == ["concept", "image", "image", "grid"]
    assert all(one["schema"] == 1 for one in told)
    image = told[1]
    assert image["prompt"] == "S* on the beach"
    assert image["tuning"]["steps"] == 1 and image["steps"] == 2
    assert image["domain"] == "my_faces" and image["base"] == "tiny"
    assert ended.err == ""  # no terminal: stderr is for errors and warnings, as JSON too


def test_quiet_is_quiet(run, world):
    ended = run(*world.personalize("-q"))
    assert ended.code == 0
    assert ended.err == ""
    assert len(ended.lines) == 1


def test_the_pictures_tell_their_story(run, world):
    path = run(*world.personalize("--negative-prompt", "red", "--seed", "5")).lines[0]
    with open(path, "rb") as file:
        told = read_metadata(file.read())
    assert told.ai_generated
    assert told.parameters.startswith("S* on the beach\nNegative prompt: red\nSteps: 2")
    assert told.details["seed"] == 5
    assert str(world.photo.parent) not in json.dumps(told.details) + told.parameters
    shown = run("info", path).out
    assert "S* on the beach" in shown and "marked as generated" in shown
    assert json.loads(run("info", path, "--json").out)["recorded"]["seed"] == 5


def test_strength_is_heard_and_written_down(run, world, tmp_path):
    """Also where the base was loaded for this one command, whose U-Net tuning would use up."""
    shutil.copytree(world.pack, user_domains_folder() / "my_faces")
    pixels = {}
    for strength in ("0", "0.5", "1"):
        one = ("--seed", "5", "--concept-scale", strength, "--save", f"{strength}.e4t")
        path = run(*world.personalize(*one)).lines[1]
        with open(path, "rb") as file:
            told = read_metadata(file.read())
        assert told.details["strength"] == float(strength)
        assert ("Concept strength: 0.5" in told.parameters) == (strength == "0.5")
        pixels[strength] = Image.open(path).tobytes()
    assert len(set(pixels.values())) == 3
    drawing = ("--base", str(world.base), "--steps", "2", "--seed", "5", "--concept-scale", "0.5")
    again = run("generate", "1.e4t", "S* on the beach", *drawing)  # a concept knows none of it
    assert Image.open(again.lines[0]).tobytes() == pixels["0.5"]
    assert run(*world.personalize("--concept-scale", "3")).code == 2


def test_without_metadata_only_the_mark_stays(run, world):
    path = run(*world.personalize("--no-metadata")).lines[0]
    with open(path, "rb") as file:
        data = file.read()
    told = read_metadata(data)
    assert told.ai_generated and told.by_e4t
    assert told.parameters is None and told.details is None
    assert b"beach" not in data and data.count(b"tEXt") == 0


def test_the_contact_sheet_shows_the_photo_first(run, world):
    ended = run(*world.personalize("--grid", "-n", "3", "--seed", "1", "-o", "sheet"))
    *paths, grid = ended.lines
    assert grid == "sheet/me-grid.png"
    with Image.open(grid) as sheet, Image.open(world.photo) as photo:
        assert sheet.width > 2 * 256 and sheet.height > 2 * 256
        shown = sheet.convert("RGB").crop((12, 12, 12 + 256, 12 + 256)).resize((32, 32))
        expected = photo.resize((32, 32))
        mean = sum(ImageChops.difference(shown, expected).resize((1, 1)).getpixel((0, 0))) / 3
        assert mean < 16
    with open(grid, "rb") as file:
        told = read_metadata(file.read())
    assert told.ai_generated
    assert [one["seed"] for one in told.details["pictures"]] == [1, 2, 3]
    assert run(*world.personalize("--grid", "-o", "sheet")).lines[-1] == "sheet/me-grid-2.png"


def test_a_saved_concept_draws_the_same_again(run, world):
    concept, first = run(*world.personalize("--save", "me.e4t", "--seed", "3")).lines
    assert concept == "me.e4t"
    again = run(
        "generate", "me.e4t", "S* on the beach", "--base", str(world.base), "--seed", "3",
        "--steps", "2",
    )  # fmt: skip
    assert again.code == 2 and "needs the domain 'my_faces'" in again.err
    install(world)
    again = run(
        "generate", "me.e4t", "S* on the beach", "--base", str(world.base), "--seed", "3",
        "--steps", "2",
    )  # fmt: skip
    assert again.code == 0, again.err
    assert pixels(again.lines[0]) == pixels(first)
    shown = run("info", "me.e4t").out
    assert "my_faces" in shown and "made again by tuning" in shown
    refused = run(*world.personalize("--save", "me.e4t"))
    assert refused.code == 2 and "not overwritten" in refused.err


def test_kept_weights_draw_without_tuning(run, world):
    install(world)
    first = run(*world.personalize("--save", "me.e4t", "--keep-weights", "--seed", "3")).lines[1]
    again = run(
        "generate", "me.e4t", "S* on the beach", "--base", str(world.base), "--seed", "3",
        "--steps", "2",
    )  # fmt: skip
    assert "tune" not in again.err.splitlines()[-1]
    assert pixels(again.lines[0]) == pixels(first)


def install(world):
    """Put the tiny pack among this user's own domains."""
    import shutil

    from e4t_cli.registry.discovery import user_domains_folder

    shutil.copytree(world.pack, user_domains_folder() / "my_faces")


def test_stdin_can_be_the_photo_or_the_prompts(run, world, monkeypatch):
    given = io.TextIOWrapper(io.BytesIO(world.photo.read_bytes()))
    monkeypatch.setattr(sys, "stdin", given)
    arguments = world.personalize("--seed", "2")
    arguments[2] = "-"
    piped = run(*arguments)
    assert piped.code == 0, piped.err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"S* on the beach\n")))
    read = run(*world.personalize("--seed", "2", prompts=("-",)))
    assert read.code == 0, read.err
    assert pixels(piped.lines[0]) == pixels(read.lines[0])


def test_a_concept_alone_needs_no_prompt(run, world, tmp_path):
    ended = run(*world.personalize("--save", "deep/me.e4t", prompts=()))
    assert ended.code == 0, ended.err
    assert ended.lines == ["deep/me.e4t"]
    assert (tmp_path / "deep" / "me.e4t").is_file()


def test_masks(run, world, tmp_path):
    mask = Image.new("L", (96, 96))
    mask.paste(255, (20, 20, 70, 70))
    mask.save(tmp_path / "mask.png")
    drawn = {}
    for choice in ("auto", "none", "mask.png"):
        ended = run(*world.personalize("--mask", choice, "--seed", "1", "--json"))
        assert ended.code == 0, ended.err
        drawn[choice] = json.loads(ended.out)["tuning"]["mask"]
    assert drawn == {"auto": False, "none": False, "mask.png": True}


def test_another_placeholder(run, world):
    arguments = world.personalize("--placeholder", "<me>", "--json", prompts=("<me> on the beach",))
    ended = run(*arguments)
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["placeholder"] == "<me>"


def test_bad_sampling_is_found_before_the_work(run, world):
    ended = run(*world.personalize("--scheduler", "magic"))
    assert ended.code == 2
    assert "no scheduler 'magic'" in ended.err and "dpm++" in ended.err
    assert "tune" not in ended.err


@pytest.mark.parametrize(("option", "value"), [("--device", "warp"), ("--dtype", "fp99")])
def test_bad_devices(run, world, option, value):
    ended = run(*world.personalize(option, value))
    assert ended.code == 2
    assert value in ended.err


def test_a_pack_for_another_base_is_refused(run, world, tmp_path):
    from tests.conftest import write_base

    other = write_base(tmp_path / "other", prediction_type="v_prediction")
    ended = run(*world.personalize()[:-6], "--base", str(other))
    assert ended.code == 5
    assert "was made for the base tiny" in ended.err


def test_a_base_without_a_pack_names_the_command(run, world, tmp_path):
    import shutil

    shutil.copytree(world.base, tmp_path / "fresh")
    card = tmp_path / "fresh" / "base.toml"
    card.write_text(card.read_text().replace('"tiny"', '"fresh"'))
    ended = run(*world.personalize()[:-6], "--base", "./fresh")
    assert ended.code == 4
    assert "e4t pretrain --domain my_faces --base fresh" in ended.err


def test_dry_run_plans_without_torch_or_traces(start, world, tmp_path):
    process = start(*world.personalize("--dry-run", "-n", "3"), env={"PYTHONPROFILEIMPORTTIME": "1"})
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "images" in out and "3" in out
    assert " torch\n" not in err
    assert not (tmp_path / "outputs").exists()


def test_dry_run_takes_the_placeholder_and_the_tuning_options(run, world):
    asked = world.personalize("--dry-run", "--json", "--placeholder", "<me>", prompts=("<me> on the beach", "a <me>"))
    ended = run(*asked, "--tuning", "lora", "--tune-steps", "7")
    assert ended.code == 0, ended.err
    plan = json.loads(ended.out)
    assert (plan["prompts"], plan["images"]) == (2, 2)
    tuning = plan["tuning"]  # under the names of Python and of the options, not those of files
    assert (tuning["method"], tuning["steps"], tuning["reg_weight"]) == ("lora", 7, 0.1)
    assert "lora_rank" in tuning and not {"embedding_penalty", "adapter_rank", "adapters_rate"} & tuning.keys()
    assert run(*world.personalize("--dry-run", "--placeholder", "<me>")).code == 2
    assert run(*world.personalize("--dry-run", "--tuning", "exact")).code == 2


def test_an_interrupted_command_keeps_what_was_saved(run, world, monkeypatch, tmp_path):
    from e4t_cli.images.results import GeneratedImage

    save = GeneratedImage.save

    def save_then_stop(self, *arguments, **options):
        path = save(self, *arguments, **options)
        if self.seed == 1:
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(GeneratedImage, "save", save_then_stop)
    ended = run(*world.personalize("-n", "4", "--seed", "0"))
    assert ended.code == 130
    assert "interrupted; 1 saved before" in ended.err
    names = [path.name for path in (tmp_path / "outputs").iterdir()]
    assert sorted(names) == ["me-s-on-the-beach-0.png", "me-s-on-the-beach-1.png"]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        ("MemoryError()", 6, "memory"),
        ("RuntimeError('CUDA out of memory')", 6, "memory ran out"),
        ("OSError(28, 'No space left on device')", 6, "the disk is full"),
        ("errors.DivergedError('tuning diverged')", 7, "diverged"),
        ("errors.IntegrityError('damaged')", 5, "damaged"),
    ],
)
def test_every_cause_has_its_code(run, world, monkeypatch, error, code, words):
    from e4t_cli import errors

    cause = eval(error, {"errors": errors})

    def fail(*arguments, **options):
        raise cause

    place = "images.results.write_atomically" if code == 6 and "space" in words + error else "training.tuning.tune"
    monkeypatch.setattr(f"e4t_cli.{place}", fail)
    ended = run(*world.personalize())
    assert ended.code == code, ended.err
    assert words in ended.err
    assert ended.out == ""


def test_pretrain_makes_a_domain_that_is_listed_and_works(run, world, tmp_path, monkeypatch):
    monkeypatch.setattr("e4t_cli.api.pretraining.training_templates", lambda domain: ("{}", "a photo of {}"))
    from tests.conftest import drawn_face

    (tmp_path / "data" / ".hidden").mkdir(parents=True)
    for index in range(3):
        drawn_face(index, 64)[0].save(tmp_path / "data" / f"{index}.png")
    (tmp_path / "data" / "broken.png").write_text("no picture")
    (tmp_path / "data" / ".hidden" / "x.png").write_bytes(b"")
    arguments = ["pretrain", "--domain", "my_dogs", "--descriptor", "dog", "--data", "data"]
    made = run(*arguments, "--base", str(world.base), "--steps", "1")
    assert made.code == 0, made.err
    assert made.lines[0].endswith("domains/my_dogs")
    assert "1 image was left out" in made.err and "broken.png" in made.err
    row = next(row for row in run("domains", "list").lines if row.startswith("my_dogs"))
    assert "tiny ready" in row
    drawn = run("personalize", "my_dogs", str(world.photo), "S* on the beach", "--base",
                str(world.base), "--steps", "1", "--tune-steps", "1")  # fmt: skip
    assert drawn.code == 0, drawn.err
    again = run(*arguments, "--base", str(world.base), "--steps", "1")
    assert again.code == 2 and "has weights for tiny already" in again.err
