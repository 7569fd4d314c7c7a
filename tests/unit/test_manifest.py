"""domain.toml is read with suspicion (rows F8 and F9 of the reliability table)."""

import pytest

from e4t_cli import TuningRecipe
from e4t_cli.errors import IntegrityError
from e4t_cli.manifest import read_manifest

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
    assert manifest.tuning == TuningRecipe(steps=5, base_learning_rate=3e-6, embedding_penalty=1e-4)
    assert manifest.pretraining.steps == 1000
    assert manifest.files == {"encoder.safetensors": "b" * 64}


def test_a_newer_one_says_upgrade(read):
    with pytest.raises(IntegrityError, match="newer") as caught:
        read(GOOD.replace("schema = 1", "schema = 2"))
    assert "upgrade" in caught.value.hint


FILE = '"encoder.safetensors"'


@pytest.mark.parametrize(
    ("old", "new", "says"),
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
def test_bad_ones(read, old, new, says):
    assert old in GOOD
    with pytest.raises(IntegrityError, match=f"cannot be used: {says}"):
        read(GOOD.replace(old, new))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"schema = ", "not TOML"),
        (b"\xff\xfe", "not TOML"),
        (b"x = " + b"[" * 100_000, "not TOML"),
        (b"#" * 1_000_001, "larger"),
    ],
)
def test_hostile_ones(read, data, says):
    with pytest.raises(IntegrityError, match=says):
        read(data)


def test_a_missing_one(tmp_path):
    with pytest.raises(IntegrityError, match="cannot be read"):
        read_manifest(tmp_path / "domain.toml")
