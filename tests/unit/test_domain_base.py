"""Domain weights of one base used with another of the same shapes, and that files say so."""

from dataclasses import replace

import pytest
import torch

from e4t_cli.api.options import GenerateOptions
from e4t_cli.api.resolve import resolve_domain_base
from e4t_cli.api.session import Session
from e4t_cli.errors import IntegrityError, WeightsUnavailable
from e4t_cli.formats.concept import Concept
from e4t_cli.images.png_metadata import GenerationRecord
from e4t_cli.registry.config import TuningConfig
from e4t_cli.registry.discovery import weights_folder
from e4t_cli.registry.domain import Domain

FACES = Domain(
    name="look", descriptor="face", tuning=TuningConfig(steps=1, base_learning_rate=1e-5, reg_weight=0.1),
    weights={"mini": "package:e4t_domains/none", "sd14": "e4t-diffusion:owner/faces"},
)  # fmt: skip


@pytest.fixture
def trained(domain_weights, tmp_path):
    """Return a function that saves the weights as if they were trained for another base."""

    def trained(**changes):
        folder = tmp_path / "look"
        replace(domain_weights, **{"base_name": "other", "base_fingerprint": "0" * 32, **changes}).save(folder)
        return folder

    return trained


def test_without_it_weights_of_another_base_are_refused(model, trained):
    session = Session(GenerateOptions())
    with pytest.raises(IntegrityError, match="was made for the base other") as caught:
        session.load(model, trained())
    assert "e4t pretrain --domain face" in caught.value.hint and "--domain-base other" in caught.value.hint


def test_with_it_they_are_used_and_a_note_says_so(model, trained):
    session = Session(GenerateOptions())
    session.load(model, trained(), domain_base="other")
    assert session.notes == [
        "the weights of face for other are used on tiny: their shapes fit; nobody has measured the quality"
    ]


def test_the_base_s_own_weights_need_no_note(model, domain_weights, tmp_path):
    domain_weights.save(tmp_path / "own")
    session = Session(GenerateOptions())
    session.load(model, tmp_path / "own", domain_base="tiny")
    assert not session.notes


def test_weights_that_do_not_fit_are_refused_and_no_hint_offers_them(model, domain_weights, trained):
    offsets = {path: (left[:-1], right) for path, (left, right) in domain_weights.offsets.items()}
    folder = trained(offsets=offsets)
    session = Session(GenerateOptions())
    with pytest.raises(IntegrityError, match="of other sizes than tiny"):
        session.load(model, folder, domain_base="other")
    with pytest.raises(IntegrityError) as caught:
        session.load(model, folder)
    assert "--domain-base" not in caught.value.hint


@pytest.mark.parametrize(
    ("base", "offered"),
    [("sd15", True), ("dreamshaper", True), ("sd21", False), ("sd21-base", False), ("mini", False)],
)
def test_the_hint_beside_pretraining(base, offered):
    with pytest.raises(WeightsUnavailable) as caught:
        weights_folder(FACES, base)
    assert "e4t pretrain --domain look" in caught.value.hint
    assert ("--domain-base sd14" in caught.value.hint) == offered


def test_a_domain_without_such_weights_is_not_offered_any():
    with pytest.raises(WeightsUnavailable) as caught:
        weights_folder(replace(FACES, weights={}), "sd15")
    assert "--domain-base" not in caught.value.hint


def test_names_and_repositories_mean_the_same():
    assert [resolve_domain_base(one) for one in (None, "sd14", "CompVis/stable-diffusion-v1-4", "mine")] == [
        "", "sd14", "sd14", "mine"
    ]  # fmt: skip


def test_the_concept_and_the_record_keep_it(face, tmp_path):
    concept = Concept(
        domain="look", descriptor="face", base_name="mine", base_fingerprint="", weights_digest="", prepared=face,
        image_features=torch.zeros(2, 3), config=FACES.tuning, seed=0,
    )  # fmt: skip
    for expected in ("", "sd14"):
        replace(concept, domain_base=expected).save(tmp_path / "me.e4t")
        assert Concept.load(tmp_path / "me.e4t").domain_base == expected
        assert (b"domain_base" in (tmp_path / "me.e4t").read_bytes()) == bool(expected)
    record = GenerationRecord(prompt="S*", seed=1, steps=2, guidance=7.5, scheduler="dpm++", width=8, height=8)
    assert "domain_base" not in record.as_dict()  # as in every record before
    other = replace(record, domain_base="sd14")
    assert GenerationRecord.from_dict(other.as_dict()) == other
    assert GenerationRecord.from_dict(record.as_dict()) == record
