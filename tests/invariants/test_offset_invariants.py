"""Invariants of the weight offsets: section 3.2, eq. 3."""

import copy

import pytest
import torch
from torch.nn.utils import parametrize

from e4t_cli.nn.weight_offsets import FactoredWeightOffset, WeightOffset, WeightOffsets


def randomized(offsets):
    """Give fresh offsets random values, so that they have an effect."""
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in offsets.parameters():
            weight.add_(torch.randn(weight.shape, generator=source) * 0.1)
    return offsets


def inputs(count=2):
    source = torch.Generator().manual_seed(4)
    z_t = torch.randn(count, 4, 8, 8, generator=source)
    text = torch.randn(count, 16, 24, generator=source)
    return z_t, torch.arange(count) * 400 + 100, text


def dense_delta(offset):
    """Section 3.2, step by step, on the whole matrix."""
    v_y = offset.to_rows(offset.initial)
    v_x = offset.to_columns(offset.initial)
    product = v_y[:, None] * v_x[None, :]  # (M, N)
    over_rows = offset.over_rows(product.T).T  # a linear layer along the row index
    return offset.over_columns(over_rows)  # and one along the column index


def test_the_factored_form_is_the_dense_network_in_value_and_gradient():
    torch.manual_seed(0)
    for rows, columns, seed_width in ((6, 5, 1), (4, 9, 3)):
        offset = randomized(WeightOffset(rows, columns, seed_width=seed_width).double())
        weights = list(offset.parameters())
        probe = torch.randn(rows, columns, dtype=torch.float64)
        dense, factored = dense_delta(offset), offset.delta()
        assert torch.linalg.matrix_rank(factored) <= 3
        torch.testing.assert_close(factored, dense, rtol=1e-13, atol=1e-13)
        expected = torch.autograd.grad((dense * probe).sum(), weights)
        found = torch.autograd.grad((factored * probe).sum(), weights)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_an_attached_weight_is_the_base_times_one_plus_delta():
    """Eq. 3, element by element, with the offset network evaluated layer by layer."""
    torch.manual_seed(0)
    layer, offset = torch.nn.Linear(5, 6).double(), randomized(WeightOffset(6, 5).double())
    base = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", offset)
    torch.testing.assert_close(layer.weight, base + base * dense_delta(offset), rtol=1e-12, atol=1e-12)


def test_factors_carry_the_same_offsets(model):
    offsets = randomized(WeightOffsets.for_unet(model.unet))
    again = WeightOffsets.from_factors(offsets.factors())
    assert set(again.paths) == set(offsets.paths)
    deltas = dict(zip(offsets.paths, offsets.modulations, strict=True))
    for path, other in zip(again.paths, again.modulations, strict=True):
        assert isinstance(other, FactoredWeightOffset)
        assert torch.equal(deltas[path].delta(), other.delta())


@torch.no_grad()
def test_fresh_offsets_change_nothing(model):
    plain = model.unet(*inputs()).sample
    offsets = WeightOffsets.for_unet(model.unet)
    offsets.attach_to(model.unet)
    assert torch.equal(model.unet(*inputs()).sample, plain)
    offsets.detach()


def test_every_projection_of_every_attention_layer_and_nothing_else(model):
    paths = WeightOffsets.for_unet(model.unet).paths
    expected = {
        f"{path}.{name}"
        for path, module in model.unet.named_modules()
        if type(module).__name__ == "Attention"
        for name in ("to_q", "to_k", "to_v")
    }
    assert set(paths) == expected
    assert len(paths) == len(expected) > 0


@torch.no_grad()
def test_attach_then_detach_restores_the_unet(model):
    before = copy.deepcopy(model.unet)
    kept = dict(model.unet.named_parameters())
    offsets = randomized(WeightOffsets.for_unet(model.unet))
    plain = model.unet(*inputs()).sample
    with offsets.attached_to(model.unet):
        assert not torch.equal(model.unet(*inputs()).sample, plain)
    assert repr(model.unet) == repr(before)
    one, other = model.unet.state_dict(), before.state_dict()
    assert list(one) == list(other)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert all(kept[key] is weight for key, weight in model.unet.named_parameters())
    assert not any(parametrize.is_parametrized(module) for module in model.unet.modules())


@torch.no_grad()
def test_merging_gives_a_plain_unet_with_the_same_output(model):
    unet = copy.deepcopy(model.unet)
    offsets = randomized(WeightOffsets.for_unet(unet))
    offsets.attach_to(unet)
    attached = unet(*inputs()).sample
    offsets.merge()
    assert list(unet.state_dict()) == list(model.unet.state_dict())
    assert repr(unet) == repr(model.unet)
    assert torch.equal(unet(*inputs()).sample, attached)


def test_bias_keeps_its_place():
    layer = torch.nn.ModuleDict({"to_q": torch.nn.Linear(3, 2, bias=True)})
    with WeightOffsets.for_unet(layer).attached_to(layer):
        pass
    assert list(layer.state_dict()) == ["to_q.weight", "to_q.bias"]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_product_is_computed_in_float32(dtype):
    """A delta under one spacing of half-precision numbers is not lost before the product."""
    torch.manual_seed(1)
    original = torch.randn(64, 64, dtype=torch.float32) * 0.02
    offset = FactoredWeightOffset(torch.full((64, 3), 1e-2), torch.full((3, 64), 1e-2 / 3))
    expected = original * (1 + 1e-4)
    # In float32, also under an autocast that would round 1 + ΔW back to 1.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = offset(original)
    moved = (merged - original).norm() / (expected - original).norm()
    assert merged.dtype == torch.float32
    assert 0.99 < moved < 1.01
    # In the weight's own precision the result is the nearest value, not a sum of rounded parts.
    assert torch.equal(offset(original.to(dtype)), (original.to(dtype).float() * (1 + offset.delta())).to(dtype))


def test_attaching_twice_or_elsewhere_is_refused(model):
    offsets = WeightOffsets.for_unet(model.unet)
    offsets.attach_to(model.unet)
    with pytest.raises(ValueError, match="already"):
        offsets.attach_to(model.unet)
    offsets.detach()
    with pytest.raises(ValueError, match="not attached"):
        offsets.detach()
    other = torch.nn.ModuleDict({"to_q": torch.nn.Linear(3, 2)})
    with pytest.raises(ValueError, match="projections"):
        offsets.attach_to(other)


def test_fused_projections_are_refused():
    fused = torch.nn.ModuleDict({"to_qkv": torch.nn.Linear(3, 9)})
    with pytest.raises(ValueError, match="fused"):
        WeightOffsets.for_unet(fused)
