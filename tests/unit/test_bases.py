"""Base folders and their manifests: reading and validation."""

import json

import pytest

from e4t_cli.errors import IntegrityError, UsageError, WeightsUnavailable
from e4t_cli.hub.bases import find_base, installed_bases

CARD = 'schema = 1\nname = "toy"\nlicence = "CC0-1.0"\nrevision = "7"\nresolution = 32\n'


@pytest.fixture
def folder(tmp_path):
    base = tmp_path / "My Base"
    for part, config in {
        "unet": {"sample_size": 16},
        "vae": {"block_out_channels": [8, 8, 8]},
    }.items():
        (base / part).mkdir(parents=True)
        (base / part / "config.json").write_text(json.dumps(config))
    (base / "model_index.json").write_text("{}")
    return base


def test_a_folder_with_a_manifest(folder):
    (folder / "base.toml").write_text(CARD)
    base = find_base(folder)
    assert (base.name, base.licence, base.revision, base.resolution) == ("toy", "CC0-1.0", "7", 32)
    assert base.folder == folder


def test_a_folder_without_a_manifest_is_named_and_measured(folder):
    base = find_base(str(folder))
    assert (base.name, base.revision, base.resolution) == ("my-base", "local", 64)


@pytest.mark.parametrize(
    "manifest",
    [
        "schema = ",
        CARD.replace("schema = 1", "schema = 2"),
        CARD.replace('"toy"', '"../toy"'),
        CARD.replace("32", '"32"'),
        CARD + 'surprise = "x"\n',
        CARD.replace("resolution = 32\n", ""),
    ],
)
def test_bad_manifests(folder, manifest):
    (folder / "base.toml").write_text(manifest)
    with pytest.raises(IntegrityError, match="base.toml cannot be used"):
        find_base(folder)


def test_not_a_base(folder):
    (folder / "model_index.json").unlink()
    with pytest.raises(IntegrityError, match="model_index.json"):
        find_base(folder)
    with pytest.raises(UsageError, match="no folder"):
        find_base("./nowhere")
    with pytest.raises(UsageError, match="cannot be the name"):
        find_base("nul\0byte")


@pytest.mark.parametrize("name", ["sd14", "minni", "someone/a-model"])
def test_unknown_names_list_the_known_ones(name):
    with pytest.raises(WeightsUnavailable, match="not on this machine") as caught:
        find_base(name)
    assert "--base mini" in caught.value.hint


def test_the_embedded_base():
    assert [base.name for base in installed_bases()] == ["mini"]
    assert find_base() == find_base("auto") == find_base("mini")
