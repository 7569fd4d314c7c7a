"""The packaged face parser, on upright and on turned drawings."""

from pathlib import Path

import pytest
from PIL import Image

from e4t_cli.images.loading import center_square, prepare_image
from e4t_cli.registry.discovery import find_domain
from e4t_cli.registry.domain import PreparationTarget
from e4t_domains import face_parsing
from e4t_domains.face_parsing import HEAD

EXAMPLES = Path(__file__).parents[2] / "examples"
TARGET = PreparationTarget(size=64, base="mini")


def example(name):
    with Image.open(EXAMPLES / f"{name}.png") as opened:
        return opened.convert("RGB")


def test_it_is_in_the_package():
    assert (face_parsing.PACKAGED["mini"] / "config.json").is_file()
    assert (face_parsing.PACKAGED["mini"] / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["me", "zoe", "max"])
def test_well_framed_drawings_are_unchanged_bit_for_bit(name):
    photo = example(name)
    prepared = prepare_image(find_domain("face"), photo, TARGET)
    square = center_square(photo, 64)
    assert prepared.image.tobytes() == square.tobytes()
    assert prepared.notes == ()
    assert prepared.remarks[0].startswith("1 face, turned ")
    # The mask is every pixel of a head, as a plain reading of the parser's labels has it.
    (found,) = face_parsing.find_parser(TARGET).parse([square])
    assert prepared.mask.tobytes() == (found.where(HEAD) * 255).astype("uint8").tobytes()


@pytest.mark.parametrize("name", ["me", "zoe", "max"])
@pytest.mark.parametrize("turn", [15, -15, 30])
def test_turned_drawings_are_turned_back(name, turn):
    photo = example(name).rotate(-turn, Image.Resampling.BICUBIC, expand=True, fillcolor=(255, 255, 255))
    prepared = prepare_image(find_domain("face"), photo, TARGET)
    assert prepared.frame.turn == pytest.approx(turn, abs=5)
    covered = sum(value > 127 for value in prepared.mask.tobytes()) / 64**2
    assert 0.2 < covered < 0.5


@pytest.mark.parametrize("name", ["felix", "mosaic"])
def test_I11_what_is_no_face_is_left_as_it_is(name):
    photo = example(name)
    prepared = prepare_image(find_domain("face"), photo, TARGET)
    assert prepared.image.tobytes() == center_square(photo, 64).tobytes()
    assert prepared.mask is None
    assert prepared.notes == ("no face was found: the whole image counts in tuning",)
