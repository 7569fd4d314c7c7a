"""Metadata of generated images (row C8 of the reliability table)."""

import io
import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from e4t_cli.errors import InputError
from e4t_cli.images.png_metadata import (
    AI_MARK,
    GenerationRecord,
    ImageMetadata,
    png_bytes,
    read_metadata,
    read_records,
)
from e4t_cli.schedulers import SCHEDULERS

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


@pytest.mark.parametrize("records", [RECORD, [RECORD, RECORD]])
def test_without_metadata_only_the_mark_stays(records):
    """No prompt, seed, steps, tuning or hash of the photo: the file has one text, the mark."""
    data = png_bytes(PICTURE, records, metadata=False)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert list(image.text) == ["XML:com.adobe.xmp"]
    assert read_metadata(data) == ImageMetadata(None, None, ai_generated=True, by_e4t=True)
    for value in ("beach", "blurry", "f" * 64, "0123456789", "mini"):
        assert value.encode() not in data


# Measured against the web UI's own schedules at 20 steps; see docs/commands.md.
SAMPLERS = {
    "dpm++": "Sampler: DPM++ 2M, Schedule type: Simple, ",
    "dpm++-karras": "Sampler: DPM++ 2M, Schedule type: Karras, ",
    "ddim": "Sampler: DDIM, ",
    "ddpm": "",
    "euler": "Sampler: Euler, Schedule type: DDIM, ",
    "euler-a": "Sampler: Euler a, Schedule type: DDIM, ",
    "heun": "Sampler: Heun, Schedule type: DDIM, ",
    "pndm": "Sampler: PLMS, ",
    "unipc": "Sampler: UniPC, ",
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_samplers_are_spelled_as_the_web_ui_does(scheduler):
    text = replace(RECORD, scheduler=scheduler).parameters()
    assert f"\nSteps: 20, {SAMPLERS[scheduler]}CFG scale: 7.5, " in text


@pytest.mark.parametrize(
    ("spacing", "schedule"), [("leading", "DDIM"), ("linspace", "Uniform"), ("trailing", "Simple")]
)
@pytest.mark.parametrize("scheduler", ["euler", "euler-a", "heun"])
def test_the_schedule_named_has_the_noise_levels_of_the_scheduler(scheduler, spacing, schedule):
    """Of the web UI's schedules, computed here by its formulas, it is the nearest one."""
    import diffusers

    text = replace(RECORD, scheduler=scheduler, timestep_spacing=spacing).parameters()
    assert f"Schedule type: {schedule}, " in text
    cumulative = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    levels = ((1 - cumulative) / cumulative).sqrt()
    made = getattr(diffusers, SCHEDULERS[scheduler][0])(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing=spacing, steps_offset=1
    )
    made.set_timesteps(20)
    own = torch.as_tensor(made.sigmas[:-1])
    own = torch.cat([own[:1], own[1::2]]) if len(own) != 20 else own  # Heun has each twice

    def at(times):
        low, high = times.floor().long(), times.ceil().long()
        return torch.lerp(levels.log()[low], levels.log()[high], times - low).exp()

    theirs = {
        "Uniform": at(torch.linspace(999, 0, 20)),
        "SGM Uniform": at(torch.linspace(999, 0, 21)[:-1]),
        "Simple": levels.flip(0)[::50],
        "DDIM": levels[1::50].flip(0),
        "Karras": torch.linspace(levels[-1] ** (1 / 7), levels[0] ** (1 / 7), 20) ** 7,
    }
    distance = {name: float((one.log() - own.log()).abs().mean()) for name, one in theirs.items()}
    assert min(distance, key=distance.__getitem__) == schedule and distance[schedule] < 1e-3


def test_a_record_is_read_as_it_was_written():
    assert read_records(png_bytes(PICTURE, RECORD)) == [RECORD]
    other = replace(RECORD, seed=8, concept_scale=0.5)
    assert read_records(png_bytes(PICTURE, [RECORD, other])) == [RECORD, other]
    later = {**RECORD.as_dict(), "something_new": 1}
    assert GenerationRecord.from_dict(json.loads(json.dumps(later))) == RECORD


FOREIGN = {
    "": "no record of e4t",
    "[1]": "no record of e4t",
    "[" * 100_000: "damaged",
    '{"schema": 1, "seed": 7, "steps": 2}': "without its prompt",
    '{"schema": 2, "prompt": "S*"}': "newer e4t",
    '{"schema": 1, "prompt": "S*"}': "has no seed",
    '{"schema": 1, "prompt": 7}': "prompt is of the wrong type",
    '{"schema": 1, "prompt": "S*", "seed": true}': "seed is of the wrong type",
    '{"pictures": [1]}': "damaged",
}


@pytest.mark.parametrize(("text", "words"), FOREIGN.items(), ids=lambda text: text[:40])
def test_records_that_cannot_be_repeated(text, words):
    info, buffer = PngInfo(), io.BytesIO()
    info.add_text("parameters", "a cat\nSteps: 20, Sampler: Euler a, Seed: 1")
    if text:
        info.add_text("e4t", text)
    PICTURE.save(buffer, "PNG", pnginfo=info)
    with pytest.raises(InputError, match=words):
        read_records(buffer.getvalue())


def test_whose_file_it_is():
    """What --force may replace: also pictures without metadata, and prepared photos, which have no mark."""
    prepared = read_metadata(png_bytes(PICTURE, None))
    assert prepared.by_e4t and not prepared.ai_generated
    foreign, buffer = PngInfo(), io.BytesIO()
    foreign.add_text("Software", "GIMP")
    foreign.add_itxt("XML:com.adobe.xmp", f'<x CreatorTool="Other" Iptc4xmpExt:DigitalSourceType="{AI_MARK}"/>')
    PICTURE.save(buffer, "PNG", pnginfo=foreign)
    assert read_metadata(buffer.getvalue()) == ImageMetadata(None, None, ai_generated=True, by_e4t=False)


def test_a_picture_without_metadata_says_so():
    with pytest.raises(InputError, match="--no-metadata"):
        read_records(png_bytes(PICTURE, RECORD, metadata=False))


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
