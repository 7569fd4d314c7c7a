"""Imports only go down: the layers of the package as a table, checked against every module."""

import ast
import re
import sys
from pathlib import Path

import pytest

from e4t_cli import errors

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "e4t_cli"
DOMAINS = ROOT / "domains" / "e4t_domains"

LAYERS = [
    {"errors", "progress", "temporary", "cgroups"},
    {"system_memory", "threads"},
    {"files", "devices", "images.framing", "prompt_weights", "registry.config", "schedulers"},
    {"registry.domain"},  # the contract with the author of a domain
    {"prompts", "registry.manifest", "images"},
    {"hub", "nn"},
    {"images.preparation", "registry.discovery"},
    {"registry.weights", "datasets", "models"},
    {"formats", "training", "registry.store"},
    {"sampling", "images.results"},
    {"pretraining"},
    {"api", "registry"},
    {"cli"},
]
"""From the lowest to the highest. `package.module` overrides the layer of its package."""
HEIGHT = {unit: height for height, units in enumerate(LAYERS) for unit in units}
PUBLIC = {"__init__", "__main__"}  # re-exports everything, lazily
FILES = sorted(SOURCE.rglob("*.py"))
CONTRACT = {"errors", "progress", "files", "prompts", "prompt_weights"} | {
    *("images.framing", "registry.config", "registry.domain"),
}


def module_of(path):
    """Return a file's module inside the package: "images.framing"."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


def unit_of(module):
    """Return the entry of the table that a module belongs to."""
    parts = module.split(".")
    single = ".".join(parts[:2])
    return single if single in HEIGHT else parts[0]


def absolute(node, path):
    """Yield the full names that an import statement brings in, relative ones resolved."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name
    elif isinstance(node, ast.ImportFrom):
        package = ["e4t_cli", *path.relative_to(SOURCE).parts[:-1]] if SOURCE in path.parents else []
        base = package[: len(package) - node.level + 1] if node.level else []
        stem = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            yield f"{stem}.{alias.name}"


def imports(path, *, top_only=False):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_only else ast.walk(tree):
        for name in absolute(node, path):
            yield node.lineno if hasattr(node, "lineno") else 0, name


def test_every_module_has_a_layer():
    assert {unit_of(module_of(path)) for path in FILES} - PUBLIC == set(HEIGHT)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_only_go_down(path):
    unit = unit_of(module_of(path))
    if unit in PUBLIC:
        return
    for line, name in imports(path):
        package, _, rest = name.partition(".")
        if package == "e4t_domains" or package == "mini_world":
            pytest.fail(f"{path.name}:{line} imports {name}: the library knows no domain by name")
        if package != "e4t_cli" or rest == "__version__":
            continue
        other = unit_of(rest)
        assert other in HEIGHT, f"{path.name}:{line} imports {name}, which has no layer"
        below = HEIGHT[other] < HEIGHT[unit] or other.partition(".")[0] == unit.partition(".")[0]
        assert below, f"{path.name}:{line}: {unit} imports {other}, which is above it"


@pytest.mark.parametrize("module", sorted(CONTRACT))
def test_the_contract_needs_the_standard_library_only(module):
    path = SOURCE / f"{module.replace('.', '/')}.py"
    for line, name in imports(path, top_only=True):
        package = name.partition(".")[0]
        assert package in sys.stdlib_module_names | {"e4t_cli"}, f"{module}:{line} imports {name}"


@pytest.mark.parametrize("path", sorted((SOURCE / "nn").glob("*.py")), ids=lambda path: path.name)
def test_the_mathematics_needs_torch_only(path):
    for line, name in imports(path, top_only=True):
        package = name.partition(".")[0]
        allowed = sys.stdlib_module_names | {"e4t_cli", "torch"}
        assert package in allowed, f"{path.name}:{line} imports {name}"


def test_the_paper_is_short():
    """What CONTRIBUTING lists as the paper's mathematics stays short enough to be read in an hour."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"`((?:nn|training|models)/\w+[.]py)`", page.partition("The paper's mathematics")[2])
    assert len(listed) == 6
    assert sum(len((SOURCE / name).read_text(encoding="utf-8").splitlines()) for name in listed) <= 1200


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_names_are_resolved_in_the_api(path):
    """Below the api, functions take a Domain, never its name."""
    unit = unit_of(module_of(path))
    if not unit.startswith("registry") and HEIGHT.get(unit, 99) < HEIGHT["api"]:
        found = [name for _, name in imports(path) if name.startswith("e4t_cli.registry")]
        allowed = ("registry.config", "registry.domain", "registry.manifest")
        assert all(name.startswith(tuple(f"e4t_cli.{one}" for one in allowed)) for name in found)


@pytest.mark.parametrize("path", sorted(DOMAINS.glob("*.py")), ids=lambda path: path.name)
def test_domains_use_the_public_api(path):
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


def test_contributing_shows_the_layers():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = page.partition("## Layers")[2].partition("\n- ")[0]
    rows = [re.findall(r"`([\w.]+)/?`", line) for line in table.splitlines() if line[:1] == "|"]
    assert [set(row) for row in rows if row] == LAYERS[::-1]


def test_contributing_names_modules_that_exist():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = page.partition("## Packages\n")[2].partition("\n\nThe paper")[0]
    packages = dict(re.findall(r"^- `([\w/]+)/`: (.*(?:\n  .*)*)", section, re.M))
    assert {path.parent.name for path in SOURCE.glob("*/__init__.py")} <= set(packages)
    for package, text in packages.items():
        folder = SOURCE / package
        if not folder.is_dir():
            continue
        names = re.findall(r"`([a-z_]+)`", text)
        assert [name for name in names if not [*folder.glob(f"{name}.py"), *folder.glob(name)]] == [], package


def test_contributing_shows_the_exit_codes():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = {name: int(code) for code, name in re.findall(r"\| (\d) \|.*\| `(\w+)` \|", page)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert shown == {kind.__name__: kind.exit_code for kind in kinds if kind.__module__ == errors.__name__}
