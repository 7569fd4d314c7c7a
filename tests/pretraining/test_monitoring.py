"""Training previews, logs and trackers, none of which changes the results."""

import json
import sys

import pytest
from PIL import Image

from e4t_cli.images.png_metadata import read_metadata
from e4t_cli.pretraining.logging import LoggerConfig, TrainingLogger, read_losses
from e4t_cli.registry.domain import PreparedImage
from e4t_cli.schedulers import SamplingConfig
from tests.conftest import drawn_face
from tests.pretraining.conftest import RECIPE, Interrupted, same

LONG = RECIPE.replace(steps=12)


def watching(folder, **options):
    options = {
        "images": [PreparedImage(image=drawn_face(index)[0]) for index in (20, 21)],
        "prompts": ("a photo of S*", "S* on the beach"),
        "sampling": SamplingConfig(steps=2),
        "sample_every": 4,
        **options,
    }
    return LoggerConfig(folder=folder, **options)


@pytest.fixture
def watched(model, pretrain):
    def run(value, *, config=LONG, then=lambda step: None, **options):
        notes = []
        listener = lambda event: notes.append(event.note)  # noqa: E731
        with TrainingLogger(value, model, name="face", on_progress=listener) as watch:

            def on_step(step):
                watch.on_step(step)
                then(step)

            domain = pretrain(config, on_progress=watch.on_progress, on_step=on_step, **options)
        return domain, [note for note in notes if note]

    return run


def test_monitoring_changes_nothing_and_writes_sheets_and_losses(watched, pretrain, tmp_path):
    domain, notes = watched(watching(tmp_path))
    assert same(domain, pretrain(LONG))
    assert not notes
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "losses.jsonl",
        "step-00000004.png",
        "step-00000008.png",
        "step-00000012.png",
    ]
    with Image.open(tmp_path / "step-00000004.png") as sheet:
        assert sheet.width > sheet.height > 2 * 256  # two rows of three, scaled to be seen
    metadata = read_metadata((tmp_path / "step-00000004.png").read_bytes())
    assert metadata.ai_generated
    assert [one["prompt"] for one in metadata.details["pictures"]] == [
        "a photo of S*",
        "S* on the beach",
    ] * 2
    assert [one["seed"] for one in metadata.details["pictures"]] == [0, 1] * 2
    assert metadata.details["pictures"][0]["tuning"]["steps"] == 0
    lines = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 12]
    assert lines[0].keys() == {"step", "loss", "diffusion", "penalty", "smoothed", "it/s"}


def test_R1_sheets_and_losses_of_a_resumed_run_are_those_of_a_whole_one(watched, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    every = {"checkpoint_every": 3}
    watched(watching(whole), checkpoints=tmp_path / "a", **every)

    def interrupt(step):
        if step.step == 11:
            raise Interrupted

    with pytest.raises(Interrupted):
        watched(watching(cut), checkpoints=tmp_path / "b", then=interrupt, **every)
    with (cut / "losses.jsonl").open("a") as log:
        log.write('{"step": 11, "loss": 9.0}\n{"step": 1')  # done again, and torn
    (cut / "step-00000012.png").unlink(missing_ok=True)
    watched(watching(cut), checkpoints=tmp_path / "b", **every)
    for name in ("step-00000004.png", "step-00000008.png", "step-00000012.png"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
    lines = [read_losses(folder / "losses.jsonl") for folder in (whole, cut)]
    for one, other in zip(*lines, strict=True):
        assert {key: one[key] for key in ("step", "loss")} == {key: other[key] for key in ("step", "loss")}


def test_two_sheets_differ_by_what_was_learned(watched, tmp_path):
    fast = LONG.replace(base_learning_rate=2e-3)
    watched(watching(tmp_path), config=fast)
    early, late = (Image.open(tmp_path / f"step-{step:08d}.png").convert("RGB") for step in (4, 12))
    # The photo is the same; the image generated from it is not.
    photo, drawn = (12, 12, 12 + 256, 12 + 256), (280, 12, 280 + 256, 12 + 256)
    assert early.crop(photo).tobytes() == late.crop(photo).tobytes()
    assert early.crop(drawn).tobytes() != late.crop(drawn).tobytes()


class Service:
    """A custom tracker of accelerate."""

    @staticmethod
    def make(fails=()):
        from accelerate.tracking import GeneralTracker

        class Own(GeneralTracker):
            name = "own"
            requires_logging_directory = False

            def __init__(self):
                super().__init__()
                self.logged, self.settings, self.finished = {}, None, False

            @property
            def tracker(self):
                return self

            def start(self):
                if "start" in fails:
                    raise ConnectionError("no route to host")

            def store_init_configuration(self, values):
                self.settings = values

            def log(self, values, step=None, **options):
                if "log" in fails:
                    raise ConnectionError("no route to host")
                self.logged[step] = values

            def finish(self):
                self.finished = True

        return Own()


def test_trackers_receive_the_metrics(watched, tmp_path):
    own = Service.make()
    _, notes = watched(watching(tmp_path, trackers=(own,), sample_every=0))
    assert not notes
    assert list(own.logged) == [10, 12]
    assert own.logged[10]["loss"] > 0
    assert own.settings["domain"] == "face"
    assert own.finished


@pytest.mark.parametrize("fails", ["start", "log"])
def test_R10_a_failing_tracker_is_reported_once_and_disabled(watched, pretrain, tmp_path, fails):
    good = Service.make()
    trackers = (Service.make(fails=(fails,)), good)
    config = LONG.replace(steps=21)
    domain, notes = watched(watching(tmp_path, trackers=trackers, sample_every=0), config=config)
    assert same(domain, pretrain(config))
    assert notes == ["the tracker own failed, and training continues without it: no route to host"]


def test_R10_a_tracker_that_is_not_there(watched, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    _, notes = watched(watching(tmp_path, trackers=("aim", "nosuch"), sample_every=0), config=RECIPE)
    assert "the tracker aim is not installed, and training continues without it" in notes
    assert any(note.startswith("the tracker nosuch failed, and training continues") for note in notes)
    assert len(notes) == 2


def test_a_folder_that_cannot_be_written_stops_no_run(watched, pretrain, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    domain, notes = watched(watching(tmp_path / "file" / "in"))
    assert same(domain, pretrain(LONG))
    assert {note.partition(" could")[0] for note in notes} == {
        "the log of losses",
        "the contact sheet",
    }
    assert len(notes) == 2  # each once
