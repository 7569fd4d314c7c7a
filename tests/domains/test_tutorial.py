"""domains/README.md is a contract: its files make a package that works, as they stand there."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).parents[2] / "domains" / "README.md"
FILE = re.compile(r"^\*\*`([\w.]+)`\*\*\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def build(folder, versions):
    """Write the tutorial's files, and what an installer makes of its pyproject.toml.

    Args:
        folder: stands for site-packages.
        versions: "first" or "last" of each file, where the tutorial shows one twice.
    """
    blocks = FILE.findall(TUTORIAL.read_text(encoding="utf-8"))
    files = dict(blocks if versions == "last" else reversed(blocks))
    assert sorted(files) == ["e4t_domain_dog.py", "pyproject.toml", "test_dog.py"]
    for name, text in files.items():
        (folder / name).write_text(text)
    project = tomllib.loads(files["pyproject.toml"])["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def run(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("versions", ["first", "last"])
def test_the_tutorial_works(tmp_path, versions):
    build(tmp_path, versions)
    tested = run(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_dog.py")
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert "1 passed" in tested.stdout
    listed = run(tmp_path, "-m", "e4t_cli", "domains", "list")
    assert listed.returncode == 0, listed.stderr
    assert "dog" in listed.stdout


def test_the_tutorial_names_what_the_door_has():
    import e4t_cli

    text = TUTORIAL.read_text(encoding="utf-8")
    imported = {
        name.strip()
        for line in re.findall(r"from e4t_cli import (.*)", text)
        for name in line.split(",")
    }
    promised = set(re.findall(r"`(\w+)`", text.partition("What you can rely on")[2])) & imported
    assert imported - {"find_domain"} == promised
    assert imported <= set(e4t_cli.__all__)
