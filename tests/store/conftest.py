"""Domain folders with a valid manifest and two small files that match it."""

import hashlib
import zipfile
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save

from e4t_cli.registry.manifest import toml_text

FILES = {
    "encoder.safetensors": save({"weight": numpy.arange(6, dtype=numpy.float32)}),
    "offsets.safetensors": save({"x.left": numpy.ones((2, 3), numpy.float16)}),
}


def manifest_text(name="my_dogs", files=None, **changes):
    """Return a manifest, of files that need not be those beside it."""
    files = FILES if files is None else files
    table = {
        "schema": 1,
        "name": name,
        "descriptor": "dog",
        "base": "toy",
        "base_fingerprint": "a" * 32,
        "images": 1234,
        "licence": "CC0-1.0",
        "limits": "dogs only",
        **changes,
        "tuning": {"steps": 5, "base_learning_rate": 3e-6, "embedding_penalty": 1e-4},
        "pretraining": {"steps": 1000},
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        "sizes": {name: len(data) for name, data in files.items()},
    }
    return toml_text(table)


def write_domain_folder(folder: Path, files=None, **changes) -> Path:
    """Write a valid domain into a new folder."""
    files = FILES if files is None else files
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "domain.toml").write_text(manifest_text(files=files, **changes))
    return folder


def write_zip(path: Path, folder: Path, prefix: str = "") -> Path:
    """Write a folder's files into a zip."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, prefix + file.name)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """A valid domain folder."""
    return write_domain_folder(tmp_path / "somewhere")


@pytest.fixture(autouse=True)
def every_domain(monkeypatch):
    """No narrowing from outside."""
    monkeypatch.delenv("E4T_DOMAINS", raising=False)
