"""`check_domain` passes domains that keep the contract and names the first problem of others."""

from pathlib import Path

import pytest
from PIL import Image

from e4t_cli.images.loading import center_square
from e4t_cli.registry.config import TuningConfig
from e4t_cli.registry.domain import Domain, PreparedImage
from e4t_cli.registry.testing import check_domain, examine_domain


def domain(**changes):
    config = TuningConfig(steps=1, base_learning_rate=1e-6, reg_weight=0)
    return Domain(name="dog", descriptor="dog", tuning=config, **changes)


def masked(image, target):
    square = center_square(image, target.size)
    return PreparedImage(image=square, mask=Image.new("L", square.size, 200))


def test_good_domains():
    check_domain(domain())
    check_domain(domain(prepare=masked, prompt_templates=("a dog, {}",)))


def test_weights_on_the_hub_are_left_there():
    far = domain(weights={"toy": "hub:me/dogs@" + "0" * 40})
    remarks = {found.subject: found.remark for found in examine_domain(far)}
    assert remarks["weights for toy"] == "they are on the hub, and not on this machine"
    assert "states none" in remarks["licence"]


def test_a_report_goes_on_after_a_problem():
    wrong = domain(prepare=lambda image, target: image, prompt_templates=("S* and {}",))
    found = {one.subject: one.problem for one in examine_domain(wrong)}
    assert "more than once" in found["prompt templates"]
    assert "must return a PreparedImage" in found["preparation for some-other-base"]
    assert found["domain"] == found["licence"] == ""


def test_weights_in_a_folder(domain_weights, tmp_path):
    """All of it is read; a base that is not installed is reported."""
    domain_weights.save(tmp_path / "face")
    check_domain(tmp_path / "face")
    found = {one.subject: one for one in examine_domain(tmp_path / "face")}
    assert "the base tiny does not come with e4t" in found["weights for tiny"].remark
    path = tmp_path / "face" / "offsets.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(AssertionError, match="SHA-256"):
        check_domain(tmp_path / "face")


def test_weights_that_do_not_fit_their_base(domain_weights, tmp_path):
    """Weights for `tiny` that claim to be for mini: another base, or no fingerprint but shapes."""
    import dataclasses

    for fingerprint, expected in (
        ("a" * 32, "another base than this mini"),
        ("", "does not fit|no offset"),
    ):
        liar = dataclasses.replace(domain_weights, base_name="mini", base_fingerprint=fingerprint)
        liar.save(tmp_path / "liar")
        with pytest.raises(AssertionError, match=expected):
            check_domain(tmp_path / "liar")


calls = []


def nondeterministic(image, target):
    calls.append(image)
    colour = (len(calls) % 256, 0, 0)
    return PreparedImage(image=Image.new("RGB", (target.size, target.size), colour))


def modifies_its_input(image, target):
    image.paste("red", (0, 0, 4, 4))
    return PreparedImage(image=center_square(image, target.size))


def crops_mask_differently(image, target):
    square = center_square(image, target.size)
    return PreparedImage(image=square if target.mask else square.rotate(90))


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (7, "of type int, not Domain"),
        ("fase", "no domain 'fase' is installed"),
        (Path("nowhere"), "has no domain.toml"),
        (domain(weights={"toy": "/no/where"}), "not in this installation"),
        (domain(prepare=lambda image, target: image), "must return a PreparedImage"),
        (domain(prepare=lambda image, target: 1 / 0), "ZeroDivisionError"),
        (domain(prepare=nondeterministic), "two results"),
        (domain(prepare=modifies_its_input), "changed the image"),
        (domain(prepare=crops_mask_differently), "crops differently"),
        (domain(prompt_templates=("S* and {}",)), "more than once"),
    ],
)
def test_bad_domains(wrong, expected):
    with pytest.raises(AssertionError, match=expected):
        check_domain(wrong)
