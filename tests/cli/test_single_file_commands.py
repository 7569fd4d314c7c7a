"""`--base model.safetensors`: the pictures are those of the folder with the same weights."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

import e4t_cli
from e4t_cli.formats import stable_diffusion
from e4t_cli.formats.concept import Concept
from e4t_cli.hub import resolve
from e4t_cli.hub.single_file import list_converted_files
from e4t_cli.images.png_metadata import read_metadata
from e4t_cli.registry.config import PretrainingConfig, TuningConfig
from e4t_cli.registry.domain import Domain
from tests.conftest import drawn_face
from tests.single_files import write_small_file

PROMPT = "S* on the beach"


@pytest.fixture(scope="module")
def written(base_folder, tmp_path_factory):
    """The small base as a folder and a file, domain weights for it, and a photo."""
    root = tmp_path_factory.mktemp("single")
    small = write_small_file(root)
    shutil.move(small.file, root / "small.safetensors")
    domain = Domain(
        name="look", descriptor="face",
        tuning=TuningConfig(steps=1, base_learning_rate=1e-3, reg_weight=0.1, batch_size=2),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolve, "fetch_image_tower", lambda access: base_folder / "image_tower")
        e4t_cli.pretrain(
            domain, [drawn_face(index, 64)[0] for index in range(2)], base=small.folder,
            config=PretrainingConfig(steps=1, batch_size=2), tuning=domain.tuning, folder=root / "look",
        )  # fmt: skip
    drawn_face(1, 96)[0].save(root / "me.png")
    return small, root


@pytest.fixture
def small(written, base_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("E4T_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("fetch_image_tower", "tower_folder"):
        monkeypatch.setattr(resolve, name, lambda *arguments: base_folder / "image_tower")
    written[0].accept(monkeypatch)
    return written[0]


def picture_of(ended):
    """Return the pixels of the one picture that was written, b"" if none was."""
    paths = [line for line in ended.lines if line.endswith(".png")]
    return Image.open(paths[0]).tobytes() if paths else b""


@pytest.fixture
def personalize(run, written):
    """Run `personalize` with a base; returns how it ended, and the picture."""
    root = written[1]
    added = run("domains", "add", str(root / "look"))
    assert added.code == 0, added.err

    def personalize(base, *more, prompt=PROMPT):
        ended = run(
            "personalize", "look", str(root / "me.png"), prompt, "--base", str(base), "--seed", "3",
            "--steps", "1", "--tune-steps", "1", "--device", "cpu", *more,
        )  # fmt: skip
        return ended, picture_of(ended)

    return personalize


def test_the_pictures_are_those_of_the_folder(small, written, run, personalize):
    root = written[1]
    _, expected = personalize(small.folder, "-o", "folder")
    ended, picture = personalize(root / "small.safetensors", "-o", "file", "--save", "me.e4t")
    assert ended.code == 0, ended.err
    assert picture == expected and expected
    assert "has no safety checker" in ended.err
    # The concept finds its base by name, without the file.
    ended = run("generate", "me.e4t", PROMPT, "--seed", "3", "--steps", "1", "-o", "again", "--offline")
    assert ended.code == 0, ended.err
    assert picture_of(ended) == expected
    assert [one.name for one in list_converted_files()] == ["small"]
    assert "converted base" in run("cache", "ls").out
    assert run("cache", "rm", "small", "--yes").code == 0
    ended = run("generate", "me.e4t", PROMPT, "--offline")
    assert ended.code == 4 and ".safetensors" in ended.err


def test_an_export_is_a_base_again(small, written, run, personalize, monkeypatch):
    """One file and a folder of the same concept, each personalized with the weights of the base it came from."""
    monkeypatch.setattr(stable_diffusion, "SINGLE_FILE_CONFIG", {"layers_per_block": 2})
    ended, _ = personalize(written[1] / "small.safetensors", "--save", "me.e4t", "-o", "one")
    assert ended.code == 0, ended.err
    for target in (["tuned.safetensors"], ["./folder", "--word", "separate"]):
        ended = run("export", "me.e4t", *target)
        assert ended.code == 0, ended.err
    pictures = []
    for base in ("tuned.safetensors", "./folder"):
        ended, _ = personalize(base, "-o", "none")
        assert ended.code in (4, 5) and not ended.out
        ended, picture = personalize(
            base, "--domain-base", "small", "-o", f"from-{len(pictures)}", "--save", f"{len(pictures)}.e4t"
        )
        assert ended.code == 0, ended.err
        assert "nobody has measured the quality" in ended.err
        pictures.append(picture)
    assert pictures[0] == pictures[1] and pictures[0]
    assert Concept.load("0.e4t").domain_base == "small"
    assert read_metadata(next(Path("from-0").glob("*.png")).read_bytes()).details["domain_base"] == "small"
    ended = run("generate", "0.e4t", PROMPT, "--seed", "3", "--steps", "1", "-o", "again")
    assert ended.code == 0, ended.err
    assert picture_of(ended) == pictures[0]
    assert json.loads(run("info", "0.e4t", "--json").out)["recorded"]["domain_base"] == "small"
    assert run("export", "0.e4t", "again.safetensors").code == 0


def test_a_plan_converts_nothing_and_fetch_does(small, written, run, personalize):
    file = written[1] / "small.safetensors"
    ended, _ = personalize(file, "--dry-run")
    assert ended.code == 0, ended.err
    assert not list_converted_files()
    assert json.loads(run("info", str(file), "--json").out)["model"] == "a Stable Diffusion 1 or 2"
    ended = run("fetch", str(file))
    assert ended.code == 0, ended.err
    assert ended.lines == [str(list_converted_files()[0].folder)]
    ended, _ = personalize(file, "--dry-run", "--domain-base", "elsewhere")
    assert ended.code == 4 and "elsewhere" in ended.err


def test_a_wrong_file_ends_with_one_sentence(small, run, personalize, tmp_path):
    drawn_face(0, 64)[0].save(tmp_path / "model.safetensors", "PNG")
    before = sorted(tmp_path.rglob("*"))
    for more in ([], ["--dry-run"]):
        ended, _ = personalize(tmp_path / "model.safetensors", *more)
        assert ended.code == 5 and not ended.out and "is a picture" in ended.err
    ended, _ = personalize("owner/none.safetensors")
    assert ended.code == 2 and "does not exist" in ended.err
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "outputs") == before
