"""The library as Python sees it: silent, typed, and leaving everything as it was."""

import dataclasses
import inspect
import io
import threading

import pytest
import torch
from PIL import Image

import e4t_cli
from e4t_cli.api import options
from e4t_cli.errors import E4TError, InputError, UsageError
from e4t_cli.images.loading import open_image
from e4t_cli.images.preparation import with_mask
from e4t_cli.images.results import contact_sheet
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.registry.domain import PreparedImage

QUICK = {"tune_steps": 1, "sampling": {"steps": 2}, "seed": 5}


@pytest.fixture
def draw(world):
    """personalize() in the tiny world, with whatever else is asked for."""

    def draw(image=None, prompts="S* on the beach", **given):
        given = {"base": world.base, **QUICK, **given}
        return e4t_cli.personalize(str(world.pack), image or world.photo, prompts, **given)

    return draw


def looks(result):
    return [image.image.tobytes() for image in result.images]


def test_it_is_silent_and_tells_its_progress(draw, capfd, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    stages = []
    result = draw(on_progress=lambda event: stages.append(event.stage))
    assert capfd.readouterr() == ("", "")
    assert list(dict.fromkeys(stages)) == ["load", "prepare", "tune", "generate"]
    spent = result.timings.as_dict()
    assert list(spent) == ["imports", "load", "prepare", "tune", "generate"]
    assert all(spent[name] > 0 for name in ("load", "prepare", "tune", "generate"))
    assert result.timings.total == pytest.approx(sum(spent.values()))


def test_a_photo_is_a_photo_however_it_is_handed_in(draw, world):
    data = world.photo.read_bytes()
    with Image.open(world.photo) as opened:
        values = [str(world.photo), data, io.BytesIO(data), opened.convert("RGBA")]
    expected = looks(draw())
    for value in values:
        assert looks(draw(value)) == expected


def test_a_picture_does_not_depend_on_its_company(draw):
    many = draw(prompts=["a photo of S*", "S* on the beach"], num_images_per_prompt=2)
    assert [image.seed for image in many.images] == [5, 6, 5, 6]
    assert looks(many)[2] == looks(draw())[0]


def test_the_base_stays_as_it_was_and_runs_do_not_meet(draw, world):
    model = TextToImageModel.load(world.base)
    before = {key: value.clone() for key, value in model.unet.state_dict().items()}
    first, second = draw(base=model), draw(base=model)
    assert looks(first) == looks(second) == looks(draw())
    after = model.unet.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_pictures_arrive_one_by_one(draw):
    arrived = []
    result = draw(num_images_per_prompt=3, on_image=lambda image: arrived.append(image.seed))
    assert arrived == [5, 6, 7] == [image.seed for image in result.images]


def test_the_record_says_what_a_picture_depends_on(draw, world):
    import hashlib

    record = draw().images[0].record
    assert record.photo_sha256 == hashlib.sha256(world.photo.read_bytes()).hexdigest()
    assert record.tuning["steps"] == 1 and record.tuning["seed"] == 5
    assert record.guidance > 0 and record.scheduler == "dpm++"
    assert record.base_fingerprint and record.weights_fingerprint
    assert record.parameters().startswith("S* on the beach\nSteps: 2, Sampler: DPM++ 2M, Schedule type: Simple,")


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"num_images_per_prompt": 0}, UsageError, "1 or more"),
        ({"seed": -1}, UsageError, "seeds must be"),
        ({"seed": 2**32 - 1, "num_images_per_prompt": 2}, UsageError, "seeds must be"),
        ({"tune_steps": -1}, UsageError, "steps must be a whole number"),
        ({"sampling": {"stride": 2}}, UsageError, "stride"),
        ({"sampling": {"steps": 0}}, UsageError, "1 to 1000"),
        ({"placeholder": "two words"}, UsageError, "one word"),
        ({"prompts": ["S* x", "nobody"]}, UsageError, "does not name the concept"),
        ({"mask": Image.new("L", (96, 96))}, None, "less than 1 %"),
        ({"mask": "words:"}, UsageError, "needs words"),
        ({"mask": "words"}, UsageError, "no words for its mask"),
        ({"face": "middle"}, UsageError, "1 is the leftmost"),
        ({"require_face": True}, UsageError, "looks for no face"),
        ({"mask": Image.new("L", (96, 64), 255)}, InputError, "same proportions"),
        ({"image": b"nothing"}, InputError, "not an image"),
        ({"prompts": "S*" + " beach" * 30, "image": None}, None, "left out"),
        ({"prompts": "beach " * 30 + "S*"}, UsageError, "the placeholder comes after"),
    ],
)
def test_refusals(draw, given, kind, words):
    if kind is None:
        assert any(words in note for note in draw(**given).notes)
        return
    with pytest.raises(kind, match=words) as caught:
        draw(**given)
    assert isinstance(caught.value, E4TError)


def test_a_mask_lies_on_the_pixels_it_was_drawn_for():
    photo = Image.linear_gradient("L").convert("RGB").resize((200, 100))
    mask = Image.new("L", (200, 100))
    mask.paste(255, (100, 0, 200, 100))
    elsewhere = PreparedImage(image=photo.crop((0, 0, 64, 64)))
    both = with_mask(elsewhere, photo, mask)
    assert both.image.size == both.mask.size == (64, 64)
    assert both.mask.getpixel((8, 32)) == 0 and both.mask.getpixel((56, 32)) == 255
    assert "centred square" in both.notes[0]


def test_pil_images_are_treated_as_files_are():
    see_through = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    with pytest.raises(InputError, match="transparent everywhere"):
        open_image(see_through)
    see_through.paste((0, 0, 255, 255), (20, 20, 60, 60))
    assert open_image(see_through).image.getpixel((9, 9)) == (255, 255, 255)
    turned = Image.new("RGB", (64, 128))
    turned.getexif()[0x0112] = 6  # lies on its side
    assert open_image(turned).image.size == (128, 64)
    assert open_image(Image.new("CMYK", (64, 64))).image.mode == "RGB"


def test_small_pictures_are_scaled_by_a_whole_number():
    sheet = contact_sheet([Image.new("RGB", (64, 64), "red")] * 9, ["S* as an astronaut"] * 9)
    assert sheet.width == 3 * (4 * 64) + 4 * 12
    assert sheet.getpixel((20, 20)) == (255, 0, 0)
    large = contact_sheet([Image.new("RGB", (512, 512))] * 2, ["a", "b"])
    assert large.width == 2 * 512 + 3 * 12


def test_captions_stay_in_their_cell():
    from PIL import ImageFont

    from e4t_cli.images.results import CAPTION_LINES, CAPTION_SIZE, _wrapped

    font = ImageFont.load_default(CAPTION_SIZE)
    for text in ("S* " + "in a very long prompt " * 20, "W" * 300, "S* \x1b[31m", ""):
        lines = _wrapped(text, font, 256).split("\n")
        assert len(lines) <= CAPTION_LINES
        assert all(font.getlength(line) <= 256 for line in lines)
        assert "\x1b" not in "".join(lines)


def test_the_functions_and_the_commands_have_the_same_defaults():
    from e4t_cli.cli.options import PersonalizeFlags
    from e4t_cli.cli.personalize import generate, personalize

    renamed = {"num_images": "num_images_per_prompt"}
    assert PersonalizeFlags().photo_keywords()["mask"] == options.PersonalizeOptions().mask
    for command, function, kind in (
        (personalize, e4t_cli.personalize, options.PersonalizeOptions),
        (generate, e4t_cli.generate, options.GenerateOptions),
    ):
        ours = {key: one.default for key, one in inspect.signature(function).parameters.items()}
        ours |= {field.name: field.default for field in dataclasses.fields(kind)}
        checked = 0
        for name, parameter in inspect.signature(command).parameters.items():
            known = ours.get(renamed.get(name, name), inspect.Parameter.empty)
            if known is not inspect.Parameter.empty and name not in ("prompts", "mask"):  # lists on a command line
                assert parameter.default == known, name
                checked += 1
        assert checked >= 9


@pytest.mark.parametrize(
    "name",
    ["Run", "Generate", "Photo", "Prepare", "Personalize", "DomainTraining", "Pretrain", "Import"],
)
def test_keywords_are_the_fields_of_the_options(name):
    kind, keywords = getattr(options, f"{name}Options"), getattr(options, f"{name}Keywords")
    annotations = {}
    for base in reversed(kind.__mro__[:-1]):
        annotations |= base.__annotations__
    fields = {field.name: annotations[field.name] for field in dataclasses.fields(kind)}
    typed = {key: one.__forward_arg__ for key, one in keywords.__annotations__.items()}
    assert typed == fields


def test_an_unknown_keyword_is_refused(draw):
    with pytest.raises(TypeError, match="tune_stepz"):
        draw(tune_stepz=3)


def test_concurrent_runs_keep_the_libraries_quiet():
    """Their switch belongs to the process: the first run that ends must not enable it again."""
    from transformers.utils import logging

    from e4t_cli.devices import quiet_libraries

    assert logging.is_progress_bar_enabled()
    inside, leave = threading.Barrier(2), threading.Event()

    def other():
        with quiet_libraries:
            inside.wait(10)
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    with quiet_libraries:
        inside.wait(10)
    assert not logging.is_progress_bar_enabled()
    leave.set()
    thread.join()
    assert logging.is_progress_bar_enabled()
