"""Invariants of the safety checker: on where the base has one; flagged images are not written (T8)."""

import dataclasses
import json
import shutil

import pytest
import torch
from PIL import Image

from e4t_cli.errors import IntegrityError
from e4t_cli.images.png_metadata import read_metadata
from e4t_cli.models.loading import SafetyChecker


def test_the_checker_agrees_with_diffusers_checker(checked_base):
    checker = SafetyChecker.of_base(checked_base, torch.device("cpu"), torch.float32)
    photos = [Image.new("RGB", (64, 64), colour) for colour in ("red", "white")]
    pixels = checker.processor(photos, return_tensors="pt").pixel_values
    assert pixels.shape == (2, 3, 32, 32)
    assert checker.flags(photos) == [False, False]
    checker.checker.concept_embeds_weights.fill_(-2.0)
    assert checker.flags(photos) == [True, True]


def test_a_base_without_one_is_not_checked(base_folder):
    assert SafetyChecker.of_base(base_folder, torch.device("cpu"), torch.float32) is None


def test_a_damaged_checker_is_an_error(checked_base, tmp_path):
    shutil.copytree(checked_base / "safety_checker", tmp_path / "safety_checker")
    (tmp_path / "safety_checker" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(IntegrityError):
        SafetyChecker.of_base(tmp_path, torch.device("cpu"), torch.float32)


@pytest.fixture
def one_of_two(monkeypatch):
    """A checker that flags every second image."""
    seen = []

    def flags(self, images):
        seen.extend(images)
        return [len(seen) % 2 == 1 for _ in images]

    monkeypatch.setattr(SafetyChecker, "flags", flags)
    return seen


def test_T8_a_flagged_image_is_not_written_and_the_command_reports_it(
    checked_base, domain_weights, one_of_two, tmp_path, capsys, monkeypatch
):
    from e4t_cli.cli import app
    from e4t_cli.models.text_to_image import TextToImageModel

    monkeypatch.chdir(tmp_path)
    own = dataclasses.replace(
        domain_weights, base_fingerprint=TextToImageModel.load(checked_base).fingerprint,
        tuning=domain_weights.tuning.replace(steps=1, batch_size=2),
    )  # fmt: skip
    own.save(tmp_path / "face")
    Image.new("RGB", (64, 64), "orange").save("me.png")
    command = [
        "personalize", str(tmp_path / "face"), "me.png", "S* on the beach", "-n", "2",
        "--base", str(checked_base), "--steps", "2", "--seed", "1", "--mask", "none",
    ]  # fmt: skip
    code = app.run([*command, "--json", "-o", "one"])
    captured = capsys.readouterr()
    assert code == 8, captured.err
    events = [json.loads(line) for line in captured.out.splitlines()]
    assert [one["type"] for one in events] == ["image", "withheld"]
    assert events[1]["seed"] == 1 and events[0]["seed"] == 2
    assert json.loads(captured.err.splitlines()[-1])["error"]["code"] == "partial"
    (written,) = (tmp_path / "one").glob("*.png")
    assert read_metadata(written.read_bytes()).ai_generated
    seen = len(one_of_two)
    assert app.run([*command, "--no-safety-checker", "-o", "two"]) == 0
    assert len(list((tmp_path / "two").glob("*.png"))) == 2
    assert len(one_of_two) == seen
