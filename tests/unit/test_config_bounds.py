"""Every number of a config, a manifest, an encoder and a concept: an impossible one is an error of the right class."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from e4t_cli.api.requests import resolve_tuning
from e4t_cli.errors import IntegrityError, UsageError
from e4t_cli.formats.concept import Concept
from e4t_cli.models.domain_folder import empty_encoder
from e4t_cli.registry.config import PretrainingConfig, TuningConfig
from e4t_cli.registry.manifest import MAX_BYTES, parse_manifest, toml_text

TUNING = TuningConfig(steps=5, base_learning_rate=3e-6, reg_weight=1e-4)
PRETRAINING = PretrainingConfig(steps=1000)
HUGE = [10**12, 10**400, 1e12, -(10**400)]
WRONG = ["x", "", True, None, [], {}, [1], math.nan, math.inf, -math.inf, -1, *HUGE]


def fields(config):
    numeric = (name for name, value in vars(config).items() if type(value) in (int, float))
    return [(config, name) for name in numeric]


NUMBERS = fields(TUNING) + fields(PRETRAINING)


@pytest.mark.parametrize(("config", "name"), NUMBERS, ids=lambda value: getattr(type(value), "__name__", ""))
@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:12])
def test_no_config_has_an_impossible_number(config, name, value):
    with pytest.raises(ValueError, match=name):
        config.replace(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("steps", 10**12), ("batch_size", 200_000)])
@pytest.mark.parametrize("config", [TUNING, PRETRAINING])
def test_work_without_end_is_refused(config, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number, . or more, at most"):
        config.replace(**{name: value})


def test_what_people_do_is_allowed():
    assert TUNING.replace(steps=2000, batch_size=64, gradient_clip=1e6, lora_rank=128, base_learning_rate=1e-2)
    assert PRETRAINING.replace(steps=3_000_000, batch_size=8192)


def test_on_the_command_line_it_is_a_wrong_option():
    with pytest.raises(UsageError, match="at most 100,000"):
        resolve_tuning(TUNING, None, 10**12)


# ── manifests ──

MANIFEST = {
    "schema": 1, "name": "dog", "descriptor": "dog", "base": "mini", "base_fingerprint": "a" * 32, "images": 40,
    "templates": ["a photo of {}"], "tuning": TUNING.as_dict(), "pretraining": PRETRAINING.as_dict(),
    "files": {"encoder.safetensors": "b" * 64}, "sizes": {"encoder.safetensors": 5},
}  # fmt: skip
IN_TOML = [value for value in WRONG if value not in (None, {}) and not (isinstance(value, int) and abs(value) > 1e300)]


def manifest_with(path, value):
    table = json.loads(json.dumps(MANIFEST))
    *parents, last = path
    inner = table
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return toml_text(table).replace("NaN", "nan").replace("Infinity", "inf").encode()


PLACES = [
    ("schema",), ("images",), ("sizes", "encoder.safetensors"), *(("tuning", key) for key in TUNING.as_dict()),
    *(("pretraining", key) for key in PRETRAINING.as_dict()), ("name",), ("files",), ("sizes",), ("tuning",),
    ("templates",), ("base_fingerprint",), ("descriptor",),
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_a_manifest_is_read_or_refused(place):
    parse_manifest(manifest_with(("images",), 7), "it")
    for value in IN_TOML:
        try:
            parse_manifest(manifest_with(place, value), "it")
        except IntegrityError:
            continue
        fine = {"name": ["x"], "base_fingerprint": ["x", ""], "descriptor": ["x"], "mask": [True], "templates": [[]]}
        assert value in fine.get(place[-1], []), value


def test_a_manifest_is_small():
    parse_manifest(manifest_with(("images",), 7) + b"#" * 10_000, "it")
    with pytest.raises(IntegrityError, match="larger than a manifest"):
        parse_manifest(b"#" * (MAX_BYTES + 1), "it")


# ── encoders ──

SIZES = {"image_layers": 4, "image_width": 8, "unet_widths": [4, 8], "hidden_width": 8, "embedding_width": 16}
PATCHES = {
    "architecture": "e4t-diffusion", "unet_width": 12, "hidden_width": 8, "embedding_width": 16, "tower_width": 8,
    "tower_layers": 2, "tower_heads": 2, "tower_image_size": 32, "tower_patch_size": 8,
}  # fmt: skip


@pytest.mark.parametrize("sizes", [SIZES, PATCHES], ids=["e4t", "e4t-diffusion"])
def test_an_encoder_has_possible_sizes(sizes):
    assert empty_encoder(sizes)
    for name in sizes:
        for value in [*WRONG, 0, 1.5, 1 << 20]:
            if name == "unet_widths" and value in ([], [1]):
                continue  # the first: an encoder of the image alone
            with pytest.raises((TypeError, ValueError)):
                empty_encoder({**sizes, name: value})
    with pytest.raises(ValueError, match="at most 512 layers"):
        empty_encoder({**SIZES, "image_layers": 60_000})
    with pytest.raises(ValueError, match="at most 512 layers"):
        empty_encoder({**SIZES, "unet_widths": [1] * 600})


# ── concepts ──


@pytest.fixture
def concept(tmp_path, model, domain_weights):
    from e4t_cli.registry.domain import PreparedImage
    from tests.conftest import drawn_face

    image = drawn_face(0, 64)[0]
    features = domain_weights.image_features(model, model.pixels([image]))[0]
    made = Concept(
        domain="face", descriptor="face", base_name="tiny", base_fingerprint=model.fingerprint, weights_digest="",
        prepared=PreparedImage(image=image), image_features=features, config=TUNING, seed=1,
    )  # fmt: skip
    made.save(tmp_path / "me.e4t")
    return made


def changed(tmp_path, change):
    path = tmp_path / "me.e4t"
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["e4t"])
    header = change(header)
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(load_file(path), tmp_path / "other.e4t", {"e4t": text})
    return tmp_path / "other.e4t"


def test_a_concept_with_impossible_entries_is_damaged(concept, tmp_path):
    assert Concept.load(changed(tmp_path, dict)).seed == 1
    for key in ("seed", *("domain", "schema", "recipe", "base_name", "descriptor")):
        for value in WRONG:
            if value in ("x", "") and key in ("base_name", "descriptor", "domain"):
                continue
            with pytest.raises(IntegrityError, match="not a usable concept"):
                Concept.load(changed(tmp_path, lambda header, key=key, value=value: {**header, key: value}))
    for name in TUNING.as_dict():
        for value in [*WRONG, 10**12]:
            if name in ("mask",) and value is True:
                continue
            recipe = {**TUNING.as_dict(), name: value}
            with pytest.raises(IntegrityError, match="not a usable concept"):
                Concept.load(changed(tmp_path, lambda header, recipe=recipe: {**header, "recipe": recipe}))
    for text in ("[]", "1", "null", "", "[" * 50_000, '"x"'):
        with pytest.raises(IntegrityError, match="not a usable concept"):
            Concept.load(changed(tmp_path, lambda _, text=text: text))


def test_features_of_another_shape_are_found_before_tuning(concept, model, domain_weights):
    pretrained = dataclasses.replace(domain_weights, base_fingerprint="", digest="")
    concept.check(model, pretrained)
    for shape in ((1, 1), (2, 33), (3, 32), (0, 32)):
        with pytest.raises(IntegrityError, match="image features do not fit the encoder"):
            dataclasses.replace(concept, image_features=torch.zeros(shape)).check(model, pretrained)
