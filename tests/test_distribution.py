"""The wheel and the source archive, built here and installed in a new environment.

The wheel is installed in an environment of its own, outside of the repository. What it depends on
comes from the environment that runs the tests, whose folders a .pth file names. Their own .pth
files are not read then, so an editable installation of e4t is not among it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from PIL import Image

import e4t_cli

ROOT = Path(__file__).parent.parent
PACKAGES = {"e4t_cli": ROOT / "src" / "e4t_cli", "e4t_domains": ROOT / "domains" / "e4t_domains"}
DEPENDENCIES = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
LEFT_OUT = {"__pycache__", ".DS_Store"}


def done(command, folder, **environment):
    """Run a program without the settings of this one; returns its stdout."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("E4T_", "PYTHON", "PYTEST_", "VIRTUAL_ENV"))
    }
    ended = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**kept, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
    )
    assert ended.returncode == 0, f"{command}: {ended.stdout}\n{ended.stderr}"
    return ended.stdout


def build(source, kind, target):
    """Build a wheel or an sdist of a folder, with the backend itself: nothing is fetched."""
    done([sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", target], source)
    (made,) = target.iterdir()
    return made


def packaged_files():
    """Return what the two packages consist of, as names inside a wheel."""
    return {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.is_file() and not LEFT_OUT & set(path.parts)
    }


def plain_name(requirement):
    """Return the name in a requirement, as package indexes compare names."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build(ROOT, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Install the wheel in a new environment; returns the folder of its programs."""
    folder = tmp_path_factory.mktemp("elsewhere") / "venv"
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    command = [sys.executable, "-m", "pip", "--python", programs / "python", "install", "--quiet"]
    done([*command, "--no-index", "--no-deps", wheel], folder)
    # Only now: pip must not see, and least of all replace, the e4t that runs these tests.
    site = done([programs / "python", "-c", "import site; print(site.getsitepackages()[0])"], folder)
    lines = "".join(f"{path}\n" for path in DEPENDENCIES)
    (Path(site.strip()) / "dependencies.pth").write_text(lines, encoding="utf-8")
    return programs


def test_one_version_everywhere():
    version = e4t_cli.__version__
    cited = re.search(r'^version: "(.*)"$', (ROOT / "CITATION.cff").read_text("utf-8"), re.M)
    assert cited and cited[1] == version
    released = re.findall(r"^## \[(\d.*)\] - (.*)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    dated = re.search(r'^date-released: "(.*)"$', (ROOT / "CITATION.cff").read_text("utf-8"), re.M)
    assert dated and released[0] == (version, dated[1])


@pytest.mark.slow
def test_the_wheel_is_the_two_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"e4t-{e4t_cli.__version__}.dist-info"
        about = message_from_bytes(archive.read(f"{info}/METADATA"))
    assert {name for name in names if not name.startswith(f"{info}/")} == packaged_files()
    assert "e4t_cli/py.typed" in names
    assert sum(name.endswith(".safetensors") for name in names) >= 11
    assert not any({"tests", "conftest.py"} & set(name.split("/")) for name in names)
    assert f"{info}/licenses/LICENSE" in names
    assert about["Version"] == e4t_cli.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert about["Requires-Python"] == project["requires-python"]
    required = {plain_name(line) for line in about.get_all("Requires-Dist")}
    assert {plain_name(line) for line in project["dependencies"]} <= required


@pytest.mark.slow
def test_the_source_archive_makes_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    here = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    needed = {"pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "Makefile"}
    assert needed | {"SECURITY.md", "tests/test_distribution.py", "examples/me.png"} <= here
    assert not any(name.startswith((".git/", ".venv/", ".mini/", "outputs/")) for name in here)
    made = build(source, "wheel", tmp_path / "wheel")
    with zipfile.ZipFile(made) as one, zipfile.ZipFile(wheel) as other:
        assert {(entry.filename, entry.CRC) for entry in one.infolist()} == {
            (entry.filename, entry.CRC) for entry in other.infolist()
        }


@pytest.mark.slow
def test_the_installed_command_works(installed, tmp_path):
    photo = tmp_path / "photo" / "me.png"
    photo.parent.mkdir()
    shutil.copyfile(ROOT / "examples" / "me.png", photo)
    empty = tmp_path / "empty"
    empty.mkdir()

    code = "import e4t_cli, e4t_domains; print(e4t_cli.__file__); print(e4t_domains.__file__)"
    for place in done([installed / "python", "-c", code], empty).splitlines():
        assert Path(place).is_relative_to(installed.parent)

    e4t = installed / "e4t"
    words = ["personalize", "face", photo, "S* as an astronaut", "--seed", "1"]
    steps = ["--tune-steps", "1", "--steps", "2"]
    printed = done([e4t, *words, *steps], empty, HF_HUB_OFFLINE="1")
    (saved,) = printed.splitlines()
    assert [path.name for path in empty.iterdir()] == ["outputs"]
    with Image.open(empty / saved) as picture:
        assert picture.size == (64, 64)

    listed = map(json.loads, done([e4t, "domains", "list", "--json"], empty, HF_HUB_OFFLINE="1").splitlines())
    version = e4t_cli.__version__
    sound = {row["name"]: row["source"] for row in listed if row["reason"] is None}
    assert sound == dict.fromkeys(["face", "cat", "art"], f"e4t {version}")
    assert done([e4t, "--version"], empty) == f"e4t {version}\n"
