"""Preparing a photo with a requested mask: what counts in tuning, and the notes for the user."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from e4t_cli.errors import InputError, UsageError, WeightsUnavailable
from e4t_cli.images import preparation
from e4t_cli.images.decoding import OpenedImage
from e4t_cli.images.framing import Frame
from e4t_cli.images.loading import center_square
from e4t_cli.images.preparation import MaskSource, prepare_photo
from e4t_cli.registry.config import TuningConfig
from e4t_cli.registry.domain import Domain, PreparationTarget, PreparedImage

TARGET = PreparationTarget(size=64, base="mini")
AUTO = MaskSource(kind="auto")


def domain(prepare=None, mask_words=""):
    config = TuningConfig(steps=1, base_learning_rate=1e-6, reg_weight=0, mask=True)
    return Domain(name="dog", descriptor="dog", tuning=config, prepare=prepare, mask_words=mask_words)


def photo(size=(200, 120), alpha=None):
    """A dark photo with a white disc right of the middle, and the mask of that disc."""
    rendered, mask = Image.new("RGB", size, (10, 20, 30)), Image.new("L", size)
    for sheet in (rendered, mask):
        ImageDraw.Draw(sheet).ellipse((110, 30, 170, 90), fill="white")
    return OpenedImage(rendered, ("a note of the file",), "", mask if alpha else None), mask


def turned(image, target):
    """A preparation that crops around a fixed point, turned."""
    frame = Frame.around(image.size, (135.0, 65.0), 90.0, 20.0)
    rendered = frame.apply(image, target.size)
    mask = None if target.mask is None else Image.new("L", rendered.size, 255)
    return PreparedImage(image=rendered, mask=mask, frame=frame, remarks=("1 dog",))


def off(prepared):
    """Fraction of the pixels at which mask and image disagree."""
    white = np.asarray(prepared.image.convert("L")) > 128
    return ((np.asarray(prepared.mask) > 128) != white).mean()


@pytest.mark.parametrize("prepare", [None, turned])
@pytest.mark.parametrize("scale", [1, 3])
def test_the_users_mask_is_cropped_as_the_photo_is(prepare, scale):
    opened, mask = photo()
    mask = mask.resize((200 * scale, 120 * scale))
    choice = MaskSource(kind="image", image=mask)
    prepared = prepare_photo(domain(prepare), opened, choice, TARGET, masked=True)
    assert off(prepared) < 0.02
    assert 0.05 < np.asarray(prepared.mask).mean() / 255 < 0.6
    assert prepared.notes == ("a note of the file",)
    assert bool(prepared.remarks) == (prepare is not None)


def test_transparency_is_the_mask_and_is_reported():
    opened, _ = photo(alpha=True)
    prepared = prepare_photo(domain(turned), opened, AUTO, TARGET, masked=False)
    assert off(prepared) < 0.02
    assert "transparent" in prepared.remarks[-1]
    for kind in ("none", "image"):
        choice = MaskSource(kind=kind, image=Image.new("L", (200, 120), 255))
        other = prepare_photo(domain(turned), opened, choice, TARGET, masked=True)
        assert not any("transparent" in remark for remark in other.remarks)
        assert (other.mask is None) == (kind == "none")


@pytest.mark.parametrize("prepare", [None, turned])
def test_a_photo_of_which_nearly_nothing_is_opaque_is_refused(prepare):
    """It would be a white square."""
    opened, _ = photo()
    alpha = Image.new("L", (200, 120))
    alpha.paste(255, (0, 0, 8, 8))
    with pytest.raises(InputError, match="opaque") as caught:
        prepare_photo(domain(prepare), replace(opened, alpha=alpha), AUTO, TARGET, masked=True)
    assert caught.value.exit_code == 3 and caught.value.hint
    own = MaskSource(kind="none")
    assert prepare_photo(domain(prepare), replace(opened, alpha=alpha), own, TARGET, masked=True).mask is None


@pytest.mark.parametrize("value", [0, 2])
def test_I12_a_black_mask_falls_back_to_the_whole_image(value):
    choice = MaskSource(kind="image", image=Image.new("L", (200, 120), value))
    prepared = prepare_photo(domain(), photo()[0], choice, TARGET, masked=True)
    assert prepared.mask is None
    assert "less than 1 %" in prepared.notes[-1] and "whole image" in prepared.notes[-1]


def test_I12_a_mask_beside_the_crop_falls_back_too():
    mask = Image.new("L", (200, 120))
    mask.paste(255, (0, 0, 30, 120))
    choice = MaskSource(kind="image", image=mask)
    assert prepare_photo(domain(), photo()[0], choice, TARGET, masked=True).mask is None


def test_a_preparation_that_returns_no_frame():
    def silent(image, target):
        return PreparedImage(image=image.crop((0, 0, 64, 64)))

    opened, mask = photo()
    choice = MaskSource(kind="image", image=mask)
    prepared = prepare_photo(domain(silent), opened, choice, TARGET, masked=True)
    assert prepared.image.tobytes() == center_square(opened.image, 64).tobytes()
    assert off(prepared) < 0.02
    assert "centred square" in prepared.notes[-1]


@pytest.fixture
def found(monkeypatch):
    """The prompts of mask_by_words, and its result."""
    calls = []

    def mask_by_words(image, words, target):
        calls.append((words, target.base, image.size))
        if words == "gone":
            raise WeightsUnavailable("it is not here")
        return Image.new("L", image.size, 0 if words == "nothing" else 255)

    monkeypatch.setattr(preparation, "mask_by_words", mask_by_words)
    return calls


def test_words(found):
    opened, _ = photo()
    choice = MaskSource(kind="words", words="a red cup")
    prepared = prepare_photo(domain(turned, "a dog"), opened, choice, TARGET, masked=False)
    assert found == [("a red cup", "mini", (64, 64))]
    assert prepared.mask.getextrema() == (255, 255)
    assert "'a red cup'" in prepared.remarks[-1]
    own = MaskSource(kind="words")
    prepare_photo(domain(None, "a dog"), opened, own, TARGET, masked=False)
    assert found[-1][0] == "a dog"
    with pytest.raises(UsageError, match="no words for its mask"):
        prepare_photo(domain(), opened, own, TARGET, masked=True)
    with pytest.raises(WeightsUnavailable):
        prepare_photo(domain(None, "gone"), opened, own, TARGET, masked=True)
    nothing = prepare_photo(domain(None, "nothing"), opened, own, TARGET, masked=True)
    assert nothing.mask is None and "less than 1 %" in nothing.notes[-1]


def test_the_domains_prompt_is_used_if_a_mask_is_requested_and_missing(found):
    opened, _ = photo()
    assert prepare_photo(domain(None, "a dog"), opened, AUTO, TARGET, masked=True).mask is not None
    assert prepare_photo(domain(None, "a dog"), opened, AUTO, TARGET, masked=False).mask is None
    assert len(found) == 1
    without = prepare_photo(domain(None, "gone"), opened, AUTO, TARGET, masked=True)
    assert without.mask is None
    assert without.notes[-1].endswith("it is not here")
    prepare_photo(domain(turned, "a dog"), opened, AUTO, TARGET, masked=True)
    assert len(found) == 2  # the domain had one of its own


def test_validation_of_the_new_fields():
    with pytest.raises(ValueError, match="1 is the leftmost"):
        PreparationTarget(size=64, base="mini", which="middle")
    square = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="frame must be a Frame"):
        PreparedImage(image=square, frame=(0, 0))
    with pytest.raises(ValueError, match="remarks must be a tuple"):
        PreparedImage(image=square, remarks="one")
    with pytest.raises(ValueError, match="mask_words"):
        domain(mask_words=3)
    assert PreparationTarget(size=64, base="mini", fetch=Path) == TARGET
