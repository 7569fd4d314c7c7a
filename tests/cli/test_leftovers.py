"""What killed commands leave: shown and removed by `e4t cache`, and what the next run does with it."""

import json
import os
import time

import pytest
import torch
from safetensors.torch import save_file

from e4t_cli.errors import UsageError
from e4t_cli.files import staging_directory
from e4t_cli.formats.export_files import WRITER, check_free, commit, embedding_path, is_export
from e4t_cli.hub.paths import user_cache
from e4t_cli.registry.discovery import user_domains_folder
from e4t_cli.temporary import machine, temporary_path

ENDED = f"{machine()}-999999999-00000000~"


def test_cache_shows_and_removes_leftovers(run, tmp_path):
    store, month = user_domains_folder(), 40 * 24 * 3600
    kept = [tmp_path / "me.e4t", tmp_path / ".me.e4t.swp~", temporary_path(tmp_path / "running.e4t")]
    kept.append(store / ".young.checkpoints" / "step-00000001.safetensors")
    gone = [tmp_path / f".me.e4t.{ENDED}", tmp_path / "outputs" / f".a.png.{ENDED}"]
    gone += [user_cache() / "towers" / f".vit.{ENDED}" / "model.safetensors"]
    gone += [store / f".adding.{ENDED}" / "domain" / f".domain.toml.{ENDED}"]
    gone += [store / ".old.checkpoints" / "step-00000001.safetensors", store / ".removing-0123456789ab"]
    for path in (*kept, *gone):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")
    for path in (gone[-2], gone[-2].parent, gone[-1]):
        os.utime(path, (time.time() - month,) * 2)
    shown = [json.loads(line) for line in run("cache", "ls", "--json").lines]
    assert {(one["name"], one["kind"], one["size"]) for one in shown} == {
        ("me.e4t~", "leftover", 5), ("a.png~", "leftover", 5), ("vit~", "leftover", 5), ("adding~", "leftover", 5),
        ("removing~", "leftover", 5), ("checkpoints/old", "checkpoints", 5), ("checkpoints/young", "checkpoints", 5),
    }  # fmt: skip
    ended = run("cache", "prune", "-y")
    assert ended.code == 0, ended.err
    assert len(ended.lines) == 6
    assert all(path.exists() for path in kept) and not any(path.exists() for path in gone)
    assert run("cache", "rm", "checkpoints/young", "-y").code == 0
    assert not kept[-1].parent.exists()


@pytest.fixture
def made(tmp_path):
    """Put an export of two files together in a temporary folder."""

    def made(staging, target, value):
        for path in (staging / target.name, embedding_path(staging / target.name)):
            save_file({"x": torch.tensor([float(value)])}, path, {WRITER: "e4t"})
        return staging / target.name

    return made


def killed(target, made, value):
    """Leave what a run leaves that is killed between its two files; returns its temporary folder."""
    staging = target.parent / f".{target.name}.{ENDED}"
    staging.mkdir()
    made(staging, target, value)
    word = embedding_path(target)
    word.write_bytes((staging / word.name).read_bytes())
    return staging


def test_a_lone_word_of_a_killed_export_does_not_block_the_next(tmp_path, made):
    target = tmp_path / "me.safetensors"
    left = killed(target, made, 1)
    check_free(target, force=False)
    assert not left.exists() and list(tmp_path.iterdir()) == []
    with staging_directory(target) as staging:
        commit(made(staging, target, 2), target, force=False)
    assert sorted(os.listdir(tmp_path)) == ["me-word.safetensors", "me.safetensors"]


def test_the_leftovers_of_an_export_that_was_complete_go(tmp_path, made):
    target = tmp_path / "me.safetensors"
    left = killed(target, made, 1)
    (left / target.name).rename(target)
    with pytest.raises(UsageError, match="exists already"):
        check_free(target, force=False)
    assert sorted(os.listdir(tmp_path)) == ["me-word.safetensors", "me.safetensors"]


def test_a_word_of_somebody_else_stays(tmp_path, made):
    target = tmp_path / "me.safetensors"
    killed(target, made, 1)
    embedding_path(target).write_bytes(b"mine")
    with pytest.raises(UsageError, match="me-word.safetensors exists already"):
        check_free(target, force=False)
    with pytest.raises(UsageError, match="was not written by e4t"):
        check_free(target, force=True)
    assert embedding_path(target).read_bytes() == b"mine"


@pytest.mark.parametrize("appears", ["me.safetensors", "me-word.safetensors"])
def test_files_that_appear_meanwhile_stay(tmp_path, made, appears):
    target = tmp_path / "me.safetensors"
    check_free(target, force=False)
    with pytest.raises(UsageError, match=f"{appears} exists already"), staging_directory(target) as staging:
        written = made(staging, target, 1)
        (tmp_path / appears).write_bytes(b"mine")
        commit(written, target, force=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {appears: b"mine"}


def test_exports_are_recognised_by_content(tmp_path, made):
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    for name in ("model_index.json", "learned_word.safetensors", "README.md"):
        (folder / name).touch()
    assert is_export(folder)
    (tmp_path / "link").symlink_to(folder)
    assert not is_export(tmp_path / "link")
    (folder / "picture.png").touch()
    assert not is_export(folder)
    (folder / "picture.png").unlink()
    (folder / "learned_word.safetensors").unlink()
    assert not is_export(folder)
    assert is_export(made(tmp_path, tmp_path / "me.safetensors", 1))
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    assert not is_export(tmp_path / "other.safetensors") and not is_export(tmp_path / "absent")
