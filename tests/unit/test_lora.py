"""A LoRA of the change by tuning: as close as its rank allows, and read by diffusers."""

import copy
import json
import struct

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import lora_conversion_utils as theirs
from safetensors.torch import load_file
from torch import nn

from e4t_cli.errors import UsageError
from e4t_cli.formats import lora
from e4t_cli.formats.lora import lora_of, write_lora
from e4t_cli.formats.stable_diffusion import write_folder
from e4t_cli.formats.textual_inversion import embedding_path, mean_concept_embedding
from e4t_cli.models.denoiser import TunedModel
from e4t_cli.prompts import parse_prompt
from e4t_cli.sampling import SamplingConfig, generate_latents
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


def test_at_full_rank_it_is_the_tuned_unet(model, tuned):
    found = lora_of(model.unet, tuned.unet, FULL_RANK)
    assert found.rank < FULL_RANK  # no layer has so many: nothing is padded
    assert found.retained_energy == pytest.approx(1, abs=1e-6)
    unet = added(model.unet, found.weights)
    for path, weight in matrices(tuned.unet).items():
        torch.testing.assert_close(unet.get_submodule(path).weight, weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 4])
def test_at_low_rank_it_is_the_best_approximation(model, tuned, rank):
    """The theorem of Eckart and Young: the loss is the other singular values."""
    found = lora_of(model.unet, tuned.unet, rank)
    whole = missing = 0.0
    for path, weight in matrices(tuned.unet).items():
        change = (weight - model.unet.get_submodule(path).weight).flatten(1)
        sizes = torch.linalg.svdvals(change).square()
        whole, missing = whole + sizes.sum().item(), missing + sizes[rank:].sum().item()
    assert 0.1 < found.retained_energy < 0.99
    assert found.retained_energy == pytest.approx(1 - missing / whole, abs=2e-3)
    assert lora_of(model.unet, tuned.unet, rank).retained_energy == found.retained_energy  # the same each time


def test_every_layer_has_the_same_rank(model, tuned):
    """Of files with several, diffusers scales attention layers wrongly."""
    weights = lora_of(model.unet, tuned.unet, 20).weights  # the first convolution has 4 × 9
    assert {value.item() for name, value in weights.items() if name.endswith("alpha")} == {20}
    assert {value.shape[1] for name, value in weights.items() if "lora_up" in name} == {20}
    assert {len(value) for name, value in weights.items() if "lora_down" in name} == {20}


def test_it_does_not_use_the_global_generator(model, tuned):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    lora_of(model.unet, tuned.unet, 1)
    assert torch.equal(torch.rand(3), expected)


def test_what_did_not_change_is_not_in_it(model):
    layer = copy.deepcopy(model.unet)
    path = next(iter(matrices(layer)))
    with torch.no_grad():
        layer.get_submodule(path).weight += 1
    names = {name.partition(".")[0] for name in lora_of(model.unet, layer, 4).weights}
    assert names == {"lora_unet_" + path.replace(".", "_")}
    assert lora_of(model.unet, model.unet, 4).weights == {}


def test_diffusers_knows_every_layer_of_stable_diffusion_by_its_name():
    with torch.device("meta"):
        unet = UNet2DConditionModel(block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768)
    layers, written = matrices(unet), {}
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
    assert retained_energy == pytest.approx(1, abs=1e-6)
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
        "S* on the beach", latents=noise, num_inference_steps=4, guidance_scale=3.0,
        output_type="latent",
    ).images  # fmt: skip
    prompt, few = [parse_prompt("S* on the beach")], SamplingConfig(steps=4, guidance=3.0)
    biases = copy.deepcopy(tuned.unet)  # which no LoRA holds
    biases.load_state_dict(
        {
            name: value if value.dim() > 1 else model.unet.state_dict()[name]
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
    assert metadata["ss_network_dim"] == "2" and metadata["ss_v2"] == "False"
    assert metadata["ss_network_module"] == "networks.lora"
    assert load_file(embedding_path(path))["emb_params"].shape == (1, len(tuned.e_domain))


@pytest.mark.parametrize("rank", [0, -1, lora.MAX_RANK + 1])
def test_invalid_ranks(model, tuned, tmp_path, rank):
    with pytest.raises(UsageError, match="rank"):
        write_lora(model, tuned, tuned.e_domain, tmp_path / "me.safetensors", rank=rank)
    assert list(tmp_path.iterdir()) == []
