"""The tutorial domains/README.md: its files, unchanged, make a package that works."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from e4t_cli.registry.scaffold import new_domain

TUTORIAL = Path(__file__).parents[2] / "domains" / "README.md"
FILE = re.compile(r"^\*\*`([\w./]+)`\*\*\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHOWN = ["e4t_domain_dog/__init__.py", "pyproject.toml", "tests/test_domain.py"]


def blocks(which):
    """Return the tutorial's files, "first" or "last" of those that it shows twice."""
    found = FILE.findall(TUTORIAL.read_text(encoding="utf-8"))
    files = dict(found if which == "last" else reversed(found))
    assert sorted(files) == SHOWN
    return files


def install(folder):
    """Write what an installer makes of a package's pyproject.toml."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def run(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def package(tmp_path):
    """What `e4t domains new dog --licence CC0-1.0` writes."""
    return new_domain("dog", tmp_path / "e4t-domain-dog", licence="CC0-1.0")


def test_the_files_shown_are_those_that_new_writes(package):
    for name, text in blocks("first").items():
        written = (package / name).read_text(encoding="utf-8")
        assert written.partition("\n[tool.e4t]\n")[0] == text.rstrip("\n") + "\n" or written == text


@pytest.mark.parametrize("version", ["first", "last"])
def test_the_tutorial_works(package, version):
    for name, text in blocks(version).items():
        (package / name).write_text(text, encoding="utf-8")
    install(package)
    tested = run(package, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert "2 passed" in tested.stdout
    listed = run(package, "-m", "e4t_cli", "domains", "list")
    assert listed.returncode == 0, listed.stderr
    assert "dog   e4t-domain-dog 0.1.0" in listed.stdout
    checked = run(package, "-m", "e4t_cli", "domains", "check", "dog")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_both_ways_of_weights_are_spelled_as_they_are_read():
    """The two indented lines of `weights` are locations that a `Domain` accepts."""
    from e4t_cli.registry.domain import check_location

    text = TUTORIAL.read_text(encoding="utf-8")
    places = re.findall(r'^    weights=\{"mini": "(.*)"\},$', text, re.MULTILINE)
    assert [place.partition(":")[0] for place in places] == ["package", "hub"]
    for place in places:
        check_location(place.replace("<40-digit commit>", "0" * 40))


def test_the_tutorial_uses_the_public_api():
    import e4t_cli

    text = TUTORIAL.read_text(encoding="utf-8")
    imported = {name.strip() for line in re.findall(r"from e4t_cli import (.*)", text) for name in line.split(",")}
    promised = set(re.findall(r"`(\w+)`", text.partition("What you can rely on")[2])) & imported
    assert imported - {"find_domain"} == promised
    assert imported <= set(e4t_cli.__all__)
