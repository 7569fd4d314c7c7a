"""Invariants of `--tuning lora`: fresh adapters change nothing; merged and attached adapters agree."""

import copy
import dataclasses
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.nn import functional

from e4t_cli.errors import IntegrityError
from e4t_cli.formats.concept import Concept
from e4t_cli.nn.adapters import (
    LoraAdapters,
    LoraLayer,
    attention_layers,
    copy_sharing_weights,
    linear_layers,
    merge_lora,
)
from e4t_cli.prompts import parse_prompt
from e4t_cli.sampling import sample
from e4t_cli.schedulers import SamplingConfig
from e4t_cli.training.memory import Plan
from e4t_cli.training.tuning import Trainer, TuningOptions, tune


@pytest.fixture
def config(domain_weights):
    return domain_weights.tuning.replace(method="lora", lora_rank=2)


def randomized(adapters, seed=0):
    """Give fresh adapters random values, so that they have an effect."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in adapters.parameters():
            weight.copy_(torch.randn(weight.shape, generator=source) * 0.1)
    return adapters


@contextmanager
def attach(adapters, root):
    adapters.attach_to(root)
    try:
        yield
    finally:
        adapters.detach()


def fresh(layers, scaled=()):
    return LoraAdapters.for_layers(layers, 2, scaled=scaled, source=torch.Generator())


def run(unet):
    with torch.no_grad():
        source = torch.Generator().manual_seed(1)
        z_t, text = torch.randn(2, 4, 8, 8, generator=source), torch.randn(2, 5, 24)
        return unet(z_t, 7, text.fill_(0.5)).sample


def test_a_fresh_adapter_changes_nothing(model):
    before = run(model.unet)
    adapters = fresh(attention_layers(model.unet), scaled=attention_layers(model.unet))
    with attach(adapters, model.unet):
        assert torch.equal(run(model.unet), before)
    with attach(randomized(adapters), model.unet):
        assert not torch.allclose(run(model.unet), before)
    assert torch.equal(run(model.unet), before)


def test_merged_is_attached(model):
    """In float64, so that nothing but the formula is compared."""
    unet = copy.deepcopy(model.unet).double()
    adapters = randomized(fresh(attention_layers(unet), scaled=set(attention_layers(unet)))).double()
    source = torch.Generator().manual_seed(1)
    z_t = torch.randn(2, 4, 8, 8, generator=source).double()
    text = torch.randn(2, 5, 24, generator=source).double()
    with torch.no_grad():
        with attach(adapters, unet):
            attached = unet(z_t, 7, text).sample
        for path, adapter in zip(adapters.paths, adapters.adapters, strict=True):
            weight = unet.get_submodule(path).weight
            dense = weight * (1 + adapter.row_scale[:, None]) + adapter.up @ adapter.down
            weight.copy_(dense * (1 + adapter.column_scale))
        merged = unet(z_t, 7, text).sample
    torch.testing.assert_close(attached, merged, rtol=1e-10, atol=1e-10)


def test_the_layer_with_a_bias_by_hand():
    layer = torch.nn.Linear(3, 4)
    adapters = randomized(LoraAdapters({"0": LoraLayer(4, 3, 2, scales=True, source=torch.Generator())}))
    adapter, x = adapters.adapters[0], torch.randn(5, 3)
    with attach(adapters, torch.nn.Sequential(layer)):
        found = layer(x)
    expected = functional.linear(x, adapter.merged(layer.weight), layer.bias)
    torch.testing.assert_close(found, expected)


def test_scales_have_the_gradient_of_the_dense_weight():
    """The rows and columns of 1 + ΔW learn without a gradient of W, and learn the same."""
    weight, x = torch.randn(4, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    layer = torch.nn.Linear(3, 4, bias=False, dtype=torch.float64)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    adapters = LoraAdapters({"0": LoraLayer(4, 3, 2, scales=True, source=torch.Generator())})
    randomized(adapters).double()
    adapter = adapters.adapters[0]
    with attach(adapters, torch.nn.Sequential(layer)):
        cheap = torch.autograd.grad(layer(x).square().sum(), list(adapter.parameters()))
    rows, columns = adapter.row_scale[:, None], adapter.column_scale
    dense = (weight * (1 + rows) + adapter.up @ adapter.down) * (1 + columns)
    full = torch.autograd.grad((x @ dense.T).square().sum(), list(adapter.parameters()))
    for one, other in zip(cheap, full, strict=True):
        torch.testing.assert_close(one, other)


def test_a_copy_shares_the_weights_it_does_not_change(model, domain_weights):
    twin = copy_sharing_weights(model.unet, domain_weights.offsets)
    own = {f"{path}.weight" for path in attention_layers(model.unet)}
    for name, weight in twin.named_parameters():
        base = model.unet.get_parameter(name)
        assert (weight.data_ptr() == base.data_ptr()) == (name not in own)
    path = min(domain_weights.offsets)
    left, right = domain_weights.offsets[path]
    expected = model.unet.get_submodule(path).weight * (1 + left @ right)
    assert torch.equal(twin.get_submodule(path).weight, expected)


def test_only_adapters_are_trained_and_the_base_is_not_touched(model, domain_weights, face, config):
    run = Trainer(model, domain_weights, face, config)
    base = {weight.data_ptr() for weight in model.unet.parameters()}
    assert not base & {weight.data_ptr() for weight in run.optimizer.weights}
    exact = sum(weight.numel() for weight in model.unet.parameters())
    assert sum(weight.numel() for weight in run.optimizer.weights) < exact / 10
    run.gradients(0)
    assert all(weight.grad is None for weight in run.unet.parameters())
    assert all(weight.grad is not None for weight in run.optimizer.weights)


def test_the_loss_falls_and_every_group_moves(model, domain_weights, face, config):
    losses = []
    tuned = tune(
        model, domain_weights, face, config.replace(steps=15, base_learning_rate=5e-5),
        on_progress=lambda event: losses.append(event.values["loss"]),
    )  # fmt: skip
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    moved = {key.rpartition(".")[2] for key, value in tuned.adapters.items() if value.abs().max()}
    assert moved == {"up", "down", "row_gains", "column_gains"}
    assert {key.partition(".")[0] for key in tuned.adapters} == {"unet", "encoder"}


@pytest.mark.parametrize(
    ("group", "still"),
    [("encoder", "encoder."), ("offsets", "_gains"), ("unet", "unet.")],
)
def test_a_rate_of_zero_freezes_its_group(model, domain_weights, face, config, group, still):
    tuned = tune(model, domain_weights, face, config.replace(**{f"{group}_rate": 0.0}))
    ups = {key: bool(value.abs().max()) for key, value in tuned.adapters.items() if not key.endswith("down")}
    frozen = [key for key in ups if still in key and (group != "unet" or "gains" not in key)]
    assert frozen and not any(ups[key] for key in frozen)
    assert any(ups.values())


def test_without_steps_both_methods_give_the_same_model(model, domain_weights, face, config):
    one = tune(model, domain_weights, face, config.replace(steps=0))
    other = tune(model, domain_weights, face, domain_weights.tuning.replace(steps=0))
    for key, value in other.unet.state_dict().items():
        torch.testing.assert_close(one.unet.state_dict()[key], value)
    torch.testing.assert_close(one.encoded_image, other.encoded_image)


def test_micro_batches_and_checkpointing_change_nothing(model, domain_weights, face, config):
    def gradients(micro_batch, checkpointing=False):
        plan = Plan(micro_batch=micro_batch, checkpointing=checkpointing)
        run = Trainer(model, domain_weights, face, config, options=TuningOptions(autocast=False, plan=plan))
        randomized(run.parts.adapters["unet"])
        run.gradients(0)
        return torch.cat([weight.grad.flatten() for weight in run.optimizer.weights])

    whole = gradients(4)
    for found in (gradients(1), gradients(4, True)):
        assert (found - whole).norm() / whole.norm() < 1e-5


def test_saved_adapters_are_small_and_generate_the_same_images(model, domain_weights, face, config, tmp_path):
    tuned = tune(model, domain_weights, face, config, seed=5)
    concept = Concept(
        domain="face", descriptor="face", base_name="tiny", base_fingerprint=model.fingerprint,
        weights_digest="", prepared=face, config=config, seed=5, weights=Concept.weights_of(tuned),
        image_features=model.image_features(model.pixels([face.image]))[0],
    )  # fmt: skip
    concept.save(tmp_path / "me.e4t")
    again = Concept.load(tmp_path / "me.e4t")
    generated = [
        next(sample(model, one, [parse_prompt("S* on the beach")], [1], SamplingConfig(steps=2)))
        for one in (tuned, again.tuned(model, domain_weights))
    ]
    assert generated[0].tobytes() == generated[1].tobytes()
    exact = sum(value.nbytes for value in Concept.weights_of(tune(model, domain_weights, face)).values())
    assert (tmp_path / "me.e4t").stat().st_size < exact / 20
    assert all(value.dtype == torch.float16 for value in again.weights.values())
    for change in (
        {"adapters.unet.nowhere.up": torch.ones(2, 2)},
        {"adapters.x.y.up": torch.ones(1)},
    ):
        wrong = dataclasses.replace(again, weights={**again.weights, **change})
        with pytest.raises(IntegrityError, match="do not fit"):
            wrong.tuned(model, domain_weights)


def test_a_half_precision_base_is_merged_in_float32(base_folder, domain_weights, face, config):
    from e4t_cli.models.text_to_image import TextToImageModel

    half = TextToImageModel.load(base_folder, dtype=torch.bfloat16)
    tuned = tune(half, domain_weights, face, config, options=TuningOptions(autocast=True))
    assert tuned.unet.dtype == torch.bfloat16
    path = max(domain_weights.offsets)
    left, right = domain_weights.offsets[path]
    weight = half.unet.get_submodule(path).weight.float() * (1 + left @ right)
    prefix = f"unet.{path}."
    own = {k[len(prefix) :]: v for k, v in tuned.adapters.items() if k.startswith(prefix)}
    adapter = LoraAdapters.from_tensors({f"x.{k}": v for k, v in own.items()}).adapters[0]
    expected = adapter.merged(weight).bfloat16()
    assert torch.equal(tuned.unet.get_submodule(path).weight, expected)


def test_a_delta_that_bfloat16_would_lose_survives_the_merge(model):
    """Fifteen steps move a weight by less than one spacing of bfloat16 values."""
    layers = attention_layers(model.unet)
    path = min(layers)
    weight = layers[path].weight
    adapter = LoraLayer(*weight.shape, 2, scales=True, source=torch.Generator())
    with torch.no_grad():
        adapter.up.copy_(torch.randn_like(adapter.up) * 1e-4)
    delta = adapter.up @ adapter.down
    in_float32 = adapter.merged(weight) - weight
    rounded_first = (weight.bfloat16() + delta.bfloat16()).float() - weight.bfloat16().float()
    error = {
        name: ((found - delta).norm() / delta.norm()).item()
        for name, found in (("float32", in_float32), ("bfloat16", rounded_first))
    }
    assert error["float32"] < 1e-2 < 0.2 < error["bfloat16"]


def test_encoders_without_layers_have_nothing_to_adapt(model, domain_weights, face, config):
    from e4t_cli.nn.word_embedding_encoder import FixedEmbedding

    plain = dataclasses.replace(domain_weights, encoder=FixedEmbedding(torch.zeros(24)), offsets={})
    tuned = tune(model, plain, face, config)
    assert not linear_layers(plain.encoder)
    assert all(key.startswith("unet.") and "gains" not in key for key in tuned.adapters)
    with pytest.raises(ValueError, match="has no adapters"):
        merge_lora(model.unet, {}, plain.encoder, {"vae.x.up": torch.ones(1, 1)})


def test_weights_converted_at_once_equal_weights_converted_one_by_one(model, domain_weights, face, config):
    def gradient(autocast, at_once):
        run = Trainer(model, domain_weights, face, config, options=TuningOptions(autocast=autocast))
        randomized(run.parts.adapters["unet"])
        if not at_once:
            run.parts.converted = lambda dtype: nullcontext()
        run.gradients(0)
        for adapter in run.parts.adapters["unet"].adapters:
            assert adapter.converted == {}
        return torch.cat([weight.grad.flatten() for weight in run.optimizer.weights])

    exact = gradient(False, False)
    error = {at_once: ((gradient(True, at_once) - exact).norm() / exact.norm()).item() for at_once in (False, True)}
    assert error[True] < 0.02 and error[True] < 1.5 * error[False]
