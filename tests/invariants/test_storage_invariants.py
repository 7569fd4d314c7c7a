"""Invariants of storage: domain weights and concepts load as they were saved, or not at all."""

import dataclasses
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from e4t_cli.errors import IntegrityError, UsageError, WeightsUnavailable
from e4t_cli.files import sha256_of
from e4t_cli.formats.concept import Concept
from e4t_cli.models.domain_folder import read_tensors
from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.prompts import parse_prompt
from e4t_cli.registry.manifest import toml_text
from e4t_cli.sampling import sample
from e4t_cli.schedulers import SamplingConfig
from e4t_cli.training.tuning import tune


@pytest.fixture
def concept(model, domain_weights, face):
    return Concept(
        domain="face",
        descriptor="face",
        base_name="tiny",
        base_fingerprint=model.fingerprint,
        weights_digest="",
        prepared=face,
        image_features=model.image_features(model.pixels([face.image]))[0],
        config=domain_weights.tuning,
        seed=5,
    )


def generate(model, tuned):
    prompts = [parse_prompt("S* on the beach")]
    return next(sample(model, tuned, prompts, [1], SamplingConfig(steps=2))).tobytes()


def resign(folder):
    """Make the manifest agree with the files again, as an attacker would."""
    manifest = (folder / "domain.toml").read_text().split("[files]")[0]
    hashes = {name: sha256_of(folder / name) for name in ("encoder.safetensors", "offsets.safetensors")}
    (folder / "domain.toml").write_text(manifest + toml_text({"files": hashes}))


# ── domain weights ──


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_domain_weights_load_as_they_were_saved(domain_weights, model, tmp_path, dtype):
    domain_weights.save(tmp_path, dtype=dtype)
    again = DomainWeights.load(tmp_path)
    again.check_base(model)
    for key, value in domain_weights.encoder.state_dict().items():
        assert torch.equal(again.encoder.state_dict()[key], value.to(dtype).float())
    assert again.offsets.keys() == domain_weights.offsets.keys()
    for path, factors in domain_weights.offsets.items():
        for one, other in zip(factors, again.offsets[path], strict=True):
            assert torch.equal(other, one.to(dtype).float())
    plain = {f.name for f in dataclasses.fields(domain_weights)} - {"encoder", "offsets", "digest"}
    for name in plain:
        assert getattr(again, name) == getattr(domain_weights, name)
    assert again.encoder.config == domain_weights.encoder.config
    # Saved and loaded once more: nothing drifts.
    again.save(tmp_path / "copy", dtype=dtype)
    for name in ("encoder.safetensors", "offsets.safetensors", "domain.toml"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_tuning_from_loaded_domain_weights_gives_the_same_model(domain_weights, model, face, tmp_path):
    domain_weights.save(tmp_path)
    one = tune(model, domain_weights, face)
    other = tune(model, DomainWeights.load(tmp_path), face)
    assert torch.equal(one.encoded_image, other.encoded_image)
    assert torch.equal(one.unet.conv_in.weight, other.unet.conv_in.weight)


def test_domain_weights_for_another_base_are_refused(domain_weights, model):
    with pytest.raises(IntegrityError, match="was made for the base"):
        dataclasses.replace(domain_weights, base_fingerprint="0" * 32).check_base(model)


def test_missing_and_incomplete_domain_weights_are_refused(domain_weights, tmp_path):
    with pytest.raises(WeightsUnavailable, match=r"domain\.toml"):
        DomainWeights.load(tmp_path)
    domain_weights.save(tmp_path)
    (tmp_path / "offsets.safetensors").unlink()
    with pytest.raises(WeightsUnavailable, match="lacks offsets"):
        DomainWeights.load(tmp_path)


def test_a_flipped_bit_is_found(domain_weights, tmp_path):
    domain_weights.save(tmp_path)
    path = tmp_path / "encoder.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="SHA-256"):
        DomainWeights.load(tmp_path)


def changed(folder, name, change):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    resign(folder)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("encoder.safetensors", lambda t: t.pop("final.bias"), "lacks tensor final.bias"),
        ("encoder.safetensors", lambda t: t.update(extra=torch.ones(1)), "unexpected tensor"),
        ("encoder.safetensors", lambda t: t.update({"final.bias": torch.ones(3)}), "has shape"),
        ("encoder.safetensors", lambda t: t["final.bias"].fill_(torch.nan), "not finite"),
        ("offsets.safetensors", lambda t: t.pop(min(t)), "pairs of factors"),
        ("offsets.safetensors", lambda t: t.update({min(t): torch.ones(3)}), "pairs of factors"),
        ("offsets.safetensors", lambda t: t[min(t)].fill_(torch.inf), "not finite"),
    ],
)
def test_wrong_tensors_are_refused_even_if_the_manifest_agrees(domain_weights, tmp_path, name, change, expected):
    domain_weights.save(tmp_path)
    changed(tmp_path, name, change)
    with pytest.raises(IntegrityError, match=expected):
        DomainWeights.load(tmp_path)


class Payload:
    def __reduce__(self):
        return (pytest.fail, ("the payload was run",))


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"weight": 1}),
        b"<html>please log in</html>",
        b"",
        (1 << 62).to_bytes(8, "little") + b"{}",
        save({"final.bias": torch.ones(3)})[:-4],
        save({"final.bias": torch.ones(3)}) + b"more",
    ],
    ids=["pickle", "html", "empty", "huge header", "truncated", "extra"],
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "encoder.safetensors"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="safetensors"):
        read_tensors(path)


def test_impossible_encoder_sizes_are_refused(domain_weights, tmp_path):
    domain_weights.save(tmp_path)
    manifest = (tmp_path / "domain.toml").read_text()
    (tmp_path / "domain.toml").write_text(manifest.replace("image_layers = 2", "image_layers = 10000000"))
    with pytest.raises(IntegrityError, match="sizes"):
        DomainWeights.load(tmp_path)


# ── concepts ──


def test_a_loaded_concept_is_tuned_to_the_same_bits(model, domain_weights, concept, tmp_path):
    concept.save(tmp_path / "me.e4t")
    again = Concept.load(tmp_path / "me.e4t")
    assert again.prepared.image.tobytes() == concept.prepared.image.tobytes()
    assert again.prepared.mask.tobytes() == concept.prepared.mask.tobytes()
    assert torch.equal(again.image_features, concept.image_features)
    for field in dataclasses.fields(concept):
        if field.name not in ("prepared", "image_features"):
            assert getattr(again, field.name) == getattr(concept, field.name)
    assert again.tuned(model, domain_weights) is None
    one, other = (
        tune(model, domain_weights, c.prepared, c.config, seed=c.seed, image_features=c.image_features)
        for c in (concept, again)
    )
    assert generate(model, one) == generate(model, other)
    assert (tmp_path / "me.e4t").stat().st_size < 20_000


def test_saved_weights_generate_the_same_images(model, domain_weights, concept, face, tmp_path):
    tuned = tune(model, domain_weights, face, concept.config, seed=concept.seed)
    saved = dataclasses.replace(concept, weights=Concept.weights_of(tuned))
    saved.save(tmp_path / "me.e4t")
    again = Concept.load(tmp_path / "me.e4t").tuned(model, domain_weights)
    assert generate(model, again) == generate(model, tuned)


def test_a_concept_without_a_mask(concept, tmp_path):
    from e4t_cli.registry.domain import PreparedImage

    plain = dataclasses.replace(concept, prepared=PreparedImage(image=concept.prepared.image))
    plain.save(tmp_path / "me.e4t")
    assert Concept.load(tmp_path / "me.e4t").prepared.mask is None
    with pytest.raises(FileExistsError):
        plain.save(tmp_path / "me.e4t", overwrite=False)


def test_another_base_or_other_domain_weights_are_refused(model, domain_weights, concept):
    concept.check(model, domain_weights)
    with pytest.raises(IntegrityError, match="lives on the base"):
        dataclasses.replace(concept, base_fingerprint="0" * 32).check(model, domain_weights)
    with pytest.raises(IntegrityError, match="another version of the face weights"):
        dataclasses.replace(concept, weights_digest="0" * 64).check(model, domain_weights)
    wrong = dataclasses.replace(concept, weights={"unet.conv_in.bias": torch.ones(1)})
    with pytest.raises(IntegrityError, match="do not fit"):
        wrong.tuned(model, domain_weights)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"domain": "../face"},
        {"seed": "5"},
        {"recipe": {"steps": -1}},
        {"extra": 1},
        {"placeholder": None},
    ],
)
def test_a_changed_manifest_is_refused(concept, tmp_path, change):
    path = tmp_path / "me.e4t"
    concept.save(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        manifest = json.loads(file.metadata()["e4t"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {"e4t": json.dumps({**manifest, **change})})
    with pytest.raises(IntegrityError, match="not a usable concept"):
        Concept.load(path)


def test_invalid_concept_files_are_refused(concept, tmp_path):
    with pytest.raises(UsageError, match="no concept"):
        Concept.load(tmp_path / "nobody.e4t")
    path = tmp_path / "me.e4t"
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(IntegrityError):
        Concept.load(path)
    for tensors in ({"image": torch.ones(3)}, {"image_features": torch.ones(2, 2)}):
        concept.save(path)
        save_file(tensors, path, {"e4t": "{}"})
        with pytest.raises(IntegrityError):
            Concept.load(path)
