"""The architecture of a base, derived from its configs."""

import json
import shutil

import pytest

from e4t_cli.hub.bases import find_base
from e4t_cli.models.loading import config_hash, describe_tower


@pytest.fixture
def base(tmp_path):
    return shutil.copytree(
        find_base("mini").folder,
        tmp_path / "base",
        ignore=shutil.ignore_patterns("*.safetensors"),
    )


def change(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_other_weights_have_the_same_hash(base):
    assert len(config_hash(base)) == 64
    assert config_hash(base) == config_hash(find_base("mini").folder)


@pytest.mark.parametrize(
    ("file", "entry", "same"),
    [
        ("unet/config.json", {"_diffusers_version": "9", "_name_or_path": "x"}, True),
        ("text_encoder/config.json", {"transformers_version": "9", "dtype": "float16"}, True),
        ("unet/config.json", {"cross_attention_dim": 1024}, False),
        ("text_encoder/config.json", {"hidden_size": 1}, False),
        ("vae/config.json", {"sample_size": 1}, True),
    ],
)
def test_only_what_decides_on_shapes_counts(base, file, entry, same):
    before = config_hash(base)
    change(base / file, **entry)
    assert (config_hash(base) == before) is same


def test_a_tower_may_be_elsewhere(base, tmp_path):
    whole = config_hash(base)
    (base / "image_tower").rename(tmp_path / "tower")
    assert config_hash(base) != whole
    assert config_hash(base, tmp_path / "tower") == whole
    description = "CLIP ViT, 8 layers of 128, patches of 8, 64 px"
    assert (describe_tower(base), describe_tower(base, tmp_path / "tower")) == ("", description)


def test_the_other_layout_of_towers(tmp_path):
    about = {"hidden_size": 1280, "num_hidden_layers": 32, "patch_size": 14, "image_size": 224}
    for table in (about, {"vision_config": 1, **about}):
        (tmp_path / "config.json").write_text(json.dumps(table))
        description = describe_tower(tmp_path, tmp_path)
        assert description == "CLIP ViT, 32 layers of 1280, patches of 14, 224 px"


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, '{"model_cfg": 3}'])
def test_nothing_readable_is_no_hash(tmp_path, text):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(text if text != '{"model_cfg": 3}' else "3")
    (tmp_path / "open_clip_config.json").write_text(text)
    assert config_hash(tmp_path) == ""
    assert describe_tower(tmp_path, tmp_path) == ""
