"""A user's folder with an installed domain's name provides its weights, without a name conflict."""

from pathlib import Path

import pytest

from e4t_cli.api.options import DomainTrainingOptions
from e4t_cli.api.pretraining_setup import plan_domain
from e4t_cli.errors import UsageError
from e4t_cli.registry.discovery import find_domain, installed_domains, user_domains_folder, weights_folder

MANIFEST = """
schema = 1
name = "{name}"
descriptor = "dog"
base = "toy"
base_fingerprint = "00"
images = 3
created_with = "e4t 0.1.0"

[tuning]
steps = 2
base_learning_rate = 1e-6
embedding_penalty = 0.1

[pretraining]
steps = 7

[encoder]
image_layers = 1
image_width = 1
unet_widths = [1]
hidden_width = 1
embedding_width = 1

[files]
"encoder.safetensors" = "00"
"offsets.safetensors" = "00"
"""


@pytest.fixture
def own(monkeypatch):
    def make(name):
        folder = user_domains_folder() / name
        folder.mkdir(parents=True)
        return folder

    return make


def write_manifest(folder: Path, monkeypatch):
    """A minimal manifest."""
    from e4t_cli.registry import discovery as finding
    from e4t_cli.registry import weights
    from e4t_cli.registry.config import PretrainingConfig, TuningConfig
    from e4t_cli.registry.domain import Domain

    (folder / "domain.toml").write_text(MANIFEST.format(name=folder.name))
    value = Domain(
        name=folder.name,
        descriptor="dog",
        tuning=TuningConfig(steps=2, base_learning_rate=1e-6, reg_weight=0.1),
        pretraining=PretrainingConfig(steps=7),
        weights={"toy": str(folder)},
    )
    for module in (finding, weights):
        monkeypatch.setattr(module, "user_domain", lambda path: value)


@pytest.mark.parametrize("package", ["e4t-dog", "zoo"])  # before and after "user"
def test_the_bare_name_stays_the_installed_domain(install, good, own, monkeypatch, package):
    install(package, dog=good)
    folder = own("dog")
    write_manifest(folder, monkeypatch)
    found = find_domain("dog")
    assert "toy" not in found.weights  # the package's value, as its author wrote it
    assert weights_folder(found, "toy") == folder
    assert "toy" in find_domain("user:dog").weights
    rows = {row.package: row for row in installed_domains() if row.name == "dog"}
    assert rows[package].reason is None
    assert rows["user"].reason == f"its weights serve the domain of {package}; ask for it as user:dog"


def test_two_packages_of_one_name_still_conflict(install, good, own, monkeypatch):
    install("e4t-dog", dog=good)
    install("zoo", dog=good)
    write_manifest(own("dog"), monkeypatch)
    with pytest.raises(UsageError, match="claimed by e4t-dog and zoo") as caught:
        find_domain("dog")
    assert "user" not in caught.value.message
    rows = {row.package: row for row in installed_domains() if row.name == "dog"}
    assert "also claimed by zoo" in rows["e4t-dog"].reason


def test_pretraining_an_installed_domain_takes_the_packages_value(install, good, own, monkeypatch, tmp_path):
    install("zoo", dog=good)
    plan = plan_domain("dog", "other", DomainTrainingOptions())
    assert (plan.domain.name, plan.names_itself) == ("dog", False)
    assert plan.folder == user_domains_folder() / "dog"
    write_manifest(own("dog"), monkeypatch)
    with pytest.raises(UsageError, match="has weights for toy already"):
        plan_domain("dog", "toy", DomainTrainingOptions())
    with pytest.raises(UsageError, match="there is a domain in") as caught:
        plan_domain("dog", "other", DomainTrainingOptions())
    assert "e4t domains rm dog" in caught.value.hint
    elsewhere = plan_domain("dog", "other", DomainTrainingOptions(), folder=tmp_path / "dog")
    assert elsewhere.domain.pretraining is None and elsewhere.config.steps == 60_000
