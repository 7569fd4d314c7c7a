"""The paper's hyperparameters, each written once in a domain and compared here with the text.

Columns: descriptor; pre-training steps, λ_r, base rate; tuning steps, λ_r, base rate; mask; s.
"""

import math

import pytest

from e4t_cli.registry.discovery import find_domain, installed_domains
from e4t_cli.registry.testing import check_domain

PAPER = {
    #        e_domain  pre-training          tuning             mask   s
    "face": ("face", 30_000, 0.01, 1e-6, 15, 0.1, 1e-6, True, 0.1),
    "cat": ("cat", 60_000, 0.01, 1e-6, 5, 1e-4, 3e-6, False, 0.1),
    "art": ("art", 100_000, 0.01, 1e-6, 5, 1e-4, 3e-6, False, 0.1),
}


@pytest.mark.parametrize("name", PAPER)
def test_numbers(name):
    domain = find_domain(name)
    before, tuning = domain.pretraining, domain.tuning
    assert PAPER[name] == (
        domain.descriptor,
        before.steps,
        before.reg_weight,
        before.base_learning_rate,
        tuning.steps,
        tuning.reg_weight,
        tuning.base_learning_rate,
        tuning.mask,
        before.embedding_scale,
    )


@pytest.mark.parametrize("name", PAPER)
def test_what_all_share(name):
    domain = find_domain(name)
    before, tuning = domain.pretraining, domain.tuning
    assert before.batch_size == tuning.batch_size == 16
    assert not before.mask  # section 3.4: "at this stage", which is tuning
    assert math.isclose(before.learning_rate, 1.6e-5)
    assert math.isclose(tuning.learning_rate, 1.6e-5 if name == "face" else 4.8e-5)
    for config in (before, tuning):
        assert config.encoder_rate == config.offsets_rate == 1
    assert tuning.unet_rate == 1
    assert domain.weights["mini"] == f"package:e4t_domains/packs/{name}/mini"
    assert domain.licence
    assert domain.summary


def test_these_three_come_with_the_package():
    assert {row.name for row in installed_domains() if row.package == "e4t"} == set(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_contract(name):
    check_domain(find_domain(name))
