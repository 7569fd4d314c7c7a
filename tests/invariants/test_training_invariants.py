"""Invariants of eq. 5 and of tuning: sections 3.3 and 3.4."""

import dataclasses
import math

import pytest
import torch

from e4t_cli.errors import DivergedError, ResourceError
from e4t_cli.nn.word_embedding_encoder import FixedEmbedding
from e4t_cli.registry.domain import PreparedImage
from e4t_cli.training import trainable as parts
from e4t_cli.training.loss import diffusion_loss, latent_mask, regularization_loss
from e4t_cli.training.memory import Plan
from e4t_cli.training.tuning import Trainer, TuningOptions, tune


def gradients(model, domain_weights, face, micro_batch, *, checkpointing=False):
    """Return the gradient of one tuning step, over all three groups of weights."""
    plan = Plan(micro_batch=micro_batch, checkpointing=checkpointing)
    run = Trainer(model, domain_weights, face, domain_weights.tuning, options=TuningOptions(autocast=False, plan=plan))
    losses = run.gradients(0).tolist()
    weights = run.optimizer.weights
    assert all(weight.grad is not None for weight in weights)
    return losses, torch.cat([weight.grad.flatten() for weight in weights])


def same_weights(one, other):
    first, second = one.unet.state_dict(), other.unet.state_dict()
    return (
        list(first) == list(second)
        and all(torch.equal(first[key], second[key]) for key in first)
        and torch.equal(one.encoded_image, other.encoded_image)
        and all(torch.equal(a, b) for a, b in zip(one.encoder.parameters(), other.encoder.parameters(), strict=True))
    )


# ── the terms ──


def test_equation_4_and_2_by_hand():
    prediction, target = torch.zeros(1, 2, 1, 2), torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    assert diffusion_loss(prediction, target).item() == pytest.approx((1 + 4 + 9 + 16) / 4)
    mask = torch.tensor([[[1.0, 0.5]]])
    expected = (1 + 9 + 0.5 * (4 + 16)) / (1.5 * 2)
    assert diffusion_loss(prediction, target, mask).item() == pytest.approx(expected)
    assert regularization_loss(torch.tensor([[3.0, 4.0], [0.0, 2.0]])).tolist() == [25.0, 4.0]


def test_masked_pixels_give_no_gradient():
    prediction = torch.randn(2, 4, 8, 8, requires_grad=True)
    mask = torch.zeros(2, 8, 8)
    mask[0, 2:5, 3:6] = 1
    mask[1, 1:3, 1:7] = 0.5
    loss = diffusion_loss(prediction, torch.randn(2, 4, 8, 8), mask).mean()
    (gradient,) = torch.autograd.grad(loss, prediction)
    outside = (mask == 0)[:, None].expand_as(gradient)
    assert gradient[outside].abs().max() == 0
    assert (gradient[~outside] != 0).all()


def test_a_mask_is_reduced_by_area_and_an_empty_one_is_the_whole_image():
    mask = torch.zeros(2, 8, 8)
    mask[0, :2, :3] = 1
    small = latent_mask(mask, (4, 4))
    assert small[0, 0].tolist() == [1.0, 0.5, 0.0, 0.0]
    assert torch.equal(small[1], torch.ones(4, 4))


def test_velocity_is_predicted_if_the_base_was_trained_for_it(model):
    z_0, epsilon, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    assert model.target(z_0, epsilon, t) is epsilon
    alpha = model.noise_schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    z_t = model.add_noise(z_0, epsilon, t)
    torch.testing.assert_close(z_t, alpha.sqrt() * z_0 + (1 - alpha).sqrt() * epsilon)
    model.noise_schedule.register_to_config(prediction_type="v_prediction")
    try:
        v = model.target(z_0, epsilon, t)
    finally:
        model.noise_schedule.register_to_config(prediction_type="epsilon")
    torch.testing.assert_close(v, alpha.sqrt() * epsilon - (1 - alpha).sqrt() * z_0)


# ── one step ──


def test_micro_batches_are_exact(model, domain_weights, face):
    losses, whole = gradients(model, domain_weights, face, 4)
    for micro_batch in (2, 1, 3):
        others, found = gradients(model, domain_weights, face, micro_batch)
        assert (found - whole).norm() / whole.norm() < 1e-5
        assert others == pytest.approx(losses, rel=1e-5)


def test_gradient_checkpointing_changes_nothing(model, domain_weights, face):
    """But the rounding: it runs the U-Net module by module."""
    _, plain = gradients(model, domain_weights, face, 4)
    _, recomputed = gradients(model, domain_weights, face, 4, checkpointing=True)
    assert (recomputed - plain).norm() / plain.norm() < 5e-6


def test_the_gradient_is_that_of_equation_5_through_the_feature_pass(model, domain_weights, face):
    """Against the loss itself, moved a little along one direction of the U-Net's weights."""
    run = Trainer(model, domain_weights, face, domain_weights.tuning, options=TuningOptions(autocast=False))
    for part in (run.unet, run.encoder):
        part.double()
    model.text_encoder.double()
    model.__dict__.pop("uncond_embeds", None)
    try:
        seen = run.samples
        seen.posterior = dataclasses.replace(
            seen.posterior, mean=seen.posterior.mean.double(), logvar=seen.posterior.logvar.double()
        )
        seen.image_features, seen.mask = seen.image_features.double(), seen.mask.double()
        run.e_domain = run.e_domain.double()
        weight = run.unet.down_blocks[1].resnets[0].conv1.weight
        source = torch.Generator().manual_seed(0)
        direction = torch.randn(weight.shape, dtype=torch.float64, generator=source)

        def loss(step):
            with torch.no_grad():
                weight.add_(step * direction)
            diffusion, penalty = run.gradients(0).tolist()
            slope = (weight.grad * direction).sum().item()
            with torch.no_grad():
                weight.sub_(step * direction)
            return diffusion + domain_weights.tuning.reg_weight * penalty, slope

        step = 1e-4
        numeric = (loss(step)[0] - loss(-step)[0]) / (2 * step)
        # `gradients` reports in float32: the difference of two losses has few digits left.
        assert loss(0)[1] == pytest.approx(numeric, rel=2e-2)
    finally:
        model.text_encoder.float()
        model.__dict__.pop("uncond_embeds", None)


# ── whole tunings ──


def test_tuning_moves_all_three_groups_and_not_the_base(model, domain_weights, face):
    encoder = {key: value.clone() for key, value in domain_weights.encoder.state_dict().items()}
    factors = {key: (a.clone(), b.clone()) for key, (a, b) in domain_weights.offsets.items()}
    untuned = tune(model, domain_weights, face, domain_weights.tuning.replace(steps=0))
    tuned = tune(model, domain_weights, face)
    conv = "conv_in.weight"
    assert not torch.equal(tuned.unet.state_dict()[conv], model.unet.state_dict()[conv])
    assert torch.equal(untuned.unet.state_dict()[conv], model.unet.state_dict()[conv])
    assert not torch.equal(tuned.encoded_image, untuned.encoded_image)
    assert list(tuned.unet.state_dict()) == list(model.unet.state_dict())
    assert all(torch.equal(encoder[key], value) for key, value in domain_weights.encoder.state_dict().items())
    for key, (left, right) in domain_weights.offsets.items():
        assert torch.equal(left, factors[key][0])
        assert torch.equal(right, factors[key][1])
    assert not any(weight.requires_grad for weight in tuned.unet.parameters())


def test_without_steps_the_offsets_are_merged_and_nothing_else_changes(model, domain_weights, face):
    tuned = tune(model, domain_weights, face, domain_weights.tuning.replace(steps=0))
    own, base = tuned.unet.state_dict(), model.unet.state_dict()
    for key in base:
        if key.removesuffix(".weight") in domain_weights.offsets:
            left, right = domain_weights.offsets[key.removesuffix(".weight")]
            assert torch.equal(own[key], base[key] * (1 + left @ right))
        else:
            assert torch.equal(own[key], base[key])


def test_the_same_seed_makes_the_same_model(model, domain_weights, face):
    one, other = (tune(model, domain_weights, face, seed=3) for _ in range(2))
    assert same_weights(one, other)
    assert not same_weights(one, tune(model, domain_weights, face, seed=4))


def test_the_same_seed_makes_the_same_model_in_bfloat16(model, domain_weights, face):
    one, other = (tune(model, domain_weights, face, options=TuningOptions(autocast=True)) for _ in range(2))
    assert same_weights(one, other)
    assert all(weight.dtype == torch.float32 for weight in one.unet.parameters())


def test_the_loss_falls(model, domain_weights, face):
    losses = []
    config = domain_weights.tuning.replace(steps=15, base_learning_rate=1e-4)
    tune(model, domain_weights, face, config, on_progress=lambda p: losses.append(p.values["loss"]))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("group", ["encoder", "offsets", "unet"])
def test_a_rate_of_zero_freezes_its_group(model, domain_weights, face, group):
    config = domain_weights.tuning.replace(**{f"{group}_rate": 0.0})
    tuned, untuned = (
        tune(model, domain_weights, face, config),
        tune(model, domain_weights, face, config.replace(steps=0)),
    )
    moved = {
        "encoder": not torch.equal(tuned.encoded_image, untuned.encoded_image),
        "unet": not torch.equal(tuned.unet.conv_in.weight, untuned.unet.conv_in.weight),
    }
    assert moved.get(group, False) is False
    assert any(moved.values())


def test_dreambooth_is_a_config_and_no_code_of_its_own(model, domain_weights, face):
    rare = model.word_embedding(9) - model.word_embedding(model.descriptor_id("face"))
    baseline = dataclasses.replace(
        domain_weights,
        encoder=FixedEmbedding(rare / domain_weights.embedding_scale),
        offsets={},
        templates=("{} face",),
    )
    tuned = tune(model, baseline, face, domain_weights.tuning.replace(encoder_rate=0.0))
    torch.testing.assert_close(tuned.embedding(None)[0], model.word_embedding(9))
    assert not torch.equal(tuned.unet.conv_in.weight, model.unet.conv_in.weight)
    everything_frozen = domain_weights.tuning.replace(encoder_rate=0.0, offsets_rate=0.0, unet_rate=0.0)
    frozen = tune(model, domain_weights, face, everything_frozen)
    assert same_weights(frozen, tune(model, domain_weights, face, domain_weights.tuning.replace(steps=0)))


def test_an_empty_mask_is_reported_and_not_used(model, domain_weights, face):
    from PIL import Image

    notes = []
    empty = PreparedImage(image=face.image, mask=Image.new("L", face.image.size))
    masked = tune(model, domain_weights, empty, on_progress=lambda p: notes.append(p.note))
    assert any("mask is empty" in note for note in notes)
    assert same_weights(masked, tune(model, domain_weights, PreparedImage(image=face.image)))


def test_cached_features_equal_the_image_encoders(model, domain_weights, face):
    kept = model.image_features(model.pixels([face.image]))[0]
    calls = []
    hook = model.image_tower.register_forward_hook(lambda *args: calls.append(1))
    one = tune(model, domain_weights, face, image_features=kept)
    assert not calls
    other = tune(model, domain_weights, face)
    assert len(calls) == 1  # once per tuning, never per step
    hook.remove()
    assert same_weights(one, other)


def test_a_number_that_is_not_finite_stops_the_tuning(model, domain_weights, face):
    features = torch.full((2, 32), math.nan)
    with pytest.raises(DivergedError, match="step 1"):
        tune(model, domain_weights, face, image_features=features)


def test_out_of_memory_halves_the_micro_batch(model, domain_weights, face, monkeypatch):
    sizes = []
    gradients = Trainer.gradients
    notes = []

    def short_of_memory(self, step):
        sizes.append(self.plan.micro_batch)
        if self.plan.micro_batch > 1:
            raise torch.OutOfMemoryError("no more")
        return gradients(self, step)

    monkeypatch.setattr(Trainer, "gradients", short_of_memory)
    tune(model, domain_weights, face, on_progress=lambda event: notes.append(event.note))
    assert sizes == [4, 2, 1, 1, 1]
    assert [note.split(":")[1].split()[0] for note in notes if note] == ["2", "1"]

    def no_memory(self, step):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(Trainer, "gradients", no_memory)
    with pytest.raises(ResourceError, match="one sample at a time"):
        tune(model, domain_weights, face)


def test_a_half_precision_base_is_tuned_and_merged_in_float32(base_folder, domain_weights, face):
    from e4t_cli.models.text_to_image import TextToImageModel

    half = TextToImageModel.load(base_folder, dtype=torch.bfloat16)
    merged = []
    merge = parts.WeightOffsets.merge

    def watched(self):
        merge(self)
        merged.append({weight.dtype for weight in run_unet})

    run_unet = []
    original = parts.FullFineTuning.__init__

    def remember(self, *args, **options):
        original(self, *args, **options)
        run_unet.extend(self.unet.parameters())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts.WeightOffsets, "merge", watched)
        patch.setattr(parts.FullFineTuning, "__init__", remember)
        tuned = tune(half, domain_weights, face, options=TuningOptions(autocast=False))
    assert merged == [{torch.float32}]
    assert tuned.unet.dtype == torch.bfloat16
