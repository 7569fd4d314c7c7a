"""Invariants of domain weights' manifests: facts are checked, older manifests load, sizes are small."""

import dataclasses
import json
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel

from e4t_cli.cli import app
from e4t_cli.errors import IntegrityError
from e4t_cli.models.domain_weights import DomainWeights, facts_about, usual_limits
from e4t_cli.models.loading import config_hash
from e4t_cli.nn.weight_offsets import WeightOffsets
from e4t_cli.registry.discovery import find_domain, weights_folder
from e4t_cli.registry.domain import Domain
from e4t_cli.registry.manifest import read_manifest

NEW = ("base_revision", "base_config_hash", "image_tower", "limits")


def test_facts_about_a_base(model, domain_weights, tmp_path):
    stated = dataclasses.replace(domain_weights, limits="faces only", **facts_about(model))
    stated.save(tmp_path)
    manifest = read_manifest(tmp_path / "domain.toml")
    assert manifest.base_revision == "test"
    assert manifest.base_config_hash == config_hash(model.base.folder)
    assert manifest.image_tower == "CLIP ViT, 4 layers of 32, patches of 8, 32 px"
    assert manifest.limits == "faces only"
    assert manifest.sizes == {name: (tmp_path / name).stat().st_size for name in manifest.files}
    again = DomainWeights.load(tmp_path)
    again.check_base(model)
    for name in NEW:
        assert getattr(again, name) == getattr(stated, name)


def test_pretraining_states_them(model, tmp_path):
    import e4t_cli
    from e4t_cli.registry.config import PretrainingConfig, TuningConfig
    from tests.conftest import drawn_face

    domain = Domain(
        name="my_faces",
        descriptor="face",
        tuning=TuningConfig(steps=2, base_learning_rate=1e-6, reg_weight=0.1, batch_size=2),
        prompt_templates=("{}", "a photo of {}"),
    )
    folder = e4t_cli.pretrain(
        domain,
        [drawn_face(index, 64)[0] for index in range(3)],
        base=model,
        config=PretrainingConfig(steps=1, batch_size=2),
        folder=tmp_path / "my_faces",
    )
    manifest = read_manifest(folder / "domain.toml")
    assert all(getattr(manifest, name) for name in NEW)
    assert manifest.limits == usual_limits("face", "tiny", 3)
    assert "learned by heart" in manifest.limits
    assert "learned by heart" not in usual_limits("face", "tiny", 10_000)
    assert set(manifest.sizes) == set(manifest.files)


def test_another_training_of_the_same_model_is_refused(model, domain_weights):
    """Same shapes, other weights: refused, with the reason."""
    stated = dataclasses.replace(domain_weights, **facts_about(model))
    odd = dataclasses.replace(stated, base_fingerprint="0" * 32)
    with pytest.raises(IntegrityError, match="the same architecture with other weights"):
        odd.check_base(model)
    other = dataclasses.replace(odd, base_config_hash="0" * 64)
    with pytest.raises(IntegrityError) as caught:
        other.check_base(model)
    assert "same architecture" not in str(caught.value)


@pytest.mark.parametrize("name", ["face", "cat", "art"])
def test_domain_weights_of_older_versions_load(name):
    """The shipped domain weights state none of these facts."""
    folder = weights_folder(find_domain(name), "mini")
    text = (folder / "domain.toml").read_text()
    domain_weights = DomainWeights.load(folder)
    for field in NEW:
        if f"\n{field} = " not in text:
            assert getattr(domain_weights, field) == ""
    assert domain_weights.images > 0


def test_a_manifest_without_the_new_fields_loads(domain_weights, tmp_path):
    domain_weights.save(tmp_path)
    lines = (tmp_path / "domain.toml").read_text().split("\n[sizes]")[0].splitlines()
    old = [line for line in lines if not line.startswith(NEW)]
    assert len(old) == len(lines) - len(NEW)
    (tmp_path / "domain.toml").write_text("\n".join(old))
    manifest = read_manifest(tmp_path / "domain.toml")
    assert manifest.sizes == {} and manifest.limits == ""
    DomainWeights.load(tmp_path)


# ── Stable Diffusion 1.4 ──


@pytest.fixture(scope="module")
def offsets_of_sd14():
    """Factors of every offset of Stable Diffusion 1.4: its shapes, without its weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8, in_channels=4,
            out_channels=4, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
        )  # fmt: skip
        shapes = WeightOffsets.for_unet(unet).factors()
    source = torch.Generator().manual_seed(0)
    return {
        path: (
            torch.randn(left.shape, generator=source),
            torch.randn(right.shape, generator=source),
        )
        for path, (left, right) in shapes.items()
    }


def test_offsets_of_sd14_take_less_than_2_MB(domain_weights, offsets_of_sd14, tmp_path, capfd):
    """96 exact factors of rank 3; as full matrices they would be 143 times as many values."""
    big = dataclasses.replace(domain_weights, name="big", base_name="sd14", offsets=offsets_of_sd14, licence="MIT")
    folder = tmp_path / "big"
    big.save(folder, dtype=torch.float16)
    size = (folder / "offsets.safetensors").stat().st_size
    assert size < 2_000_000
    numbers = sum(left.numel() + right.numel() for left, right in offsets_of_sd14.values())
    assert 2 * numbers < size < 2 * numbers + 30_000  # the rest is the header
    again = DomainWeights.load(folder)
    for path, factors in offsets_of_sd14.items():
        for one, other in zip(factors, again.offsets[path], strict=True):
            assert torch.equal(one.half().float(), other)
    # The documentation has the size.
    assert app.run(["domains", "info", f"{folder}/"]) == 0
    output = capfd.readouterr().out
    line = next(line for line in output.splitlines() if line.startswith("sd14: offsets"))
    assert f"{size:,} bytes" in line
    assert app.run(["domains", "info", f"{folder}/", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)["weights"]["sd14"]
    assert found["files"]["offsets.safetensors"]["bytes"] == size
    shutil.rmtree(folder)
