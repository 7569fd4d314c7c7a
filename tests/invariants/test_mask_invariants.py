"""Invariants of the mask and of pixels: only what is inside the mask is learned (section 3.4)."""

import dataclasses

import pytest
import torch
from PIL import Image

from e4t_cli.registry.domain import PreparedImage
from e4t_cli.training import loss as losses
from e4t_cli.training import tuning
from e4t_cli.training.loss import training_loss
from e4t_cli.training.tuning import PhotoSamples, Trainer, TuningOptions, tune

FLOAT32 = TuningOptions(autocast=False)


@pytest.fixture
def half_masked(face):
    """The photo with a mask of its left half: no latent counts in part."""
    mask = Image.new("L", face.image.size)
    mask.paste(255, (0, 0, 16, 32))
    return PreparedImage(image=face.image, mask=mask)


def outside(latents):
    """Values that are zero on the left half, and large and random on the right."""
    junk = torch.randn(latents.shape, generator=torch.Generator().manual_seed(7)) * 10
    junk[..., :4] = 0
    return junk


def gradients(model, domain_weights, prepared, config):
    run = Trainer(model, domain_weights, prepared, config, options=FLOAT32)
    values = run.gradients(0)
    return [values, *(one.clone() for one in run.optimizer.gradients)]


def tensors(tuned):
    return [*tuned.unet.state_dict().values(), *tuned.encoder.state_dict().values(),
            tuned.encoded_image]  # fmt: skip


def same(one, other):
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("whole", [False, True])
def test_nothing_outside_the_mask_is_learned(model, domain_weights, half_masked, monkeypatch, method, kind, whole):
    """Neither the photo nor the noise there: gradients and tuned weights are equal to the bit.

    Both are changed in the target alone. z_t stays as it is, since the U-Net reads all of it: the
    inside is predicted from what is around it, too, and rightly so.
    """
    monkeypatch.setattr(model.noise_schedule, "_internal_dict", frozen_with(model, kind))
    config, target = domain_weights.tuning.replace(method=method), model.target

    def learned(masked):
        if whole:
            return tensors(tune(model, domain_weights, half_masked, masked, options=FLOAT32))
        return gradients(model, domain_weights, half_masked, masked)

    expected, unmasked = learned(config), learned(config.replace(mask=False))
    monkeypatch.setattr(model, "target", lambda z_0, noise, t: target(z_0 + outside(z_0), noise + outside(noise), t))
    assert same(learned(config), expected)
    # The check can fail: without the mask, the same change is learned.
    assert not same(learned(config.replace(mask=False)), unmasked)
    monkeypatch.setattr(tuning, "training_loss", without_mask)
    assert not same(learned(config), expected)


def without_mask(model, unet, encoder, batch, **options):
    return training_loss(model, unet, encoder, dataclasses.replace(batch, mask=None), **options)


def frozen_with(model, kind):
    from diffusers.configuration_utils import FrozenDict

    return FrozenDict({**model.noise_schedule.config, "prediction_type": kind})


def test_the_gradient_of_the_prediction_is_zero_outside_the_mask(model, domain_weights, half_masked, monkeypatch):
    predicted, up_and_out = [], losses.up_and_out

    def watched(*args):
        predicted.append(up_and_out(*args))
        predicted[-1].retain_grad()
        return predicted[-1]

    monkeypatch.setattr(losses, "up_and_out", watched)
    gradients(model, domain_weights, half_masked, domain_weights.tuning)
    (prediction,) = predicted
    assert prediction.grad[..., 4:].abs().max() == 0
    assert (prediction.grad[..., :4] != 0).all()


@pytest.mark.parametrize(("colour", "value"), [(0, -1.0), (255, 1.0), (51, -0.6)])
def test_the_vae_reads_pixels_from_minus_one_to_one_and_the_image_encoder_clips(
    model, domain_weights, monkeypatch, colour, value
):
    """CLIP's are normalised by its mean and deviation of pixels in 0 … 1 (here 0.5 and 0.25)."""
    encoded, encode = [], model.vae.encode
    monkeypatch.setattr(model.vae, "encode", lambda x: encoded.append(x) or encode(x))
    tower = model.image_tower
    hook = tower.visual.conv1.register_forward_pre_hook(lambda _, inputs: encoded.append(inputs[0]))
    photo = PreparedImage(image=Image.new("RGB", (32, 32), (colour,) * 3))
    PhotoSamples(model, domain_weights, photo, domain_weights.tuning, 0)
    hook.remove()
    for_vae, for_clip = encoded
    torch.testing.assert_close(for_vae, torch.full((1, 3, 32, 32), value))
    torch.testing.assert_close(for_clip, torch.full_like(for_clip, (colour / 255 - 0.5) / 0.25))
    assert tower.mean.flatten().tolist() == [0.5] * 3 and tower.std.flatten().tolist() == [0.25] * 3
