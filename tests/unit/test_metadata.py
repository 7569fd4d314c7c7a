"""Metadata of generated images (row C8 of the reliability table)."""

import io
import json
import re

import pytest
from PIL import Image

from e4t_cli.errors import InputError
from e4t_cli.images.png_metadata import AI_MARK, GenerationRecord, png_bytes, read_metadata

RECORD = GenerationRecord(
    prompt="S* on the beach, 猫 <b>, Steps: 3",
    negative_prompt="blurry: very",
    seed=7,
    steps=20,
    guidance=7.5,
    scheduler="DPM++ 2M, Karras",
    width=64,
    height=64,
    domain="face",
    base="mini",
    base_fingerprint="0123456789abcdef",
    photo_sha256="f" * 64,
    tuning={"steps": 15},
)
PICTURE = Image.new("RGB", (64, 64), (10, 20, 30))


def test_round_trip_and_pixels():
    data = png_bytes(PICTURE, RECORD)
    read = read_metadata(data)
    assert read.ai_generated
    assert read.details == RECORD.as_dict()
    assert read.details["schema"] == 1
    assert read.details["versions"]["e4t"]
    assert Image.open(io.BytesIO(data)).tobytes() == PICTURE.tobytes()


def test_parameters_are_read_by_the_web_ui():
    """Its own two expressions, from `parse_generation_parameters`."""
    *lines, last = read_metadata(png_bytes(PICTURE, RECORD)).parameters.split("\n")
    assert lines == [RECORD.prompt, "Negative prompt: blurry: very"]
    pair = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    found = {key: json.loads(v) if v.startswith('"') else v for key, v in pair.findall(last)}
    assert found["Seed"] == "7"
    assert found["CFG scale"] == "7.5"
    assert found["Sampler"] == "DPM++ 2M, Karras"
    assert re.match(r"^(\d+)x(\d+)$", found["Size"])
    assert found["Model hash"] == "0123456789"


def test_without_prompts_the_mark_stays():
    data = png_bytes(PICTURE, RECORD, include_prompts=False)
    read = read_metadata(data)
    assert read.ai_generated
    assert read.parameters is None
    assert "beach" not in json.dumps(read.details)
    assert b"beach" not in data
    assert read.details["seed"] == 7


def test_the_mark_is_plain_text_in_the_file():
    """Checkers of provenance look for the packet uncompressed."""
    assert AI_MARK.encode() in png_bytes(PICTURE, RECORD)


def test_a_contact_sheet_lists_all_its_images():
    read = read_metadata(png_bytes(PICTURE, [RECORD, RECORD]))
    assert [one["seed"] for one in read.details["pictures"]] == [7, 7]
    assert read.ai_generated


def test_other_files():
    buffer = io.BytesIO()
    PICTURE.save(buffer, "PNG")
    assert not read_metadata(buffer.getvalue()).ai_generated
    for data in (b"", b"not a png", png_bytes(PICTURE, RECORD)[:200]):
        with pytest.raises(InputError):
            read_metadata(data)
