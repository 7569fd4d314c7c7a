"""The full-size rehearsal's files have the layout of a Stable Diffusion repository (small ones here)."""

import pytest
import torch
from safetensors import safe_open

from e4t_cli.cli import app
from e4t_cli.hub import image_tower as towers
from e4t_cli.hub.paths import HubAccess
from e4t_cli.hub.resolve import fetch_base
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.registry.config import TuningConfig
from e4t_cli.registry.domain import Domain
from tests.hub import full_size
from tests.hub.full_size import PARSER, publish
from tests.store.conftest import write_domain_folder


@pytest.fixture
def pins():
    """The checksum of the tower is another one in these tests, and as before after them."""
    functions = (
        towers.fetch_image_tower, towers.has_tower, towers.tower_folder, towers.missing_bytes
    )  # fmt: skip
    before = [function.__defaults__ for function in functions]
    yield
    for function, defaults in zip(functions, before, strict=True):
        function.__defaults__ = defaults


@pytest.fixture
def published(hub, pins, tmp_path):
    publish(hub, tmp_path / "published", small=True)
    return hub


def test_sd14_by_name(published):
    base = fetch_base("sd14", HubAccess(accept_license=True), half=True)
    assert (base.name, base.resolution) == ("sd14", 512)
    assert (base.folder / "safety_checker" / "model.fp16.safetensors").is_file()
    model = TextToImageModel.load(base)
    assert model.latent_shape == (4, 64, 64)
    assert model.noise_schedule.config.beta_schedule == "scaled_linear"
    pixels = torch.zeros(1, 3, 64, 64)
    assert model.image_features(pixels).isfinite().all()
    assert model.embed_prompts(model.tokenize(["a photo"], 3)).isfinite().all()
    assert model.posterior(pixels).mean.isfinite().all()
    assert published.count("GET", "*/resolve/*model.fp16.safetensors") == 4


def test_weights_have_the_names_of_the_public_files(published, tmp_path):
    """Written down from the public repositories, whose files are older than version 5 of transformers."""
    for file, name in (
        ("sd14/text_encoder/model.fp16", "text_model.encoder.layers.0.mlp.fc1.weight"),
        ("sd14/text_encoder/model.fp16", "text_model.embeddings.token_embedding.weight"),
        ("sd14/safety_checker/model.fp16", "vision_model.vision_model.encoder.layers.0.mlp.fc1.weight"),
        ("sd14/safety_checker/model.fp16", "visual_projection.weight"),
        (
            "sd14/unet/diffusion_pytorch_model.fp16",
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        ),
        ("tower/open_clip_model", "visual.transformer.resblocks.0.mlp.c_fc.weight"),
        ("parser/model", "segformer.encoder.block.0.0.attention.self.query.weight"),
    ):
        with safe_open(tmp_path / "published" / f"{file}.safetensors", "pt") as stored:
            assert name in stored.keys()  # noqa: SIM118


def test_a_command_is_rehearsed(hub, pins, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(full_size, "publish", lambda one, folder: publish(one, folder, small=True))
    code = full_size.main([str(tmp_path), "--", "fetch", "sd14", "--accept-license", "--dtype", "fp16"])
    out, err = capfd.readouterr()
    assert code == 0, err
    assert out.strip().startswith(str(tmp_path / "caches")) and "slim copy" in err
    assert "creativeml-openrail-m" in err
    assert len(list((tmp_path / "caches" / "own" / "towers").glob("*/model.safetensors"))) == 1


def test_a_domain_comes_with_its_networks(published, tmp_path, monkeypatch, capfd):
    from e4t_cli.registry import discovery

    commit = published.add("me/pack", write_domain_folder(tmp_path / "pack"))
    domain = Domain(
        name="look",
        descriptor="face",
        tuning=TuningConfig(steps=1, base_learning_rate=1e-5, reg_weight=0.1),
        weights={"sd14": f"hub:me/pack@{commit}"},
        networks=(PARSER,),
    )
    monkeypatch.setattr(discovery, "find_domain", lambda name: domain)
    wanted = ("fetch", "look", "--base", "sd14")
    assert app.run([*wanted, "--accept-license"]) == 0
    out, err = capfd.readouterr()
    base, domain_folder, network = out.splitlines()
    assert "face-parsing" in network and "for research" in err
    published.requests.clear()
    assert app.run([*wanted, "--offline"]) == 0
    assert capfd.readouterr().out.splitlines() == [base, domain_folder, network]
    assert not published.requests
