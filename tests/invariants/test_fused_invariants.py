"""Invariants of the fused forward pass: it is the U-Net's own, in value and gradient, in fewer operations."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional

from e4t_cli.nn import fused_unet
from e4t_cli.nn.composed_attention import ComposedAttention, composed_attention
from e4t_cli.nn.fused_projections import joint_weights, shared_weights
from e4t_cli.nn.fused_unet import FusedUNet
from e4t_cli.nn.precision import training_attention
from e4t_cli.nn.unet import down_and_mid, embed_latents, pooled_features, up_and_out
from e4t_cli.nn.unet_blocks import has_plain_blocks
from e4t_cli.nn.weight_offsets import FactoredWeightOffset, WeightOffsets
from e4t_cli.training.trainable import FullFineTuning
from e4t_cli.training.tuning import Trainer, TuningOptions
from tests.threads import at_once

KINDS = {
    "v1": {},
    "v2": {"use_linear_projection": True, "attention_head_dim": (2, 4)},
    "deep": {"layers_per_block": 2, "transformer_layers_per_block": 2},
}


def small_unet(**options):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    usual = {
        "sample_size": 8, "cross_attention_dim": 24, "attention_head_dim": 4, "block_out_channels": (16, 32),
        "layers_per_block": 1, "norm_num_groups": 4, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return UNet2DConditionModel(**{**usual, **options}).eval().double()


def with_offsets(unet):
    source = torch.Generator().manual_seed(1)
    factors = {
        path: tuple(torch.randn(one.shape, generator=source).double() * 0.1 for one in pair)
        for path, pair in WeightOffsets.for_unet(unet).factors().items()
    }
    offsets = WeightOffsets.from_factors(factors)
    offsets.attach_to(unet)
    return offsets


def loss_and_gradients(unet, text, *, fused, side=8, read=True):
    """Return the prediction and all gradients of a feature pass and a main pass that depends on it."""
    source = torch.Generator().manual_seed(2)
    z_t = torch.randn(3, 4, side, side, generator=source, dtype=torch.float64)
    empty = torch.randn(1, 5, 24, generator=source, dtype=torch.float64).expand(3, -1, -1)
    text = text.clone().requires_grad_(True)
    unet.zero_grad()
    with FusedUNet(unet).step() if fused else nullcontext():
        start = embed_latents(unet, z_t, torch.tensor([3, 500, 999]))
        features = pooled_features(down_and_mid(unet, start, empty)) if read else text.new_zeros(3, 1)
        prompt = text * (1 + features.mean(dim=1)[:, None, None])
        prediction = up_and_out(unet, down_and_mid(unet, start, prompt), prompt)
    (prediction.square().mean() + prediction.sin().mean()).backward()
    return [prediction.detach(), text.grad, *(weight.grad for weight in unet.parameters())]


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_unet_in_value_and_gradient(kind, offsets, composed, monkeypatch):
    if composed:  # as where no fused kernel is
        attention = fused_unet.attention
        monkeypatch.setattr(fused_unet, "attention", lambda *parts, heads, composed: attention(*parts, heads=heads, composed=True))  # fmt: skip # noqa: E501
    unet = small_unet(**KINDS[kind])
    assert has_plain_blocks(unet)
    if offsets:
        with_offsets(unet)
    text = torch.randn(3, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for options in ({}, {"side": 6, "read": False}):  # a side that no power of two divides; no feature pass
        expected = loss_and_gradients(unet, text, fused=False, **options)
        found = loss_and_gradients(unet, text, fused=True, **options)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"resnet_time_scale_shift": "scale_shift"}, {"only_cross_attention": True},
        {"mid_block_scale_factor": 2.0}, {"attention_type": "gated"}, {"act_fn": "gelu"},
        {"dual_cross_attention": True},
        {"down_block_types": ("AttnDownBlock2D", "CrossAttnDownBlock2D")}, {"mid_block_type": "UNetMidBlock2D"},
    ],
    ids=str,
)  # fmt: skip
def test_another_unet_runs_module_by_module(options):
    assert not has_plain_blocks(small_unet(**options))


def test_hooks_and_other_processors_are_not_bypassed():
    from diffusers.models.attention_processor import SlicedAttnProcessor

    unet = small_unet()
    hook = unet.mid_block.resnets[0].register_forward_hook(lambda *_: None)
    assert not has_plain_blocks(unet)
    hook.remove()
    assert has_plain_blocks(unet)
    unet.set_attn_processor(SlicedAttnProcessor(1))
    assert not has_plain_blocks(unet)


def test_another_unet_is_untouched_inside_a_step():
    unet, other = small_unet(), small_unet(layers_per_block=2)
    text = torch.randn(3, 5, 24, dtype=torch.float64)
    expected = loss_and_gradients(other, text, fused=False)
    with FusedUNet(unet).step():
        found = loss_and_gradients(other, text, fused=False)
    assert all(map(torch.equal, found, expected))


def test_threads_have_steps_of_their_own():
    text = torch.randn(3, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    unets = [small_unet(), small_unet(layers_per_block=2)]
    expected = [loss_and_gradients(unet, text, fused=True) for unet in unets]
    found = at_once(*(lambda unet=unet: loss_and_gradients(unet, text, fused=True) for unet in unets))
    for one, other in zip(found, expected, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_tuning_step_has_the_gradient_of_the_modules(model, domain_weights, face, autocast, monkeypatch):
    def gradient():
        run = Trainer(model, domain_weights, face, domain_weights.tuning, options=TuningOptions(autocast=autocast))
        run.gradients(0)
        return torch.cat([one.flatten() for one in run.optimizer.gradients])

    fused = gradient()
    monkeypatch.setattr(FullFineTuning, "cached", lambda self: self.offsets.cached())
    plain = gradient()
    assert (fused - plain).norm() / plain.norm() < (2e-2 if autocast else 5e-6)


def test_joint_weights_are_the_modulated_ones():
    from torch.nn.utils import parametrize

    torch.manual_seed(0)
    layers = [torch.nn.Linear(5, 6, bias=False).bfloat16() for _ in range(3)]
    for layer in layers:
        parametrize.register_parametrization(
            layer, "weight", FactoredWeightOffset(torch.randn(6, 3), torch.randn(3, 5))
        )
    found = joint_weights(layers)
    for layer, one in zip(layers, found, strict=True):
        torch.testing.assert_close(one, layer.weight, rtol=1e-2, atol=0)


def test_the_uses_of_a_weight_share_its_gradient():
    weights = [torch.randn(4, requires_grad=True) for _ in range(3)]
    first, second = shared_weights(weights, [torch.bfloat16, torch.float32, torch.float32], 2)
    assert [one.dtype for one in second] == [torch.bfloat16, torch.float32, torch.float32]
    assert second[1].data_ptr() == weights[1].data_ptr()
    (2 * first[0] + 3 * second[0]).sum().backward(retain_graph=True)
    assert weights[0].grad.dtype == torch.float32 and weights[0].grad.tolist() == [5] * 4
    assert weights[1].grad is None
    second[1].sum().backward()
    assert weights[1].grad.tolist() == [1] * 4 and weights[2].grad is None


@pytest.mark.parametrize("shape", [(3,), (1, 2), (1, 1, 1)], ids=str)
def test_composed_attention_has_the_gradient_of_its_value(shape):
    torch.manual_seed(0)
    stacks = [torch.randn(count, 2, 4, 3, dtype=torch.float64, requires_grad=True) for count in shape]
    assert torch.autograd.gradcheck(lambda *some: ComposedAttention.apply(None, *some), stacks)
    q, k, v = (part for stack in stacks for part in stack)
    expected = functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(ComposedAttention.apply(None, *stacks), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_composed_attention_is_torchs(causal):
    torch.manual_seed(0)
    parts = [torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    expected = functional.scaled_dot_product_attention(*parts, is_causal=causal)
    with training_attention():
        found = functional.scaled_dot_product_attention(*parts, is_causal=causal)
    assert type(composed_attention(*parts, causal=causal).grad_fn) is type(found.grad_fn)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), parts),
        torch.autograd.grad(expected.square().sum(), parts), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other)


def test_a_copy_has_a_step_of_its_own():
    """`copy.deepcopy` of a U-Net inside a step is another U-Net."""
    unet = small_unet()
    with FusedUNet(unet).step():
        assert fused_unet.fused_step(copy.deepcopy(unet)) is None
        assert fused_unet.fused_step(unet) is fused_unet.fused_step(unet)
    assert fused_unet.fused_step(unet) is None
