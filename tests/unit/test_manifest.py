"""Validation of domain.toml (rows F8 and F9 of the reliability table)."""

import pytest

from e4t_cli.errors import IntegrityError
from e4t_cli.registry.config import TuningConfig
from e4t_cli.registry.manifest import read_manifest, toml_text

GOOD = f"""
schema = 1
name = "dog"
descriptor = "dog"
base = "mini"
base_fingerprint = "{"a" * 64}"
images = 40
licence = "CC0-1.0"
templates = ["a photo of {{}}"]

[tuning]
steps = 5
base_learning_rate = 3e-6
embedding_penalty = 1e-4

[pretraining]
steps = 1000

[files]
"encoder.safetensors" = "{"b" * 64}"
"""


@pytest.fixture
def read(tmp_path):
    def _read(text):
        path = tmp_path / "domain.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_manifest(path)

    return _read


def test_a_good_one(read):
    manifest = read(GOOD)
    assert manifest.tuning == TuningConfig(steps=5, base_learning_rate=3e-6, reg_weight=1e-4)
    assert manifest.pretraining.steps == 1000
    assert manifest.files == {"encoder.safetensors": "b" * 64}


def test_a_newer_one_asks_for_an_upgrade(read):
    with pytest.raises(IntegrityError, match="newer") as caught:
        read(GOOD.replace("schema = 1", "schema = 2"))
    assert "upgrade" in caught.value.hint


FILE = '"encoder.safetensors"'


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("schema = 1\n", "", "schema"),
        ("schema = 1", "schema = true", "schema"),
        ("images = 40", 'images = 40\ntrust = "me"', "trust"),
        ("images = 40", 'images = "40"', "images"),
        ("images = 40", "images = -1", "images"),
        ('name = "dog"', 'name = "../dog"', "name"),
        ('base = "mini"', 'base = "C:mini"', "base"),
        ('descriptor = "dog"', 'descriptor = ""', "descriptor"),
        ("of {}", "of", "templates"),
        ("steps = 5", "steps = -5", "tuning"),
        ("steps = 5", "steps = 5\nspeed = 1", "tuning"),
        ("steps = 1000\n", "", "pretraining"),
        ("b" * 64, "b" * 63, "files"),
        (FILE, '"../encoder.safetensors"', "files"),
        (FILE, '"/etc/passwd"', "files"),
        (FILE, '"C:\\\\x"', "files"),
        (FILE, '"~"', "files"),
        (FILE, '".."', "files"),
        (FILE, '"a\\u0000b"', "files"),
    ],
)
def test_bad_ones(read, old, new, expected):
    assert old in GOOD
    with pytest.raises(IntegrityError, match=f"cannot be used: {expected}"):
        read(GOOD.replace(old, new))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"schema = ", "not TOML"),
        (b"\xff\xfe", "not TOML"),
        (b"x = " + b"[" * 60_000, "not TOML"),
        (b"#" * 65_537, "larger"),
    ],
)
def test_hostile_ones(read, data, expected):
    with pytest.raises(IntegrityError, match=expected):
        read(data)


def test_a_missing_one(tmp_path):
    with pytest.raises(IntegrityError, match="cannot be read"):
        read_manifest(tmp_path / "domain.toml")


def test_optional_newer_fields_are_read(read):
    more = f"""
base_revision = "CompVis/stable-diffusion-v1-4@{"c" * 40}"
base_config_hash = "{"d" * 64}"
image_tower = "CLIP ViT"
limits = "dogs only"
"""
    manifest = read(GOOD.replace('licence = "CC0-1.0"\n', f'licence = "CC0-1.0"{more}') + SIZES)
    assert manifest.sizes == {"encoder.safetensors": 123}
    assert manifest.base_config_hash == "d" * 64
    assert (manifest.image_tower, manifest.limits) == ("CLIP ViT", "dogs only")


SIZES = '\n[sizes]\n"encoder.safetensors" = 123\n'


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (SIZES.replace("123", "-1"), "sizes"),
        (SIZES.replace("123", '"123"'), "sizes"),
        (SIZES.replace("123", "1.5"), "sizes"),
        (SIZES.replace("encoder", "other"), "its contents: .*'other.safetensors', which files"),
        ('\n"x.pt" = "' + "b" * 64 + '"\n', "files"),
        ('\n"nul.safetensors" = "' + "b" * 64 + '"\n', "files"),
    ],
)
def test_sizes_and_files_are_checked(read, more, expected):
    with pytest.raises(IntegrityError, match=f"cannot be used: {expected}"):
        read(GOOD + more)


def test_what_is_written_is_read(read):
    """`toml_text` and TOML's own reader agree, whatever the text is."""
    import tomllib

    table = {"a": 'x"\\\n\x00\x7f\U0001f600', "b": [1, 2.5e-7, True], "c": {"d.e": 1, "f": "g"}}
    assert tomllib.loads(toml_text(table)) == table
