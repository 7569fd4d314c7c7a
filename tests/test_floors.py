"""Imports only go down: the house as a table, held by reading every module's syntax tree."""

import ast
import re
import sys
from pathlib import Path

import pytest

from e4t_cli import errors

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "e4t_cli"
DOMAINS = ROOT / "domains" / "e4t_domains"

FLOORS = [
    # the contract: standard library only
    {"errors", "framing", "names", "progress", "recipes", "stopping"},
    {"domain", "decoding"},
    {
        "files",
        "manifest",
        "prompts",
        "images",
        "bases",
        "metadata",
        "architecture",
        "estimates",
    },  # finding and seeing
    {"hub"},  # files of the hub
    {"segmenters"},
    {"preparation"},
    {"registry", "photos"},
    {"sources"},  # where a domain's pictures come from
    {"nn", "randomness", "devices"},  # the paper's mathematics: torch only
    {"recording"},  # and what makes it fast on a card
    {"pack_files"},
    {"base_model", "encoders"},  # the world outside
    {"pack_folder"},
    {"pretrained"},
    {"e4t_diffusion"},  # checkpoints of another program
    {"tuned_model", "concept_file"},
    {"concept"},
    {"training_loss", "memory"},
    {"tuning", "pretraining"},  # the work
    {"generation", "safety"},
    {"results", "exporting"},
    {"watching"},
    {"session"},
    {"api", "testing", "shelf"},  # the library
    {"cli"},
]
HEIGHT = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
DOOR = {"__init__", "__main__"}  # re-exports everything, lazily
FILES = sorted(SOURCE.rglob("*.py"))


def room_of(path):
    """A module's room: its own name, or that of the folder it is in."""
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def absolute(node, path):
    """Yield the full names that an import statement brings in, relative ones resolved."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name
    elif isinstance(node, ast.ImportFrom):
        package = (
            ["e4t_cli", *path.relative_to(SOURCE).parts[:-1]] if SOURCE in path.parents else []
        )
        base = package[: len(package) - node.level + 1] if node.level else []
        stem = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            yield f"{stem}.{alias.name}"


def imports(path, *, top_only=False):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_only else ast.walk(tree):
        for name in absolute(node, path):
            yield node.lineno if hasattr(node, "lineno") else 0, name


def test_every_module_has_a_floor():
    assert {room_of(path) for path in FILES} - DOOR <= set(HEIGHT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_imports_only_go_down(path):
    room = room_of(path)
    if room in DOOR:
        return
    for line, name in imports(path):
        package, _, rest = name.partition(".")
        if package == "e4t_domains" or package == "mini_world":
            pytest.fail(f"{path.name}:{line} imports {name}: the library knows no domain by name")
        if package != "e4t_cli" or rest == "__version__":
            continue
        other = rest.partition(".")[0]
        assert other in HEIGHT, f"{path.name}:{line} imports {name}, which has no floor"
        below = HEIGHT[other] < HEIGHT[room] or other == room
        assert below, f"{path.name}:{line} climbs from {room} to {other}"


@pytest.mark.parametrize("room", sorted(FLOORS[0]) + ["domain", "prompts", "files"])
def test_the_contract_needs_the_standard_library_only(room):
    for line, name in imports(SOURCE / f"{room}.py", top_only=True):
        package = name.partition(".")[0]
        assert package in sys.stdlib_module_names | {"e4t_cli"}, f"{room}.py:{line} imports {name}"


@pytest.mark.parametrize("path", sorted((SOURCE / "nn").glob("*.py")), ids=lambda path: path.name)
def test_the_mathematics_needs_torch_only(path):
    for line, name in imports(path, top_only=True):
        package = name.partition(".")[0]
        allowed = sys.stdlib_module_names | {"e4t_cli", "torch"}
        assert package in allowed, f"{path.name}:{line} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_the_registry_stays_at_the_door(path):
    """Below the api, functions take a Domain, never its name."""
    if room_of(path) != "registry" and HEIGHT.get(room_of(path), 99) < HEIGHT["api"]:
        assert not [line for line, name in imports(path) if name.startswith("e4t_cli.registry")]


@pytest.mark.parametrize("path", sorted(DOMAINS.glob("*.py")), ids=lambda path: path.name)
def test_domains_use_the_public_door(path):
    for line, name in imports(path):
        stem, _, _ = name.rpartition(".")
        if name.startswith("e4t_cli"):
            assert stem == "e4t_cli", f"{path.name}:{line} imports {name}"
    for line, name in imports(path, top_only=True):
        package = name.partition(".")[0]
        allowed = sys.stdlib_module_names | {"e4t_cli", "e4t_domains", "PIL"}
        assert package in allowed, f"{path.name}:{line} imports {name}: a list would pay for it"


def test_nobody_imports_click():
    for path in [*FILES, *DOMAINS.glob("*.py")]:
        assert not [name for _, name in imports(path) if name.partition(".")[0] == "click"]


def test_contributing_shows_this_house():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = page.partition("## Floors")[2].partition("\n- ")[0]
    named = set(re.findall(r"`(\w+)/?`", table))
    assert named == set(HEIGHT)
    rows = [re.findall(r"`(\w+)/?`", line) for line in table.splitlines() if line.startswith("|")]
    lowest = [min(HEIGHT[room] for room in row) for row in rows if row]
    assert lowest == sorted(lowest, reverse=True)


def test_contributing_shows_the_exit_codes():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = {name: int(code) for code, name in re.findall(r"\| (\d) \|.*\| `(\w+)` \|", page)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert shown == {
        kind.__name__: kind.exit_code for kind in kinds if kind.__module__ == errors.__name__
    }
