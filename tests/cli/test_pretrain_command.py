"""`e4t pretrain`: what it takes, what it says, what it leaves (rows R5 to R7 of the faults)."""

import dataclasses
import inspect
import json
import shutil

import pytest

from e4t_cli.api.options import PretrainOptions
from e4t_cli.cli.pretrain import pretrain as command
from e4t_cli.registry.discovery import user_domains_folder
from tests.conftest import drawn_face


@pytest.fixture(autouse=True)
def _short_sentences(monkeypatch):
    """The tiny base reads sixteen tokens and spells most words."""
    monkeypatch.setattr("e4t_cli.api.pretraining.training_templates", lambda domain: ("{}", "a photo of {}"))


@pytest.fixture
def dogs(tmp_path):
    """A folder of twelve drawings."""
    folder = tmp_path / "dogs"
    folder.mkdir()
    for index in range(12):
        drawn_face(index, 64)[0].save(folder / f"{index:02}.png")
    return folder


@pytest.fixture
def pretrain(run, world, dogs):
    def pretrain(*more, data="dogs", name="my_dogs"):
        given = {"--base": str(world.base), "--steps": "2", "--batch": "4"}
        for option in more:
            given.pop(option, None)
        rest = [word for pair in given.items() for word in pair]
        return run("pretrain", "--domain", name, "--data", str(data), *rest, *more)

    return pretrain


def made(name="my_dogs"):
    return user_domains_folder() / name


def left(folder):
    return sorted(path.name for path in folder.rglob("*"))


# ── the descriptor ──


def test_the_descriptor_is_found_in_the_name_and_said(pretrain):
    ended = pretrain()
    assert ended.code == 0, ended.err
    assert "the descriptor is 'dog'" in ended.err
    assert ended.lines == [str(made())]
    assert 'descriptor = "dog"' in (made() / "domain.toml").read_text()


def test_names_and_words_that_do_not_do(pretrain):
    ended = pretrain(name="zebras")
    assert ended.code == 2
    assert "no word of 'zebras' is one token to the base tiny" in ended.err
    assert "--descriptor WORD, such as" in ended.err
    ended = pretrain("--descriptor", "zebra", name="zebras")
    assert ended.code == 2 and "tokens to the base tiny; it has to be one" in ended.err
    ended = pretrain(
        "--descriptor",
        "dog",
        name="zebras",
    )
    assert ended.code == 0, ended.err
    assert "the descriptor is" not in ended.err


# ── the numbers ──


def test_numbers_change_the_recipe_and_stand_on_the_card(pretrain):
    import tomllib

    ended = pretrain("--steps", "3", "--batch", "2", "--base-lr", "1e-5", "--reg-weight", "0.5")
    assert ended.code == 0, ended.err
    assert "learning rate 2e-05 = 1e-05 × batch 2 × 1 process" in ended.err
    card = tomllib.loads((made() / "domain.toml").read_text())
    numbers = card["pretraining"]
    assert (numbers["steps"], numbers["batch_size"]) == (3, 2)
    assert (numbers["base_learning_rate"], numbers["embedding_penalty"]) == (1e-5, 0.5)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--base-lr", "0", "base_learning_rate must be above 0"),
        ("--base-lr", "nan", "base_learning_rate must be above 0"),
        ("--reg-weight", "-1", "reg_weight must be 0 or more"),
        ("--cache", "maybe", "there is no cache 'maybe'"),
        ("--steps", "0", "--steps"),
    ],
)
def test_numbers_out_of_range(pretrain, option, value, words):
    ended = pretrain(option, value)
    assert ended.code == 2
    assert words in ended.err


def test_the_command_writes_no_default_twice():
    ours = {field.name: field.default for field in dataclasses.fields(PretrainOptions)}
    other = {"batch": "batch_size", "base_lr": "base_learning_rate", "tracker": "trackers"}
    checked = set()
    for name, parameter in inspect.signature(command).parameters.items():
        known = other.get(name, name)
        if known in ours:
            checked.add(known)
            assert (parameter.default or ()) == (ours[known] or ()), name
    assert set(ours) - checked == {"stop", "on_progress", "addons"}  # `pretrain` refuses LoRAs and the like


# ── the pictures ──


def test_R5_bad_pictures_are_named_in_a_log_that_stays(pretrain, dogs):
    (dogs / "05.png").write_bytes(b"no picture")
    (dogs / "06.png").write_bytes((dogs / "07.png").read_bytes()[:100])
    (dogs / "05.txt").write_text("a dog")
    ended = pretrain()
    assert ended.code == 0, ended.err
    assert "2 images were left out" in ended.err
    log = (made() / "training" / "left-out.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in log] == ["05.png", "06.png"]
    assert f"left out are named in {made()}/training/left-out.tsv" in ended.err
    assert "images = 10" in (made() / "domain.toml").read_text()


def test_a_resumed_run_counts_the_bad_pictures_of_the_killed_one(pretrain, dogs, monkeypatch):
    """Killed after its last step, with all pictures seen: the next run opens none, and says the same of them."""
    for index in range(3):
        (dogs / f"0{index}.png").write_bytes(b"no picture")
    options = ("--cache", "off", "--steps", "6", "--checkpoint-every", "1", "--batch", "2")

    def killed(self, trained, force):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("e4t_cli.api.pretraining.PretrainingRun.finish", killed)
        assert pretrain(*options).code == 130
    assert pretrain(*options).code == 0
    assert "images = 9" in (made() / "domain.toml").read_text()
    log = (made() / "training" / "left-out.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in log] == ["00.png", "01.png", "02.png"]


def test_a_new_run_forgets_the_bad_pictures_of_one_that_was_given_up(pretrain):
    work = user_domains_folder() / ".my_dogs.checkpoints"
    work.mkdir(parents=True)
    (work / "left-out.tsv").write_text("of/others.png\tit is damaged\n")
    assert pretrain("--cache", "off").code == 0
    assert not list(made().rglob("left-out.tsv"))


def test_killed_after_the_end_it_says_where_the_domain_is(pretrain, monkeypatch):
    """The checkpoints are of what is there already, and go; those that lead to another domain stay."""
    with monkeypatch.context() as patch:
        patch.setattr("e4t_cli.api.pretraining.discard_work", lambda folder: None)
        assert pretrain().code == 0
    work = user_domains_folder() / ".my_dogs.checkpoints"
    assert "finished" in left(work)
    ended = pretrain()
    assert ended.code == 2 and str(made()) in ended.err and "--force" in ended.err
    assert not work.exists()
    work.mkdir()
    (work / "finished").write_text("0" * 64)
    assert pretrain().code == 2 and work.exists()


def test_R5_strict_stops(pretrain, dogs):
    (dogs / "05.png").write_bytes(b"no picture")
    ended = pretrain("--strict")
    assert ended.code == 3
    assert "05.png" in ended.err and "without --strict" in ended.err
    assert not made().exists()


@pytest.mark.parametrize("cache", ["on", "off"])
def test_R5_all_bad_and_R6_empty(pretrain, tmp_path, cache):
    (tmp_path / "bad").mkdir()
    for index in range(3):
        (tmp_path / "bad" / f"{index}.png").write_bytes(b"no picture")
    ended = pretrain("--cache", cache, data="bad")
    assert ended.code == 3, ended.err
    assert "no image can be used; the first: " in ended.err
    (tmp_path / "empty").mkdir()
    ended = pretrain("--cache", cache, data="empty")
    assert ended.code == 3 and "there is no image in" in ended.err


def test_R6_one_picture_and_R7_duplicates_are_warned_about(pretrain, dogs, tmp_path):
    (tmp_path / "one").mkdir()
    shutil.copy(dogs / "03.png", tmp_path / "one")
    ended = pretrain(data="one", name="one_dog")
    assert ended.code == 0, ended.err
    assert "1 image are few" not in ended.err and "1 image is few" in ended.err
    shutil.copy(dogs / "03.png", dogs / "99.png")
    ended = pretrain("--cache", "on")
    assert ended.code == 0 and "1 image is there twice, as 99.png and 03.png" in ended.err


def test_what_is_no_source(pretrain, dogs):
    for data, words in (("none", "there is no folder none"), ("dogs/00.png", "is one file")):
        ended = pretrain(data=data)
        assert ended.code == 2 and words in ended.err


def test_shards_are_trained_on_kept_or_not(pretrain, dogs, tmp_path):
    pytest.importorskip("webdataset")
    import tarfile

    with tarfile.open(tmp_path / "dogs.tar", "w") as shard:
        for path in sorted(dogs.iterdir()):
            shard.add(path, path.name)
    kept = pretrain(data="dogs.tar", name="kept_dogs")  # 8 samples of 12 pictures: not needed twice
    assert kept.code == 0, kept.err
    assert "encode" not in [line.split()[0] for line in kept.err.splitlines()]
    anew = pretrain("--cache", "on", data="dogs.tar", name="new_dogs")
    assert anew.code == 0, anew.err
    assert "encode 12/12" in anew.err
    for name in ("kept_dogs", "new_dogs"):
        assert "images = 12" in (made(name) / "domain.toml").read_text()


# ── the cache ──


def test_the_cache_is_where_it_is_asked_to_be(pretrain, tmp_path, monkeypatch):
    monkeypatch.setenv("E4T_CACHE_DIR", str(tmp_path / "own"))
    assert pretrain("--cache", "off").code == 0
    assert not (tmp_path / "own").exists()
    assert pretrain("--cache", "on", name="dogs").code == 0
    assert len(list((tmp_path / "own" / "pretraining").glob("*/*.safetensors"))) == 1


def test_kept_or_not_the_domain_is_nearly_the_same(pretrain):
    import torch
    from safetensors.torch import load_file

    for cache in ("on", "off"):
        assert pretrain("--cache", cache, "--steps", "3", name=f"dog-{cache}").code == 0
    kept, anew = (load_file(made(f"dog-{c}") / "encoder.safetensors") for c in ("on", "off"))
    for key, value in kept.items():
        torch.testing.assert_close(anew[key], value, rtol=1e-2, atol=1e-4)


# ── what is left ──


def test_the_run_leaves_its_losses_and_no_checkpoints(pretrain):
    ended = pretrain("--steps", "3")
    assert ended.code == 0, ended.err
    names = left(made())
    assert "domain.toml" in names and "losses.jsonl" in names
    assert [path.name for path in user_domains_folder().iterdir()] == ["my_dogs"]
    again = pretrain()
    assert again.code == 2 and "has weights for tiny already" in again.err


def test_contact_sheets_of_pictures_that_are_not_trained_on(pretrain, monkeypatch):
    monkeypatch.setattr("e4t_cli.pretraining.logging.PROMPTS", ("S*",))
    ended = pretrain("--sample-every", "2", "--steps", "3")
    assert ended.code == 0, ended.err
    assert "step-00000002.png" in left(made() / "training"), ended.err
    assert "could not be written" not in ended.err
    assert "images = 11" in (made() / "domain.toml").read_text()


def test_an_interrupted_run_goes_on(pretrain, monkeypatch):
    from e4t_cli.models.domain_weights import DomainWeights

    save = DomainWeights.save
    monkeypatch.setattr(DomainWeights, "save", lambda *arguments: 1 / 0)
    assert pretrain("--steps", "4", "--checkpoint-every", "2").code == 1
    monkeypatch.setattr(DomainWeights, "save", save)
    other = pretrain("--steps", "4", "--batch", "2")
    assert other.code == 2 and "another run" in other.err
    ended = pretrain("--steps", "4")
    assert ended.code == 0 and "resuming from step 4" in ended.err


def test_fresh_begins_anew(pretrain, monkeypatch):
    from e4t_cli.models.domain_weights import DomainWeights

    save = DomainWeights.save
    monkeypatch.setattr(DomainWeights, "save", lambda *arguments: 1 / 0)
    assert pretrain("--checkpoint-every", "1").code == 1
    monkeypatch.setattr(DomainWeights, "save", save)
    ended = pretrain("--batch", "2", "--fresh")
    assert ended.code == 0 and "resuming" not in ended.err


def test_json_is_one_object(pretrain):
    ended = pretrain("--json")
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert told == {"schema": 1, "type": "domain", "name": "my_dogs", "path": str(made())}


def test_only_the_first_of_several_processes_speaks(pretrain, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    ended = pretrain("--dry-run")
    assert (ended.code, ended.out, ended.err) == (0, "", "")


# ── a dry run ──


def test_a_dry_run_says_what_it_would_cost_and_leaves_nothing(pretrain, dogs, tmp_path):
    (dogs / "05.png").write_bytes(b"no picture")
    shutil.copy(dogs / "03.png", dogs / "99.png")
    (dogs / "05.txt").write_text("a dog")
    ended = pretrain("--dry-run", "--steps", "1000")
    assert ended.code == 0, ended.err
    rows = dict(line.split("  ", 1) for line in ended.lines[1:])
    told = {name.strip(): value.strip() for name, value in rows.items()}
    assert told["descriptor"] == "dog" and told["base"] == "tiny"
    assert (told["images"], told["left out"], told["other files"]) == ("13", "1", "1")
    assert told["steps"] == "1,000 of 4 images"
    assert told["passes"] == "307.69"
    assert told["cache"].endswith("kB") and told["memory"].endswith("B")
    assert told["time"].startswith("about ")
    assert "there twice" in ended.err and "12 images are few" in ended.err
    assert not user_domains_folder().exists()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_dry_run_as_json(pretrain):
    ended = pretrain("--dry-run", "--json", "--cache", "off", "--batch", "5")
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert told["type"] == "plan" and told["images"] == told["opened"] == 12
    assert (told["steps"], told["batch"], told["passes"]) == (2, 5, 0.83)
    assert told["cache"]["used"] is False and told["cache"]["bytes"] > 12 * 1000
    seconds = told["seconds"]
    assert seconds["total"] == pytest.approx(2 * seconds["step"], abs=0.1)
    assert told["memory_bytes"] > 1e7


def test_a_dry_run_opens_a_sample_of_many(pretrain, monkeypatch):
    monkeypatch.setattr("e4t_cli.api.dry_run.OPENED", 5)
    ended = pretrain("--dry-run", "--json")
    told = json.loads(ended.out)
    assert (told["images"], told["opened"]) == (12, 5)
    assert "few" not in ended.err or "12 images" in ended.err


def test_a_dry_run_fails_as_the_run_would(pretrain, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.png").write_bytes(b"no picture")
    assert pretrain("--dry-run", data="bad").code == 3
    assert pretrain("--dry-run", data="none").code == 2
    assert pretrain("--dry-run", "--strict", data="bad").code == 3
    assert pretrain("--dry-run", name="zebras").code == 2


# ── on a terminal ──


def test_a_long_stage_says_how_long_it_will_take(monkeypatch):
    from e4t_cli.cli.terminal import LONG_STAGE, live_display

    display = live_display()
    now = [0.0]
    display.get_time = lambda: now[0]
    task = display.add_task("pretrain", total=1000, values="")
    column = display.columns[4]
    seen = []
    for done in (0, 100, 200, 1000):
        display.update(task, completed=done)
        display.tasks[0]._get_time = display.get_time
        column._renderable_cache.clear()
        seen.append(column(display.tasks[0]).plain)
        now[0] += LONG_STAGE
    assert seen[0] == "" and seen[-1] == ""
    assert seen[2] == "0:01:20 left"  # 800 of 1000, 10 a second


def test_the_same_line_works_twice_with_force(pretrain, dogs):
    assert pretrain().code == 0
    first = (made() / "domain.toml").read_bytes()
    again = pretrain()
    assert again.code == 2 and "--force" in again.err
    forced = pretrain("--force")
    assert forced.code == 0, forced.err
    assert (made() / "domain.toml").read_bytes() == first
    (made() / "thesis.txt").write_text("mine")
    refused = pretrain("--force")
    assert refused.code == 2 and "holds other files than a domain's" in refused.err
    assert (made() / "thesis.txt").read_text() == "mine"


def test_the_second_of_two_learns_of_the_first(pretrain):
    from e4t_cli.pretraining.lock import locked

    with locked(made().with_name(".my_dogs.checkpoints"), "my_dogs"):
        ended = pretrain()
    assert ended.code == 2 and "is being pre-trained already, by process" in ended.err
    assert pretrain().code == 0


def test_a_contact_sheet_that_a_kill_prevented_is_made_when_the_run_is_resumed(pretrain, monkeypatch):
    from e4t_cli.pretraining.logging import TrainingLogger

    def killed(self, step):
        if step.step == 2:  # its checkpoint is written by now
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLogger, "on_step", killed)
        assert pretrain("--sample-every", "1").code == 130
    assert pretrain("--sample-every", "1").code == 0
    assert (made() / "training" / "step-00000002.png").is_file()
    assert not list(user_domains_folder().glob(".*"))


def test_temporary_files_stay_out_of_the_finished_domain(pretrain):
    work = made().with_name(".my_dogs.checkpoints")
    (work / "training").mkdir(parents=True)
    (work / "training" / ".step-00000001.png.0123456789abcdef~").write_bytes(b"torn")
    assert pretrain().code == 0
    assert not [path for path in user_domains_folder().rglob("*") if path.name.endswith("~")]
