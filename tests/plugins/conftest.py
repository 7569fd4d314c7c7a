"""Sample distributions, installed by writing what an installer would write."""

import sys
import textwrap

import pytest

GOOD = """
    from e4t_cli import Domain, TuningConfig

    {name} = Domain(
        name="{name}",
        descriptor="{name}",
        tuning=TuningConfig(steps=5, base_learning_rate=3e-6, reg_weight=1e-4),
    )
"""


@pytest.fixture(autouse=True)
def every_domain(monkeypatch):
    """No narrowing from outside."""
    monkeypatch.delenv("E4T_DOMAINS", raising=False)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on sys.path that stands for site-packages."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def install(site):
    """install("e4t-dog", dog=source): a distribution whose entry points are those modules."""
    modules = []

    def _install(package, *, version="1.0", **sources):
        stem = package.replace("-", "_").replace(".", "_")
        info = site / f"{stem}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        lines = ["[e4t.domains]"]
        for name, source in sources.items():
            module = f"{stem}_{name}"
            (site / f"{module}.py").write_text(textwrap.dedent(source.replace("{name}", name)))
            lines.append(f"{name} = {module}:{name}")
            modules.append(module)
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")

    yield _install
    for module in modules:  # the next test may install others of these names
        sys.modules.pop(module, None)


@pytest.fixture
def good():
    """Source of a domain as the tutorial writes it."""
    return GOOD
