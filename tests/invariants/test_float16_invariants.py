"""Invariants of tuning in float16, on GPUs without bfloat16: the same tuning, up to rounding."""

import pytest
import torch

from e4t_cli.errors import DivergedError
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn import precision
from e4t_cli.nn.precision import PrecisionPolicy
from e4t_cli.training import optim as loss_scale
from e4t_cli.training import tuning as step
from e4t_cli.training.memory import Plan
from e4t_cli.training.tuning import Trainer, TuningOptions, tune


@pytest.fixture(autouse=True)
def _a_gpu_with_float16(monkeypatch, request):
    """The CPU multiplies float16 as such a GPU does, only slowly."""
    if "capability" in request.fixturenames:
        return
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: False)
    monkeypatch.setattr(precision, "multiplies_float16", lambda device: True)


@pytest.mark.parametrize(
    ("bfloat16", "capability", "found"),
    [
        (True, (8, 0), torch.bfloat16),
        (False, (7, 5), torch.float16),  # T4, GeForce 20
        (False, (6, 1), None),  # GeForce 10: its float16 is slower than its float32
    ],
)
def test_T9_the_dtype_that_a_gpu_multiplies_fastest(monkeypatch, bfloat16, capability, found):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda")
    assert PrecisionPolicy.resolve(gpu).half == found
    unscaled = PrecisionPolicy.resolve(gpu, loss_scaling=False)
    assert unscaled.half == (torch.bfloat16 if bfloat16 else None)
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: False)
    for other in ("cpu", "mps"):
        assert PrecisionPolicy.resolve(torch.device(other)).half is None


def gradient(model, domain_weights, face, config, autocast=None, **plan):
    run = Trainer(
        model,
        domain_weights,
        face,
        config,
        options=TuningOptions(autocast=autocast, plan=Plan(micro_batch=4, **plan) if plan else None),
    )
    losses = run.gradients(0)
    return torch.cat([one.float().flatten() for one in run.optimizer.gradients]), losses, run


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("optimizer", ["fused", "cpu"])
def test_a_scaled_gradient_is_the_gradient(model, domain_weights, face, method, optimizer):
    config = domain_weights.tuning.replace(method=method)
    whole, exact_losses, _ = gradient(model, domain_weights, face, config, autocast=False)
    found, losses, run = gradient(model, domain_weights, face, config, optimizer=optimizer)
    assert run.scaler.get_scale() == loss_scale.INITIAL_SCALE
    assert (found - whole).norm() / whole.norm() < 0.01
    torch.testing.assert_close(losses, exact_losses, rtol=1e-2, atol=1e-2)


def test_without_a_scale_small_gradients_would_vanish(model, domain_weights, face, monkeypatch):
    """As small as they are where a mean runs over 16 times 16,384 values."""
    small = domain_weights.tuning.replace(reg_weight=0.0)
    whole, _, _ = gradient(model, domain_weights, face, small, autocast=False)
    training_loss = step.training_loss

    def much_smaller(*args, **kwargs):
        losses = training_loss(*args, **kwargs)
        return type(losses)(diffusion=losses.diffusion * 1e-4, regularization=losses.regularization)

    monkeypatch.setattr(step, "training_loss", much_smaller)
    error = {}
    for first in (1.0, loss_scale.INITIAL_SCALE):
        monkeypatch.setattr(loss_scale, "INITIAL_SCALE", first)
        found, _, _ = gradient(model, domain_weights, face, small)
        error[first] = ((found * 1e4 - whole).norm() / whole.norm()).item()
    assert error.pop(1.0) > 0.1 > 0.02 > max(error.values())


def test_an_overflowed_step_is_repeated_with_a_smaller_loss_scale(model, domain_weights, face, monkeypatch):
    expected, _, _ = gradient(model, domain_weights, face, domain_weights.tuning)
    monkeypatch.setattr(loss_scale, "INITIAL_SCALE", 2.0**40)
    accumulated, seen = Trainer._accumulate, []

    def counted(self, *samples):
        seen.append(samples)
        return accumulated(self, *samples)

    monkeypatch.setattr(Trainer, "_accumulate", counted)
    found, losses, run = gradient(model, domain_weights, face, domain_weights.tuning)
    assert len(seen) > 2 and all(again is seen[0][0] for again, *_ in seen)
    assert 1 < run.scaler.get_scale() < 2.0**40 and losses.isfinite().all()
    assert (found - expected).norm() / expected.norm() < 0.01
    seen.clear()
    run.gradients(1)
    assert len(seen) == 1  # the reduced scale is kept


def test_a_base_too_large_for_float16_is_tuned_in_float32(model, domain_weights, face, monkeypatch):
    training_loss, notes = step.training_loss, []

    def overflowing(model, *rest, **kwargs):
        losses = training_loss(model, *rest, **kwargs)
        if torch.is_autocast_enabled("cpu"):
            return type(losses)(diffusion=losses.diffusion * torch.inf, regularization=losses.regularization)
        return losses

    monkeypatch.setattr(step, "training_loss", overflowing)

    def tuned(**how):
        return tune(
            model, domain_weights, face, on_progress=lambda event: event.note and notes.append(event.note),
            **how,
        ).unet.state_dict()  # fmt: skip

    found, plain = tuned(), tuned(options=TuningOptions(autocast=False))
    assert [note.split(":")[0] for note in notes] == ["values too large for float16"]
    for key, value in plain.items():
        assert torch.equal(found[key], value)


def test_a_frozen_base_in_float16_that_overflows_is_one_error(base_folder, domain_weights, face):
    half = TextToImageModel.load(base_folder, dtype=torch.float16)
    with torch.no_grad():
        half.unet.conv_in.weight.mul_(torch.inf)
    with pytest.raises(DivergedError, match="too large for float16") as caught:
        tune(half, domain_weights, face, domain_weights.tuning.replace(method="lora"))
    assert "--dtype fp32" in caught.value.hint


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_base_in_float16_is_tuned_as_in_float32(base_folder, model, domain_weights, face, method):
    config = domain_weights.tuning.replace(method=method, unet_rate=1.0)
    half = TextToImageModel.load(base_folder, dtype=torch.float16)
    found = tune(half, domain_weights, face, config, seed=2)
    plain = tune(model, domain_weights, face, config, seed=2, options=TuningOptions(autocast=False))
    assert {weight.dtype for weight in found.unet.parameters()} == {torch.float16}
    error = change = 0.0
    for key, value in plain.unet.state_dict().items():
        error += (found.unet.state_dict()[key].float() - value).square().sum().item()
        change += (value - model.unet.state_dict()[key]).square().sum().item()
    # No tighter bound: where a gradient is close to zero, Adam's first steps follow its rounded sign.
    assert (error / change) ** 0.5 < 0.1
