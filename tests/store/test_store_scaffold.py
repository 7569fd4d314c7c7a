"""`new_domain`: a package that installs, is found, and whose own tests pass (row G6)."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv

import pytest

from e4t_cli.errors import UsageError
from e4t_cli.registry.scaffold import new_domain
from tests.store.conftest import FILES, write_domain_folder

FILES_OF_A_PACKAGE = [
    "README.md",
    "e4t_domain_my_dogs/__init__.py",
    "pyproject.toml",
    "tests/test_domain.py",
]


def files_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def load(folder, module):
    """Return the `Domain` that a package's module makes."""
    names = {}
    exec((folder / module / "__init__.py").read_text(encoding="utf-8"), names)
    return names["domain"]


def test_four_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = new_domain("my_dogs", descriptor="dog", licence="CC0-1.0")
    assert made.name == "e4t-domain-my-dogs"
    assert os.listdir(tmp_path) == ["e4t-domain-my-dogs"]
    assert files_below(made) == FILES_OF_A_PACKAGE
    project = tomllib.loads((made / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["e4t.domains"] == {"my_dogs": "e4t_domain_my_dogs:domain"}
    dogs = load(made, "e4t_domain_my_dogs")
    assert (dogs.name, dogs.descriptor, dogs.licence) == ("my_dogs", "dog", "CC0-1.0")
    assert (dogs.tuning.steps, dogs.pretraining.steps, dogs.weights) == (5, 60_000, {})


def test_the_numbers_are_those_of_cat():
    from e4t_cli.registry.discovery import find_domain
    from e4t_cli.registry.scaffold import PRETRAINING, TUNING

    cat = find_domain("cat")
    assert (cat.tuning, cat.pretraining) == (TUNING, PRETRAINING)


@pytest.mark.parametrize("name", ["3d", "class", "a-b_c", "x-", "a" * 64])
def test_names_that_are_no_identifiers(tmp_path, name):
    made = new_domain(name, tmp_path / "new", descriptor='a "q\\uote" ünd\'s {}')
    project = tomllib.loads((made / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, value = project["entry-points"]["e4t.domains"][name].partition(":")
    assert module.isidentifier() and value == "domain"
    assert load(made, module).name == name
    compile((made / "tests" / "test_domain.py").read_text(), "test", "exec")


def test_weights_are_shipped_in_the_package(tmp_path):
    domain_folder = write_domain_folder(tmp_path / "pack")
    made = new_domain("my_dogs", tmp_path / "new", weights=domain_folder)
    packed = made / "e4t_domain_my_dogs" / "packs" / "toy"
    assert {path.name for path in packed.iterdir()} == {"domain.toml", *FILES}
    dogs = load(made, "e4t_domain_my_dogs")
    assert dogs.weights == {"toy": "package:e4t_domain_my_dogs/packs/toy"}
    assert (dogs.descriptor, dogs.licence, dogs.pretraining.steps) == ("dog", "CC0-1.0", 1000)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "../x"}, "domain name"),
        ({"name": "face"}, "belongs to a domain of e4t"),
        ({"name": "x", "descriptor": "a\nb"}, "not a line of plain text"),
        ({"name": "x", "folder": "full"}, "not an empty folder"),
        ({"name": "x", "folder": "full/file"}, "not an empty folder"),
        ({"name": "x", "folder": "full/file/below"}, "full/file is not a folder"),
        ({"name": "x", "folder": "."}, "no name for a new folder"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    with pytest.raises(UsageError, match=says):
        new_domain(**arguments)
    assert files_below(tmp_path) == ["full/file"]
    assert os.listdir(tmp_path) == ["full"]


def test_damaged_weights_leave_no_package(tmp_path):
    domain_folder = write_domain_folder(tmp_path / "pack")
    (domain_folder / "encoder.safetensors").write_bytes(b"x" * (domain_folder / "encoder.safetensors").stat().st_size)
    with pytest.raises(Exception, match="SHA-256"):
        new_domain("my_dogs", tmp_path / "new", weights=domain_folder)
    assert sorted(os.listdir(tmp_path)) == ["pack"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "mine").mkdir()
    assert files_below(new_domain("my_dogs", tmp_path / "mine")) == FILES_OF_A_PACKAGE


def test_G6_its_own_tests_pass_once_installed(tmp_path):
    """A real environment on top of this one, a real `pip install -e`, and no network."""
    pytest.importorskip("hatchling")
    pytest.importorskip("editables")
    made = new_domain("my_dogs", tmp_path / "new", descriptor="dog")
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"

    def run(*arguments):
        settings = {
            **os.environ,
            "PIP_NO_INDEX": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        done = subprocess.run([python, *arguments], cwd=made, env=settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # addsitedir also reads the .pth files there, by which an editable e4t is found.
    outer = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    with open(os.path.join(where, "outer.pth"), "w", encoding="utf-8") as file:
        file.write(outer)
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "-e", str(made))
    assert "2 passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert "my_dogs  e4t-domain-my-dogs 0.1.0" in run("-m", "e4t_cli", "domains", "list")
    assert sys.prefix not in where


@pytest.mark.parametrize(("name", "word"), [("my_dogs", "dog"), ("cats2026", "cat"), ("our-photos-of-faces", "face")])
def test_the_descriptor_is_found_in_the_name(tmp_path, name, word):
    """As `e4t pretrain` finds it, on the base that comes with e4t."""
    assert f'descriptor="{word}"' in next(new_domain(name, tmp_path / "new").glob("*/__init__.py")).read_text("utf-8")


def test_a_name_without_a_descriptor(tmp_path):
    with pytest.raises(UsageError, match="no word of 'my_teapots'") as caught:
        new_domain("my_teapots", tmp_path / "new")
    assert "--descriptor WORD" in caught.value.hint and os.listdir(tmp_path) == []
