"""Files that the user named, and files that are found by their names: nothing lost, nothing foreign replaced."""

import errno
import io
import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.numpy import save_file

from e4t_cli.cli.options import PromptFlags
from e4t_cli.errors import UsageError
from e4t_cli.formats.concept import Concept
from e4t_cli.images.png_metadata import GenerationRecord, read_metadata
from e4t_cli.images.results import GeneratedImage

ME = str(Path(__file__).parents[2] / "examples" / "me.png")


def record(**fields):
    defaults = {"prompt": "S* x", "seed": 7, "steps": 1, "guidance": 1.0, "scheduler": "ddim", "width": 8, "height": 8}
    return GenerationRecord(**{**defaults, "domain": "cat", "versions": {}, **fields})


def picture(name="", **fields):
    image = Image.new("RGB", (8, 8))
    return GeneratedImage(image=image, prompt="S* on the beach", seed=1, record=record(**fields), name=name)


def fails(number):
    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return fail


# ── names ──


@pytest.mark.parametrize(
    ("own", "given", "begin"),
    [
        ("tiger", None, "tiger"),
        ("", None, "cat"),  # stdin, bytes: the domain
        ("猫", None, "cat"),  # nothing is left in ASCII
        ("tiger", "Tom & Co", "tom-co"),
        ("IMG_2024.05.01", None, "img-2024-05-01"),
        ("../../etc/x", None, "etc-x"),
    ],
)
def test_names_say_who(tmp_path, own, given, begin):
    path = picture(own).save(tmp_path, name=given)
    assert path == tmp_path / f"{begin}-s-on-the-beach-1.png"


def test_two_photos_with_one_seed_are_told_apart(run, world, tmp_path):
    photo = world.photo.read_bytes()
    for name in ("tiger", "tom"):
        (tmp_path / f"{name}.png").write_bytes(photo)
        command = world.personalize("--seed", "1", "--grid", "--save", f"{name}.e4t")
        command[2] = f"{name}.png"
        assert run(*command).code == 0
    names = {path.name for path in (tmp_path / "outputs").iterdir()}
    assert names == {f"{who}-{what}.png" for who in ("tiger", "tom") for what in ("grid", "s-on-the-beach-1")}
    for path in (tmp_path / "outputs").iterdir():  # a file's name may be a person's
        assert not any(who in path.read_bytes() for who in (b"tiger", b"tom", bytes(tmp_path)))


def test_names_of_an_option_and_of_a_stream(run, world, monkeypatch):
    assert run(*world.personalize("--seed", "1", "--name", "Rex!")).lines == ["outputs/rex-s-on-the-beach-1.png"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(world.photo.read_bytes())))
    command = world.personalize("--seed", "1")
    command[2] = "-"
    assert run(*command).lines == ["outputs/my-faces-s-on-the-beach-1.png"]


# ── -o FILE.png ──


def test_one_picture_under_a_name(run, world, tmp_path):
    ended = run(*world.personalize("-o", "deep/beach.png", "--seed", "1"))
    assert (ended.code, ended.lines) == (0, ["deep/beach.png"]), ended.err
    first = (tmp_path / "deep/beach.png").read_bytes()
    assert read_metadata(first).details["seed"] == 1
    refused = run(*world.personalize("-o", "deep/beach.png"))
    assert refused.code == 2 and "--force replaces it" in refused.err
    again = run(*world.personalize("-o", "deep/beach.png", "--seed", "2", "--force", "--no-metadata"))
    assert (again.code, again.lines) == (0, ["deep/beach.png"])
    assert (tmp_path / "deep/beach.png").read_bytes() != first
    # A picture without metadata is e4t's too.
    assert run(*world.personalize("-o", "deep/beach.png", "--force", "--dry-run")).code == 0
    (tmp_path / "folder.png").mkdir()
    assert run(*world.personalize("-o", "folder.png", "--seed", "1")).lines == ["folder.png/me-s-on-the-beach-1.png"]


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["-o", "x.png", "-n", "2"], "for 2 pictures"),
        (["-o", "x.png", "--seed", "1-3"], "for 3 pictures"),
        (["-o", "x.png", "--grid"], "for a contact sheet"),
        (["-o", "x.png", "--name", "rex"], "for --name"),
        (["-o", "x.jpg"], "PNG files, not .jpg"),
        (["-o", "photo.png"], "photo.png"),  # not made by e4t
        (["--save", "photo.png"], "photo.png"),
        (["--save", "folder.e4t"], "is a folder"),
        (["--save", "lora.safetensors"], "lora.safetensors"),
        (["--save-prepared", "photo.png"], "photo.png"),
    ],
)
def test_refused_before_the_work(run, world, tmp_path, more, words, force):
    """Also by --dry-run, which makes no folder. What e4t did not write is not replaced, --force or not."""
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    (tmp_path / "folder.e4t").mkdir()
    save_file({}, tmp_path / "lora.safetensors", metadata={"e4t": '{"schema": 1}'})
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    ended = run(*world.personalize(*more, *force, "--dry-run"))
    assert ended.code == 2 and words in ended.err and ended.out == ""
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


# ── a name that is taken meanwhile, a full disk ──


@pytest.fixture
def taken(monkeypatch):
    """Somebody writes these files while a concept is tuned."""
    from e4t_cli.api.session import Session

    def take(*paths):
        tune = Session.tune

        def tune_then(self, *arguments, **options):
            for path in paths:
                Path(path).write_bytes(b"theirs")
            return tune(self, *arguments, **options)

        monkeypatch.setattr(Session, "tune", tune_then)

    return take


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_nothing_is_lost_or_replaced_if_a_name_is_taken_meanwhile(run, world, tmp_path, taken, force):
    taken("me.e4t", "beach.png")
    ended = run(*world.personalize("--save", "me.e4t", "-o", "beach.png", *force))
    assert ended.code == 2
    assert ended.lines == ["me-2.e4t", "beach-2.png"]
    assert "saved as me-2.e4t, because me.e4t appeared meanwhile; as beach-2.png" in ended.err
    assert (tmp_path / "me.e4t").read_bytes() == (tmp_path / "beach.png").read_bytes() == b"theirs"
    Concept.load(tmp_path / "me-2.e4t")


def test_force_replaces_a_concept(run, world, tmp_path):
    assert run(*world.personalize("--save", "me.e4t", "--seed", "1", prompts=())).code == 0
    assert run(*world.personalize("--save", "me.e4t", "--seed", "2", prompts=())).code == 2
    assert Concept.load(tmp_path / "me.e4t").seed == 1
    ended = run(*world.personalize("--save", "me.e4t", "--seed", "2", "--force", prompts=()))
    assert (ended.code, ended.lines) == (0, ["me.e4t"])
    assert Concept.load(tmp_path / "me.e4t").seed == 2


def test_the_concept_is_there_before_the_pictures(run, world, tmp_path, monkeypatch):
    monkeypatch.setattr("e4t_cli.images.results.write_atomically", fails(errno.ENOSPC))
    ended = run(*world.personalize("--save", "me.e4t", "--keep-weights"))
    assert ended.code == 6 and "the disk is full" in ended.err
    assert ended.lines == ["me.e4t"]
    assert Concept.load(tmp_path / "me.e4t").weights


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, 6), (errno.EDQUOT, 6), (errno.EACCES, 2), (errno.EROFS, 2)]
)
@pytest.mark.parametrize("more", [["--save", "me.e4t"], ["-o", "x.png"], ["--save-prepared", "p.png"], ["--grid"]])
def test_what_the_disk_refuses_has_its_code(run, world, monkeypatch, more, number, code):
    for module in ("cli.outputs", "formats.concept", "images.results"):
        monkeypatch.setattr(f"e4t_cli.{module}.write_atomically", fails(number))
    prompts = () if more[0] == "--save" else ("S* x",)
    ended = run(*world.personalize(*more, prompts=prompts))
    assert ended.code == code and ended.out == ""
    assert ("make room" in ended.err) == (code == 6) and "bug of e4t" not in ended.err


def test_a_prepared_picture_and_its_mask_are_replaced_together(run, tmp_path):
    command = ["personalize", "face", ME, "--base", "mini", "--save-prepared", "p.png"]
    assert run(*command).lines == ["p.png", "p-mask.png"]
    assert run(*command).code == 2
    assert run(*command, "--force").lines == ["p.png", "p-mask.png"]
    assert run(*command, "--force", "--mask", "none").lines == ["p.png"]
    assert not (tmp_path / "p-mask.png").exists()  # it was of the other picture
    Image.new("L", (8, 8)).save(tmp_path / "p-mask.png")
    assert run(*command, "--force").code == 2


@pytest.mark.slow
def test_four_at_once(start, world, tmp_path):
    """One has the name, the others say where their concept is; every file is whole."""
    processes = [start(*world.personalize("--save", "same.e4t", "--seed", str(seed))) for seed in range(4)]
    told = [(process, *process.communicate(timeout=300)) for process in processes]
    assert sorted(process.returncode for process, _, _ in told) == [0, 2, 2, 2]
    for seed, (process, out, err) in enumerate(told):
        concept, image = out.splitlines()
        assert Concept.load(tmp_path / concept).seed == seed and (tmp_path / image).is_file()
        assert (concept == "same.e4t") == (process.returncode == 0)
        assert process.returncode == 0 or f"saved as {concept}" in err


# ── seeds ──


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None), ("7", 7), ("1,4", [1, 4]), ("1-4", [1, 2, 3, 4]), ("1-2, 9", [1, 2, 9]), ("5-5", 5),
        ("4294967295", 2**32 - 1),
    ],
)  # fmt: skip
def test_seeds(given, expected):
    assert PromptFlags(seed=given).seeds() == expected


@pytest.mark.parametrize(
    "given", ["", "x", "-1", "1-", "4-1", "1,,2", "1.5", "4294967296", "0-4294967295", "١", "1 2", "1" * 5000]
)
def test_no_seeds(given):
    with pytest.raises(UsageError, match="is no seed"):
        PromptFlags(seed=given).seeds()


def test_a_list_of_seeds_is_one_picture_each(run, world):
    several = [json.loads(line) for line in run(*world.personalize("--seed", "6,2", "--json")).lines]
    assert [one["seed"] for one in several] == [6, 2]
    assert [one["tuning"]["seed"] for one in several] == [6, 6]
    assert run(*world.personalize("--seed", "1,2", "-n", "2")).code == 2


@pytest.mark.parametrize(
    ("options", "same"),
    [
        (("--save", "a.e4t", "-o", "a.e4t"), None),  # a folder of that name is refused before
        (("--save", "a.png", "-o", "./a.png"), "-o and --save"),
        (("--save", "a", "-o", "a"), "-o and --save"),
        (("--save-prepared", "a.png", "-o", "a.png", "--force"), "-o and --save-prepared"),
        (("--save-prepared", "a.png", "-o", "a-mask.png"), "-o and the mask of --save-prepared"),
        (("--save-prepared", "a.png", "--save", "b/../a.png"), "--save and --save-prepared"),
        (("-o", "a.png", "--save", "a.png/b.e4t"), "-o and --save"),
    ],
)
def test_two_outputs_with_one_name_are_refused_before_the_work(world, run, tmp_path, options, same):
    """The second would be saved elsewhere, or with --force replace the first."""
    before = set(os.listdir(tmp_path))
    for more in ((), ("--dry-run",)):
        ended = run(*world.personalize(*options, *more))
        assert ended.code == 2 and ended.out == "" and set(os.listdir(tmp_path)) == before
        assert same is None or f"{same} have the same name" in ended.err


def test_folders_may_be_shared(world, run):
    ended = run(*world.personalize("-o", "a", "--save-prepared", "a", "--save", "a/me.e4t"))
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("name", ["me.e4t", "me.safetensors", "me.JPG"])
def test_a_folder_is_not_called_as_a_file_is(world, run, name):
    ended = run(*world.personalize("-o", name))
    assert ended.code == 2 and "pictures are PNG files" in ended.err and not os.path.exists(name)


def test_json_has_todays_names(world, run):
    ended = run(*world.personalize("--json", "--tuning", "lora", "-o", "x"))
    record = json.loads(ended.lines[0])
    assert {"concept_scale", "weights_fingerprint"} <= record.keys()
    assert {"reg_weight", "lora_rank", "lora_rate"} <= record["tuning"].keys() and record["tuning"]["method"] == "lora"
    for stored in ("strength", "pack_", "embedding_penalty", "adapter"):
        assert stored not in json.dumps(record)


def test_files_that_are_no_concepts(world, run, tmp_path):
    """What they are is said, in place of what the library that reads tensors says."""
    from safetensors.torch import save_file
    from torch import zeros

    (tmp_path / "me.txt").write_text("a prompt")
    (tmp_path / "cut.e4t").write_bytes((9999).to_bytes(8, "little") + b"{")
    save_file(
        {"lora_unet_a.lora_down.weight": zeros(2, 2), "lora_unet_a.alpha": zeros(())}, tmp_path / "l.safetensors"
    )
    cases = {
        str(world.photo): (3, ""), "me.txt": (3, "is a text that e4t does not know"),
        "l.safetensors": (3, "is no concept, its type is 'lora'"), "cut.e4t": (5, "is damaged"),
        ".": (2, ". is a folder"), "none.e4t": (2, "there is no file none.e4t"),
    }  # fmt: skip
    for name, (code, says) in cases.items():
        for command in (("generate", name, "S*"), ("generate", name, "S*", "--dry-run"), ("export", name, "out")):
            ended = run(*command)
            assert ended.code == code and says in ended.err, (name, ended.err)
            assert "deserializing" not in ended.err and "'e4t'" not in ended.err
