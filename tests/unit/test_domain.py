"""The domain contract: dataclasses that validate their values."""

import copy
import math
import pickle

import pytest
from PIL import Image

from e4t_cli.registry.config import PretrainingConfig, TuningConfig
from e4t_cli.registry.domain import Domain, PreparationTarget, PreparedImage

TUNING = TuningConfig(steps=5, base_learning_rate=3e-6, reg_weight=1e-4)


def domain(**changes):
    return Domain(**{"name": "dog", "descriptor": "dog", "tuning": TUNING, **changes})


def test_learning_rate_is_scaled_by_the_batch():
    assert math.isclose(TUNING.learning_rate, 4.8e-5)
    assert math.isclose(PretrainingConfig(steps=1).learning_rate, 1.6e-5)


@pytest.mark.parametrize("config", [TUNING, PretrainingConfig(steps=3, mask=True)])
def test_configs_round_trip(config):
    assert type(config).from_dict(config.as_dict()) == config
    assert config.replace(steps=7).steps == 7
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_misspelt_field_is_refused():
    with pytest.raises(ValueError, match="'step'"):
        TuningConfig.from_dict({**TUNING.as_dict(), "step": 5})
    with pytest.raises(ValueError, match="steps"):
        PretrainingConfig.from_dict({})
    with pytest.raises(TypeError):
        TUNING.replace(step=5)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": -1},
        {"steps": 1.5},
        {"steps": True},
        {"batch_size": 0},
        {"base_learning_rate": 0},
        {"base_learning_rate": math.nan},
        {"base_learning_rate": "fast"},
        {"reg_weight": -1e-9},
        {"reg_weight": math.inf},
        {"gradient_clip": 0},
        {"unet_rate": -1},
        {"mask": 1},
    ],
)
def test_tuning_numbers_are_checked(change):
    with pytest.raises(ValueError, match=f"TuningConfig.{next(iter(change))} must be"):
        TUNING.replace(**change)


@pytest.mark.parametrize("change", [{"steps": 0}, {"embedding_scale": 0}, {"offsets_rate": -1}])
def test_pretraining_numbers_are_checked(change):
    with pytest.raises(ValueError, match="PretrainingConfig"):
        PretrainingConfig(**{"steps": 1, **change})


def test_zero_tuning_steps_are_a_config_but_not_a_domain():
    encoder_only = TUNING.replace(steps=0)
    with pytest.raises(ValueError, match=r"steps must be 1 or more"):
        domain(tuning=encoder_only)


@pytest.mark.parametrize(
    "name", ["", "Dog", "-dog", "../dog", "a/b", "a\\b", "dog\0", "~", "con", "lpt1", "d" * 65, 7]
)
def test_names_are_safe_as_file_names(name):
    with pytest.raises(ValueError, match="domain name"):
        domain(name=name)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"descriptor": " "}, "descriptor"),
        ({"tuning": {"steps": 5}}, "tuning"),
        ({"pretraining": 30_000}, "pretraining"),
        ({"prepare": "crop"}, "prepare"),
        ({"weights": "someone/dog"}, "weights"),
        ({"weights": {"MINI": "folder"}}, "base name"),
        ({"weights": {"mini": ""}}, "weights"),
        ({"weights": {"mini": "package:../etc"}}, "package:my_package/folder"),
        ({"weights": {"mini": "package:dogs/../../etc"}}, "package:my_package/folder"),
        ({"weights": {"mini": "hub:me/dogs@main"}}, "40-hex"),
        ({"prompt_templates": "a photo of {}"}, "tuple"),
        ({"prompt_templates": ("a photo",)}, "exactly once"),
        ({"summary": None}, "summary"),
        ({"networks": "owner/name"}, "tuple"),
        ({"networks": ("../x",)}, "owner/name"),
        ({"contract": 2}, "version 2"),
    ],
)
def test_domains_are_checked(change, expected):
    with pytest.raises(ValueError, match=expected):
        domain(**change)


def test_a_domain_is_a_value():
    weights = {"mini": "package:dogs/mini", "sd14": "hub:me/dogs@" + "0" * 40, "own": "/a/folder"}
    dog = domain(weights=weights)
    weights.clear()
    assert len(dog.weights) == 3
    assert copy.deepcopy(dog) == dog == pickle.loads(pickle.dumps(dog))
    assert hash(dog) == hash(copy.copy(dog))
    with pytest.raises(AttributeError):
        dog.name = "cat"


def test_prepared_images_are_checked():
    square, mask = Image.new("RGB", (8, 8)), Image.new("L", (8, 8))
    assert PreparedImage(image=square, mask=mask, notes=["a"]).notes == ("a",)
    for wrong in (
        {"image": Image.new("RGB", (8, 9))},
        {"image": Image.new("L", (8, 8))},
        {"image": "me.png"},
        {"image": square, "mask": Image.new("L", (4, 4))},
        {"image": square, "mask": Image.new("1", (8, 8))},
        {"image": square, "notes": "one string"},
    ):
        with pytest.raises(ValueError, match=r"PreparedImage\."):
            PreparedImage(**wrong)
    with pytest.raises(ValueError, match="mask"):
        PreparationTarget(size=64, base="mini", mask="mine.png")
