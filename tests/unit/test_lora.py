"""A LoRA of the change by tuning: as close as its rank allows, and read by diffusers."""

import copy
import json
import struct
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import lora_conversion_utils as theirs
from safetensors.torch import load_file
from torch import nn

from e4t_cli.errors import UsageError
from e4t_cli.formats import lora
from e4t_cli.formats.export_files import embedding_path
from e4t_cli.formats.lora import lora_of, write_lora
from e4t_cli.formats.stable_diffusion import write_folder
from e4t_cli.formats.textual_inversion import mean_concept_embedding
from e4t_cli.models.denoiser import TunedModel
from e4t_cli.prompts import parse_prompt
from e4t_cli.sampling import generate_latents
from e4t_cli.schedulers import SamplingConfig
from e4t_cli.training.tuning import TuningOptions, tune

FULL_RANK = 1024
"""A rank above that of any layer of the tiny base."""


@pytest.fixture
def tuned(model, domain_weights, face):
    config = domain_weights.tuning.replace(steps=2, base_learning_rate=1e-3)
    return tune(model, domain_weights, face, config, options=TuningOptions(autocast=False))


def added(base, weights):
    """Return the base with the change of a file added."""
    unet = copy.deepcopy(base)
    for path, layer in unet.named_modules():
        name = "lora_unet_" + path.replace(".", "_")
        if f"{name}.alpha" in weights:
            up, down = (weights[f"{name}.lora_{way}.weight"] for way in ("up", "down"))
            scale = weights[f"{name}.alpha"].item() / len(down)
            with torch.no_grad():
                layer.weight += scale * (up.flatten(1) @ down.flatten(1)).view_as(layer.weight)
    return unet


def matrices(unet):
    return {path: layer.weight for path, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}


def squared(change):
    return change.square().sum().item()


OUTSIDE = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
"""The matrices that some programs leave out of a LoRA."""


def test_at_full_rank_it_is_the_tuned_unet(model, tuned):
    found = lora_of(model.unet, tuned.unet, FULL_RANK)
    assert found.rank < FULL_RANK  # no layer has so many: nothing is padded
    unet, whole, outside = added(model.unet, found.weights), 0.0, 0.0
    for path, weight in matrices(tuned.unet).items():
        before = model.unet.get_submodule(path).weight
        if path in OUTSIDE:
            assert torch.equal(unet.get_submodule(path).weight, before)
            outside += squared(weight - before)
        else:
            torch.testing.assert_close(unet.get_submodule(path).weight, weight, rtol=1e-4, atol=1e-5)
        whole += squared(weight - before)
    assert 0 < outside < 0.1 * whole
    assert found.retained_energy == pytest.approx(1 - outside / whole, abs=1e-6)


@pytest.mark.parametrize("rank", [1, 4])
def test_at_low_rank_it_is_the_best_approximation(model, tuned, rank):
    """The theorem of Eckart and Young: the loss is the other singular values."""
    found = lora_of(model.unet, tuned.unet, rank)
    whole = missing = 0.0
    for path, weight in matrices(tuned.unet).items():
        change = (weight - model.unet.get_submodule(path).weight).flatten(1)
        sizes = torch.linalg.svdvals(change).square()
        whole = whole + sizes.sum().item()
        missing += sizes[0 if path in OUTSIDE else rank :].sum().item()
    assert 0.1 < found.retained_energy < 0.99
    assert found.retained_energy == pytest.approx(1 - missing / whole, abs=2e-3)
    assert lora_of(model.unet, tuned.unet, rank).retained_energy == found.retained_energy  # the same each time


def test_every_layer_has_the_same_alpha_and_rank(model, tuned):
    """Of files with several alphas, diffusers scales attention layers wrongly."""
    smallest = min(min(weight.flatten(1).shape) for weight in matrices(model.unet).values())
    assert smallest < 40  # is padded
    weights = lora_of(model.unet, tuned.unet, 40).weights
    assert {value.item() for name, value in weights.items() if name.endswith("alpha")} == {40}
    assert {value.shape[1] for name, value in weights.items() if "lora_up" in name} == {40}
    assert {len(value) for name, value in weights.items() if "lora_down" in name} == {40}


def test_it_does_not_use_the_global_generator(model, tuned):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    lora_of(model.unet, tuned.unet, 1)
    assert torch.equal(torch.rand(3), expected)


def test_what_did_not_change_is_not_in_it(model):
    layer = copy.deepcopy(model.unet)
    path = next(path for path in matrices(layer) if path not in OUTSIDE)
    with torch.no_grad():
        layer.get_submodule(path).weight += 1
    names = {name.partition(".")[0] for name in lora_of(model.unet, layer, 4).weights}
    assert names == {"lora_unet_" + path.replace(".", "_")}
    assert lora_of(model.unet, model.unet, 4).weights == {}
    with torch.no_grad():
        layer.load_state_dict(model.unet.state_dict())
        layer.conv_in.weight += 1
    nothing = lora_of(model.unet, layer, 4)
    assert nothing.weights == {} and nothing.retained_energy == 0


def test_diffusers_knows_every_layer_of_stable_diffusion_by_its_name():
    with torch.device("meta"):
        unet = UNet2DConditionModel(block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768)
    layers, written = {path: weight for path, weight in matrices(unet).items() if path not in OUTSIDE}, {}
    assert len(layers) == 278 and all(path.startswith(lora.BLOCKS) for path in layers)
    for path, weight in layers.items():
        name = "lora_unet_" + path.replace(".", "_")
        written[f"{name}.lora_up.weight"] = torch.zeros(weight.shape[0], 1)
        written[f"{name}.lora_down.weight"] = torch.zeros(1, *weight.shape[1:])
        written[f"{name}.alpha"] = torch.tensor(1.0)
    # docs/commands.md: 135 MB at rank 64, in float16
    numbers = sum(sum(weight.flatten(1).shape) for weight in layers.values())
    assert round(2 * 64 * numbers / 1e6) == 135
    converted, alphas = theirs._convert_non_diffusers_lora_to_diffusers(written)
    tidy = {
        name.removeprefix("unet.").replace(".processor.", ".").replace("_lora.", ".lora.")
        .partition(".lora.")[0].replace("to_out", "to_out.0").replace("to_out.0.0", "to_out.0")
        for name in converted
    }  # fmt: skip
    assert tidy == set(layers) and len(alphas) == len(layers)


def test_diffusers_generates_the_same_from_it(model, tuned, face, tmp_path):
    """Base, LoRA and embedding, each from its file, against the tuned model."""
    # Not installed for tests: diffusers imports it wherever it is, for 0.7 s of every command.
    pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline

    embedding = mean_concept_embedding(model, tuned, face).embedding
    path = tmp_path / "me.safetensors"
    retained_energy = write_lora(model, tuned, embedding, path, rank=FULL_RANK, dtype=torch.float32)
    assert retained_energy > 0.9
    plain = TunedModel.plain(model, "face")
    write_folder(
        model, plain, plain.e_domain, tmp_path / "base", token="<other>", readme="",
        dtype=torch.float32,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "base", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(path)
    pipeline.load_textual_inversion(embedding_path(path), token="S*")
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    theirs_generated = pipeline(
        "S* on the beach", latents=noise, num_inference_steps=20, guidance_scale=3.0,
        output_type="latent",
    ).images  # fmt: skip
    prompt, few = [parse_prompt("S* on the beach")], SamplingConfig(steps=20, guidance=3.0)
    biases = copy.deepcopy(tuned.unet)  # which no LoRA holds, nor the matrices outside of the blocks
    biases.load_state_dict(
        {
            name: value if value.dim() > 1 and name.startswith(lora.BLOCKS) else model.unet.state_dict()[name]
            for name, value in tuned.unet.state_dict().items()
        }
    )
    without = TunedModel(**{**vars(tuned.with_fixed_embedding(embedding)), "unet": biases})
    own = generate_latents(model, without, prompt, [1], few)
    torch.testing.assert_close(theirs_generated, own, rtol=1e-3, atol=1e-3)
    base = generate_latents(model, plain, prompt, [1], few)
    assert (own - base).abs().max() > 1e-2


def test_metadata_of_the_file(model, tuned, tmp_path):
    path = tmp_path / "me.safetensors"
    write_lora(model, tuned, tuned.e_domain, path, rank=2)
    assert {value.dtype for value in load_file(path).values()} == {torch.float16}
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        metadata = json.loads(file.read(length))["__metadata__"]
    assert metadata == {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "2.0",
        "ss_output_name": "me",
        "ss_sd_model_name": "tiny",
        "ss_v2": "False",
        "ss_tag_frequency": '{"1_me": {"me-word": 1}}',
        "modelspec.title": "me",
        "written_by": "e4t",
    }  # and no architecture: the tiny base has none of Stable Diffusion's
    assert load_file(embedding_path(path))["emb_params"].shape == (1, len(tuned.e_domain))


@pytest.mark.parametrize(
    ("second", "v_prediction", "architecture", "version"),
    [
        (False, False, "stable-diffusion-v1/lora", "sd_v1"),
        (True, False, "stable-diffusion-v2-512/lora", "sd_v2"),
        (True, True, "stable-diffusion-v2-768-v/lora", "sd_v2_v"),
    ],
)
def test_metadata_tells_the_base(second, v_prediction, architecture, version):
    config = {"use_linear_projection": second, "block_out_channels": [320, 640, 1280, 1280]}
    found = lora.lora_metadata(config, Path("a b.safetensors"), rank=4, base_name="x", v_prediction=v_prediction)
    assert found["modelspec.architecture"] == architecture and found["ss_base_model_version"] == version
    assert found["ss_v2"] == str(second)
    assert json.loads(found["ss_tag_frequency"]) == {"1_a b": {"a-b-word": 1}}
    assert all(isinstance(value, str) for value in found.values())


@pytest.mark.parametrize("rank", [0, -1, lora.MAX_RANK + 1])
def test_invalid_ranks(model, tuned, tmp_path, rank):
    with pytest.raises(UsageError, match="rank"):
        write_lora(model, tuned, tuned.e_domain, tmp_path / "me.safetensors", rank=rank)
    assert list(tmp_path.iterdir()) == []
