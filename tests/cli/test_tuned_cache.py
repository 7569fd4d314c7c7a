"""The cache of tuned concepts: what comes from it is what tuning gives, and nothing fails because of it."""

import errno
import json
import os
import shutil
import stat
from dataclasses import replace

import pytest
import torch

import e4t_cli
from e4t_cli.formats import tuned_cache
from e4t_cli.formats.concept import Concept
from e4t_cli.formats.tuned_cache import is_tuned
from e4t_cli.hub import tuned_files
from e4t_cli.hub.paths import user_data
from e4t_cli.hub.tuned_files import tuned_folder
from tests.faults import faults


@pytest.fixture(autouse=True)
def cache(monkeypatch, world):
    """A cache, and the domain of the tiny world among the user's."""
    monkeypatch.setenv("E4T_TUNED_CACHE", "1")
    shutil.copytree(world.pack, user_data() / "domains" / "my_faces")


@pytest.fixture
def tunings(monkeypatch):
    """The configs of the tunings that were computed."""
    from e4t_cli.training import tuning

    computed, tune = [], tuning.tune

    def counted(model, pretrained, photos, config, **rest):
        computed.append(config)
        return tune(model, pretrained, photos, config, **rest)

    monkeypatch.setattr(tuning, "tune", counted)
    return computed


@pytest.fixture
def draw(world):
    def draw(**given):
        given = {"base": world.base, "tune_steps": 2, "sampling": {"steps": 2}, "seed": 5, **given}
        return e4t_cli.personalize(str(world.pack), world.photo, "S* on the beach", keep_weights=True, **given)

    return draw


def again(concept, base, **given):
    """Generate from a concept without its stored weights."""
    concept = replace(concept, weights={})
    return e4t_cli.generate(concept, "S* on the beach", base=base, sampling={"steps": 2}, seed=5, **given)


def looks(result):
    return [one.image.tobytes() for one in result.images]


def entries():
    return sorted(path.name for path in tuned_folder().glob("*"))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_comes_from_the_cache_is_what_tuning_gives(draw, world, tunings, method, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("E4T_TUNED_CACHE", "0")
        expected = draw(tuning=method)
    assert len(tunings) == 1 and entries() == []
    first, second = draw(tuning=method), draw(tuning=method)
    assert len(tunings) == 2 and len(entries()) == 1
    for one in (first, second):
        assert looks(one) == looks(expected)
        assert sorted(one.concept.weights) == sorted(expected.concept.weights)
        assert all(torch.equal(value, expected.concept.weights[key]) for key, value in one.concept.weights.items())
    assert looks(again(first.concept, world.base)) == looks(expected)
    # A scale needs the base as it was before the tuning.
    scaled = {"sampling": {"steps": 2, "concept_scale": 0.5}}
    known = draw(tuning=method, **scaled)
    monkeypatch.setenv("E4T_TUNED_CACHE", "0")
    assert len(tunings) == 2 and looks(draw(tuning=method, **scaled)) == looks(known) != looks(expected)


def test_a_saved_concept_is_found(draw, world, tunings, tmp_path):
    made = draw().concept
    replace(made, weights={}).save(tmp_path / "me.e4t")
    again(Concept.load(tmp_path / "me.e4t"), world.base)
    assert len(tunings) == 1


def test_everything_that_the_result_depends_on_is_another_entry(draw, world, tunings, tmp_path, monkeypatch):
    concept = draw().concept
    others = [
        {"seed": 6},
        {"tune_steps": 3},
        {"tuning": "lora"},
        {"dtype": "bf16"},
    ]
    for count, given in enumerate(others, 2):
        draw(**given)
        assert len(tunings) == len(entries()) == count
    again(replace(concept, image_features=concept.image_features * 2), world.base)
    assert len(tunings) == len(entries()) == 6
    pixels = concept.prepared.image.copy()
    pixels.putpixel((0, 0), (1, 2, 3))
    again(replace(concept, prepared=replace(concept.prepared, image=pixels)), world.base)
    assert len(tunings) == len(entries()) == 7
    torch.set_num_threads(2)
    again(concept, world.base)
    torch.set_num_threads(1)
    assert len(tunings) == len(entries()) == 8
    monkeypatch.setattr(tuned_cache, "__version__", "9")
    again(concept, world.base)
    assert len(tunings) == len(entries()) == 9
    again(concept, world.base)
    assert len(tunings) == 9


def test_the_same_weights_in_another_dtype_are_another_entry(draw, world, tunings, tmp_path):
    """A fingerprint is that of a base in float32 and in float16."""
    from safetensors.torch import load_file, save_file

    draw()
    copied = tmp_path / "copied"
    shutil.copytree(world.base, copied)
    path = copied / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(path), path, {"format": "pt"})
    draw(base=copied)
    assert len(tunings) == 2


def test_a_model_of_the_caller_is_tuned_each_time(draw, model, tunings):
    """It may have been changed."""
    for _ in range(2):
        draw(base=model)
    assert len(tunings) == 2 and entries() == []


def test_a_tuning_with_a_note_is_not_kept(draw, tunings, monkeypatch):
    """The note would be missing the next time; and where memory ran out, the way was another than planned."""
    from e4t_cli.training import tuning

    asked, gradients = [], tuning.Trainer.gradients

    def short_of_memory(self, step):
        if len(asked) < 1:
            asked.append(step)
            raise MemoryError
        return gradients(self, step)

    monkeypatch.setattr(tuning.Trainer, "gradients", short_of_memory)
    assert any("memory ran out" in note for note in draw().notes)
    assert entries() == []


def damage_end(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        damage_end,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b"\xff" * 4000),
    ],
    ids=["bit", "empty", "short", "other"],
)
def test_a_damaged_entry_is_replaced(draw, world, tunings, damage):
    first = draw()
    (path,) = tuned_folder().iterdir()
    whole = path.read_bytes()
    damage(path)
    assert looks(draw()) == looks(first)
    assert len(tunings) == 2 and path.read_bytes() == whole and entries() == [path.name]


def test_only_the_user_can_read_it(draw):
    draw()
    (path,) = tuned_folder().iterdir()
    assert stat.S_IMODE(tuned_folder().stat().st_mode) == 0o700 and stat.S_IMODE(path.stat().st_mode) == 0o600


def test_it_is_bounded_and_the_longest_unused_goes_first(draw, tunings, monkeypatch):
    draw(seed=1)
    size = tuned_files.tuned_files()[0].stat().st_size
    monkeypatch.setenv("E4T_TUNED_CACHE", str(4.5 * size / 1e9))
    for seed in (2, 3, 4):
        draw(seed=seed)
    assert len(entries()) == 4
    draw(seed=1)
    draw(seed=5)
    assert len(entries()) == 4 and len(tunings) == 5
    draw(seed=1)
    assert len(tunings) == 5  # used since, so kept
    draw(seed=2)
    assert len(tunings) == 6 and len(entries()) == 4


def test_nothing_large_is_kept(draw, tunings, monkeypatch):
    details = []
    monkeypatch.setenv("E4T_TUNED_CACHE", "0.000001")
    draw(on_progress=lambda event: details.append(event.detail))
    assert entries() == [] and any("E4T_TUNED_CACHE=1" in one for one in details)


@pytest.mark.parametrize("step", range(8))
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_is_no_failure(draw, tunings, monkeypatch, tmp_path, step, number):
    monkeypatch.setenv("E4T_CACHE_DIR", str(tmp_path / "own"))
    with faults(tmp_path / "own", step, OSError(number, os.strerror(number)), lasting=True) as seen:
        found = draw()
    assert len(found.images) == 1 and found.notes == () and len(tunings) == 1
    assert seen.reached == (entries() == []) and all(name.endswith(".safetensors") for name in entries())


@pytest.mark.parametrize("place", ["taken", "/dev/null/x"])
def test_a_cache_that_cannot_be_a_folder_is_no_failure(draw, tunings, monkeypatch, tmp_path, place):
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("E4T_CACHE_DIR", str(tmp_path / place))
    details = []
    found = draw(on_progress=lambda event: details.append(event.detail))
    assert len(found.images) == 1 and found.notes == () and len(tunings) == 1
    assert any("not kept in the cache" in one for one in details)


def test_a_number_of_gigabytes_is_asked_for(run, world, monkeypatch):
    for wrong in ("much", "-1", "nan", "inf"):
        monkeypatch.setenv("E4T_TUNED_CACHE", wrong)
        ended = run(*world.personalize())
        assert ended.code == 2 and "E4T_TUNED_CACHE" in ended.err and "tune" not in ended.err.split("\n")[0]


def test_commands_show_and_remove_it(run, world, tmp_path, monkeypatch):
    assert run(*world.personalize("--seed", "3", "--save", "me.e4t")).code == 0
    plan = run("generate", "me.e4t", "S* on the beach", "--base", str(world.base), "--dry-run", "--json")
    assert json.loads(plan.out)["tuned_before"] is True
    assert is_tuned(Concept.load(tmp_path / "me.e4t"))
    ended = run("generate", "me.e4t", "S* on the beach", "--base", str(world.base), "--steps", "2", "-v")
    assert ended.code == 0 and "tuned before" in ended.err and "loss" not in ended.err
    (item,) = [json.loads(line) for line in run("cache", "ls", "--json").out.splitlines()]
    assert (item["name"], item["kind"], item["count"]) == ("tuned", "tuned concepts", 1)
    assert item["size"] == next(tuned_folder().iterdir()).stat().st_size
    assert "tuned concepts" in run("cache", "ls").out
    assert run("cache", "prune", "-y").out == ""
    path = next(tuned_folder().iterdir())
    os.utime(path, (1e9, 1e9))
    assert run("cache", "prune", "-y").out.strip() == str(path) and entries() == []
    assert run(*world.personalize("--seed", "3")).code == 0 and len(entries()) == 1
    assert run("cache", "rm", "tuned", "-y").code == 0 and not tuned_folder().exists()
    plan = run("generate", "me.e4t", "S* on the beach", "--base", str(world.base), "--dry-run", "--json")
    assert json.loads(plan.out)["tuned_before"] is False
