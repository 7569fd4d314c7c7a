"""Invariants of the public encoder and offsets: they compute what dense formulas do."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import e4t_cli
from e4t_cli.errors import IntegrityError, WeightsUnavailable
from e4t_cli.formats.concept import Concept
from e4t_cli.formats.e4t_diffusion.checkpoint import tower_sizes
from e4t_cli.formats.e4t_diffusion.conversion import (
    evaluate,
    expected_shapes,
    factor,
    split_networks,
)
from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.nn.patch_encoder import PatchEncoderConfig
from e4t_cli.nn.weight_offsets import WeightOffsets, projection_shapes
from e4t_cli.prompts import parse_prompt
from e4t_cli.sampling import sample
from e4t_cli.schedulers import SamplingConfig
from e4t_cli.training.tuning import tune
from tests.e4t_diffusion import checkpoints


def generate(model, tuned):
    prompts = [parse_prompt("S* on the beach")]
    return next(sample(model, tuned, prompts, [1], SamplingConfig(steps=2))).tobytes()


def pixels(batch=2, side=40):
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_the_encoder_is_the_one_described(converted, encoder, model, sizes):
    """Tower, pre-processing, hierarchy and every layer, against plain torch, vector by vector."""
    domain_weights, _, _ = converted
    means = torch.randn(2, sizes["unet"], generator=torch.Generator().manual_seed(4))
    expected = checkpoints.dense_encoder(encoder, pixels().double(), means.double())
    features = domain_weights.tower.encode(pixels(), torch.float32)
    assert features.shape == (2, checkpoints.VECTORS, checkpoints.TOWER["width"])
    found = domain_weights.encoder(features, means)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    # Rounded to half precision, in which a concept keeps them.
    rounded = domain_weights.image_features(model, pixels())
    torch.testing.assert_close(rounded, features, rtol=1e-3, atol=1e-3)
    assert torch.equal(rounded, rounded.half().float())


def test_folded_layers_are_exact(converted, sizes):
    """One vector and one matrix stand for the linear layers of every patch (float64)."""
    encoder = converted[0].encoder.double()
    features = torch.randn(3, checkpoints.VECTORS, 32, dtype=torch.float64)
    means = torch.randn(3, sizes["unet"], dtype=torch.float64)
    encoded_image = encoder.encode_image(features)
    whole = encoder(features, means)
    small = encoder.for_inference()
    assert sum(w.numel() for w in small.parameters()) < sum(w.numel() for w in encoder.parameters())
    small = small.double()
    torch.testing.assert_close(small.predict_offset(encoded_image, means), whole, rtol=1e-6, atol=1e-6)
    # Only the vector depends on the image: the same matrix serves other images.
    dense = []
    for index in range(3):
        u = encoder.embed_unet(means[index])
        joined = [encoder.join_picture(x) + encoder.join_unet(u) for x in features[index]]
        terms = [
            weight @ one + bias
            for weight, bias, one in zip(encoder.first_weights, encoder.first_biases, joined, strict=True)
        ]
        average = torch.stack(terms).mean(dim=0)
        dense.append(encoder.final(torch.nn.functional.leaky_relu(average)))
    torch.testing.assert_close(whole, torch.stack(dense), rtol=1e-12, atol=1e-12)


def test_factored_offsets_are_the_dense_ones(offsets, sizes):
    """ΔW = left (M × 3) · right (3 × N), to the last bits of float64."""
    networks = split_networks(offsets, "weight_offsets.pt")
    assert networks.keys() == sizes["projections"].keys()
    for path, network in networks.items():
        dense = checkpoints.dense_offset(offsets, path.replace(".to_", ".wo_"))
        left, right = factor(network)
        assert tuple(dense.shape) == sizes["projections"][path]
        assert left.shape == (dense.shape[0], 3)
        torch.testing.assert_close(left @ right, dense, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(evaluate(network), dense, rtol=1e-12, atol=1e-12)
        assert torch.linalg.matrix_rank(dense) == 3


def test_the_modulated_unet_is_the_one_described(converted, offsets, model):
    """W = W₀ · (1 + ΔW) on every projection, from the files of the domain weights."""
    domain_weights, result, _ = converted
    unet_offsets = WeightOffsets.from_factors(domain_weights.offsets)
    with unet_offsets.attached_to(model.unet):
        for path in unet_offsets.paths:
            layer = model.unet.get_submodule(path)
            dense = checkpoints.dense_offset(offsets, path.replace(".to_", ".wo_"))
            original = layer.parametrizations.weight.original.double()
            torch.testing.assert_close(layer.weight.double(), original * (1 + dense), rtol=1e-5, atol=1e-6)
    assert 0 < result.offset_error < 1e-6 < result.offset_size
    assert result.offset_parameters == sum(value.numel() for value in offsets.values())


def test_imported_domain_weights_are_tuned_and_sampled(converted, model, face):
    domain_weights, _, _ = converted
    domain_weights.check_base(model)
    plain = tune(model, domain_weights, face, domain_weights.tuning.replace(steps=0))
    tuned = tune(model, domain_weights, face)
    assert generate(model, plain) != generate(model, tuned)
    # The part of the encoder that sampling needs is small, and agrees with the whole.
    means = torch.randn(1, domain_weights.encoder.config.unet_width)
    whole = domain_weights.encoder(domain_weights.image_features(model, model.pixels([face.image])), means)
    e_c = plain.embedding(means)
    expected = plain.e_domain + domain_weights.embedding_scale * whole
    torch.testing.assert_close(e_c, expected, rtol=1e-4, atol=1e-5)


def test_a_tower_is_checked_at_its_first_use(converted, model):
    domain_weights, _, folder = converted
    path = folder / "tower.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    again = DomainWeights.load(folder)  # sampling needs no tower
    with pytest.raises(IntegrityError, match=r"tower\.safetensors .* is damaged"):
        again.image_features(model, pixels())
    path.unlink()
    with pytest.raises(WeightsUnavailable, match="lacks tower"):
        DomainWeights.load(folder)


def test_adapters_change_their_encoder_as_merged_ones_do(converted, model, face):
    """Hooks while tuning, merged weights while sampling: the same concept, saved or tuned again."""
    domain_weights, _, _ = converted
    config = domain_weights.tuning.replace(method="lora", steps=3, base_learning_rate=1e-4)
    tuned = tune(model, domain_weights, face, config, seed=5)
    plain = tune(model, domain_weights, face, config.replace(steps=0), seed=5)
    assert not torch.equal(tuned.encoded_image, plain.encoded_image)  # the layers of the image features learned, too
    concept = Concept(
        domain="face", descriptor="face", base_name="tiny", base_fingerprint=model.fingerprint,
        weights_digest=domain_weights.digest, prepared=face, config=config, seed=5,
        image_features=domain_weights.image_features(model, model.pixels([face.image]))[0],
        weights=Concept.weights_of(tuned),
    )  # fmt: skip
    again = concept.tuned(model, domain_weights)
    means = torch.randn(1, domain_weights.encoder.config.unet_width)
    torch.testing.assert_close(again.embedding(means), tuned.embedding(means), rtol=1e-3, atol=1e-3)


def test_an_imported_concept_is_small_and_loads(converted, model, face, tmp_path):
    domain_weights, _, _ = converted
    features = domain_weights.image_features(model, model.pixels([face.image]))[0]
    concept = Concept(
        domain="face",
        descriptor="face",
        base_name="tiny",
        base_fingerprint=model.fingerprint,
        weights_digest=domain_weights.digest,
        prepared=face,
        image_features=features,
        config=domain_weights.tuning,
        seed=5,
    )
    concept.save(tmp_path / "me.e4t")
    again = Concept.load(tmp_path / "me.e4t")
    assert torch.equal(again.image_features, features)
    image = face.image.width * face.image.height * 4
    assert (tmp_path / "me.e4t").stat().st_size < image + 2 * features.numel() + 3000
    one = tune(model, domain_weights, face, seed=5, image_features=features)
    other = tune(model, domain_weights, again.prepared, seed=5, image_features=again.image_features)
    assert generate(model, one) == generate(model, other)
    saved = dataclasses.replace(concept, weights=Concept.weights_of(one))
    saved.save(tmp_path / "kept.e4t")
    assert generate(model, Concept.load(tmp_path / "kept.e4t").tuned(model, domain_weights)) == generate(model, one)


def test_full_size_counts():
    """Stable Diffusion 1.4 and ViT-H/14 on the meta device: the published numbers of parameters."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8, in_channels=4,
            out_channels=4, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
        )  # fmt: skip
    shapes = projection_shapes(unet)
    networks = 0
    for rows, columns in shapes.values():
        networks += 1 + 2 * columns + 2 * rows  # v, linear1, linear2
        networks += columns * (columns + 1) + rows * (rows + 1)  # linear_column, linear_row
    assert networks == 143_226_592
    assert networks * 4 == pytest.approx(573e6, rel=1e-3)
    factors = sum(3 * (rows + columns) for rows, columns in shapes.values())
    assert factors * 2 < 1e6  # in float16
    assert factors * 4 < 2e6  # in float32, as domain weights keep them
    tower = tower_sizes("ViT-H-14::laion2b_s32b_b79k")
    assert tower["tower_heads"] == 16
    config = PatchEncoderConfig(**tower, unet_width=10_880, hidden_width=1280, embedding_width=768)
    assert config.vectors == 129
    random_values = sum(torch.Size(shape).numel() for shape in expected_shapes(config).values())
    assert random_values == pytest.approx(862.1e6, abs=0.05e6)


def test_no_size_of_stable_diffusion_is_written_down():
    """They follow from configs and shapes. (768 is also the side of one base's images.)

    `hub/single_file.py` tells by the widths in a file which model it holds.
    """
    for path in Path(e4t_cli.__file__).parent.rglob("*.py"):
        if path.parts[-2:] == ("hub", "single_file.py"):
            continue
        code = re.sub(r'"""(.|\n)*?"""|#.*|"[^"\n]*"', "", path.read_text(encoding="utf-8"))
        if path.name == "bases.py":
            code = code.replace("resolution=768", "")
        assert not re.search(r"(?<![.\d])(10_?880|768)\b", code), path
