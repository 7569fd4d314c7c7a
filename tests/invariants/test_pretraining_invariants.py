"""Invariants of pre-training: section 3.3, and resumed runs equal uninterrupted ones."""

import dataclasses

import pytest
import torch

from e4t_cli.errors import DivergedError, InputError, IntegrityError, UsageError
from e4t_cli.pretraining.batches import Batches
from e4t_cli.pretraining.encoded_images import EncodedImages, encode_images, epoch_indices
from e4t_cli.registry.config import PretrainingConfig, TuningConfig
from e4t_cli.registry.domain import PreparedImage
from e4t_cli.training.tuning import tune
from tests.conftest import drawn_face
from tests.pretraining.conftest import pretrain_domain_with

TUNING = TuningConfig(steps=2, base_learning_rate=1e-5, reg_weight=0.1, batch_size=4)
RECIPE = PretrainingConfig(steps=7, base_learning_rate=1e-4, batch_size=4)
PICTURES = 6  # with batches of 4, epochs end in the middle of a step and between steps


@pytest.fixture
def data(model):
    faces = [drawn_face(index) for index in range(PICTURES)]
    return encode_images(model, [PreparedImage(image=image, mask=mask) for image, mask in faces], batch_size=4)


@pytest.fixture
def pretrain(model, data):
    def run(config=RECIPE, **options):
        return pretrain_domain_with(model, data, config=config, **{"seed": 3, **options})

    return run


def same(one, other):
    pairs = list(zip(one.encoder.state_dict().values(), other.encoder.state_dict().values(), strict=True))
    assert one.offsets.keys() == other.offsets.keys()
    for path, factors in one.offsets.items():
        pairs += zip(factors, other.offsets[path], strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


class Interrupted(Exception):
    pass


def interrupt_after(step):
    def stop(state):
        if state.step == step:
            raise Interrupted

    return stop


def test_only_encoder_and_offsets_learn_and_the_loss_falls(pretrain):
    losses = []
    config = RECIPE.replace(steps=40)
    domain = pretrain(config, on_step=lambda step: losses.append(step.diffusion.mean().item()))
    assert len(losses) == 40
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert max((left @ right).abs().max() for left, right in domain.offsets.values()) > 1e-4
    assert domain.encoder.final.weight.abs().max() > 1e-4
    assert domain.images == PICTURES


def test_the_first_step_is_the_plain_base(model, data, pretrain):
    """Fresh encoder, fresh offsets: the first loss is that of the base with the descriptor."""
    first = []
    pretrain(RECIPE.replace(steps=1), autocast=False, on_step=first.append)
    batch = Batches(model, data, RECIPE, ("{}", "a photo of {}"), model.descriptor_id("face"), 3)
    step = batch.of(0)
    with torch.no_grad():
        z_t = model.add_noise(step.z_0, step.epsilon, step.timesteps)
        noise = model.unet(z_t, step.timesteps, model.embed_prompts(step.tokens)).sample
    expected = (noise - step.epsilon).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(first[0].diffusion, expected)
    assert first[0].penalty.abs().max() == 0


@pytest.mark.parametrize("stopped", [1, 3, 4, 6])
def test_a_resumed_run_ends_in_the_same_bits(pretrain, tmp_path, stopped):
    """Stops in the middle of an epoch (1, 4), at its end (3, 6), and between checkpoints."""
    whole = pretrain()
    with pytest.raises(Interrupted):
        pretrain(checkpoints=tmp_path, checkpoint_every=2, on_step=interrupt_after(stopped))
    torch.manual_seed(stopped)  # the global generator has no influence
    seen = []
    resumed = pretrain(checkpoints=tmp_path, checkpoint_every=2, on_step=lambda step: seen.append(step.step))
    assert seen[0] == stopped // 2 * 2 + 1
    assert same(whole, resumed)


def test_the_same_in_bfloat16(pretrain, tmp_path):
    whole = pretrain(autocast=True)
    with pytest.raises(Interrupted):
        pretrain(autocast=True, checkpoints=tmp_path, checkpoint_every=3, on_step=interrupt_after(4))
    assert same(whole, pretrain(autocast=True, checkpoints=tmp_path))
    assert not same(whole, pretrain(autocast=False))


def test_a_finished_run_is_not_run_again(pretrain, tmp_path):
    whole = pretrain(checkpoints=tmp_path)
    seen = []
    assert same(whole, pretrain(checkpoints=tmp_path, on_step=seen.append))
    assert not seen
    longer = pretrain(RECIPE.replace(steps=9), checkpoints=tmp_path, on_step=seen.append)
    assert [step.step for step in seen] == [8, 9]
    assert same(longer, pretrain(RECIPE.replace(steps=9)))


def test_the_last_two_checkpoints_are_kept(pretrain, tmp_path):
    pretrain(checkpoints=tmp_path, checkpoint_every=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest",
        "step-00000006.safetensors",
        "step-00000007.safetensors",
    ]
    assert (tmp_path / "latest").read_text() == "step-00000007.safetensors\n"
    pretrain(RECIPE.replace(steps=3), seed=9, checkpoints=tmp_path, resume=False)
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-00000003.safetensors"]


def test_checkpoints_of_another_run_are_refused(pretrain, tmp_path):
    pretrain(checkpoints=tmp_path)
    with pytest.raises(UsageError, match="seed 3 → 4"):
        pretrain(checkpoints=tmp_path, seed=4)
    with pytest.raises(UsageError, match="global batch 4 → 3"):
        pretrain(RECIPE.replace(batch_size=3), checkpoints=tmp_path)
    (tmp_path / "step-00000007.safetensors").write_bytes(b"torn")
    with pytest.raises(IntegrityError, match="step-00000007"):
        pretrain(checkpoints=tmp_path)


def test_a_step_can_be_inspected_and_sampled_from(model, pretrain, face):
    def inspect(step):
        if step.step == 2:
            domain = step.snapshot()
            tuned = tune(model, domain, face, TUNING.replace(steps=0))
            assert tuned.embedding(torch.zeros(1, 224)).shape == (1, 24)

    assert same(pretrain(on_step=inspect), pretrain())


def test_a_number_that_is_not_finite_stops_the_run(model, data, tmp_path):
    broken = dataclasses.replace(data, image_features=torch.full_like(data.image_features, torch.nan))
    with pytest.raises(DivergedError):
        pretrain_domain_with(model, broken, config=RECIPE, checkpoints=tmp_path, checkpoint_every=2)
    assert not list(tmp_path.iterdir())


def test_progress_is_reported(pretrain):
    events = []
    pretrain(RECIPE.replace(steps=12), on_progress=events.append)
    assert {event.stage for event in events} == {"pretrain"}
    assert [event.remark for event in events if event.remark] == [
        "learning rate 0.0004 = 0.0001 × batch 4 × 1 process"
    ]
    events = [event for event in events if event.total]
    assert [event.done for event in events] == [10, 12]
    assert events[0].values.keys() == {"loss", "diffusion", "penalty", "smoothed", "it/s"}
    first, second = (event.values["loss"] for event in events)
    assert events[0].values["smoothed"] == pytest.approx(first)
    assert min(first, second) < events[1].values["smoothed"] < max(first, second)


def test_a_wider_encoder(pretrain, tmp_path):
    from e4t_cli.models.domain_weights import DomainWeights

    domain = pretrain(RECIPE.replace(steps=2), hidden_width=48)
    domain.save(tmp_path)
    assert DomainWeights.load(tmp_path).encoder.config.hidden_width == 48


def test_detached_features_still_train_everything(pretrain):
    domain = pretrain(RECIPE.replace(steps=3), detach_features=True)
    assert max((left @ right).abs().max() for left, right in domain.offsets.values()) > 0
    assert not same(domain, pretrain(RECIPE.replace(steps=3)))


# ── the samples of a step ──


def test_every_image_once_an_epoch():
    seen = torch.cat([epoch_indices(0, step, range(4), 4, PICTURES) for step in range(3)]).tolist()
    assert sorted(seen[:PICTURES]) == sorted(seen[PICTURES:]) == list(range(PICTURES))
    assert seen[:PICTURES] != seen[PICTURES:]


def test_samples_are_a_function_of_their_place_in_the_batch(model, data):
    """However a batch is split, in whichever order its parts are requested."""
    paired = dataclasses.replace(data, encoder_index=torch.tensor([[i, (i + 1) % PICTURES] for i in range(PICTURES)]))

    def batches(config=RECIPE, size=None):
        token = model.descriptor_id("face")
        return Batches(model, paired, config, ("{}", "a {}", "the {}"), token, 1, size)

    for step in (3, 0):
        whole = batches().of(step)
        split = batches(RECIPE.replace(batch_size=2), 4)  # two processes of two
        parts = [split.of(step, places) for places in (range(2, 4), range(1), range(1, 2))]
        for field in ("z_0", "timesteps", "epsilon", "image_features"):
            put = torch.cat([getattr(parts[i], field) for i in (1, 2, 0)])
            assert torch.equal(put, getattr(whole, field)), field
        assert torch.equal(torch.cat([parts[i].tokens.ids for i in (1, 2, 0)]), whole.tokens.ids)


def test_every_step_has_its_own_noise_and_noise_levels(model, data):
    batches = Batches(model, data, RECIPE, ("{}",), model.descriptor_id("face"), 0)
    first, second = batches.of(0), batches.of(1)
    assert not torch.equal(first.epsilon, second.epsilon)
    assert not torch.equal(first.timesteps, second.timesteps)


def test_the_regularization_weight_is_applied(pretrain):
    """λ_r of eq. 5: with a large one the encoder's output stays small."""
    sizes = {}
    for weight in (0.0, 1000.0):
        norms = []
        pretrain(RECIPE.replace(reg_weight=weight), on_step=lambda step, norms=norms: norms.append(step.penalty))
        sizes[weight] = norms[-1].mean().item()
    assert 0 < sizes[1000.0] < 0.5 * sizes[0.0]


def test_another_image_of_the_same_concept_may_be_encoded(model, data):
    paired = dataclasses.replace(data, encoder_index=torch.tensor([[(i + 1) % PICTURES] for i in range(PICTURES)]))
    shown = Batches(model, paired, RECIPE, ("{}",), model.descriptor_id("face"), 0).of(0)
    index = epoch_indices(0, 0, range(4), 4, PICTURES)
    assert torch.equal(shown.image_features, data.image_features[(index + 1) % PICTURES].float())


def test_the_mask_is_used_only_if_the_config_sets_it(model, data):
    token = model.descriptor_id("face")
    plain = Batches(model, data, RECIPE, ("{}",), token, 0).of(0)
    masked = Batches(model, data, RECIPE.replace(mask=True), ("{}",), token, 0).of(0)
    assert plain.mask is None
    assert masked.mask.shape == (4, 8, 8)
    assert 0 < masked.mask.mean() < 1


def test_encoded_images_are_the_models_inputs(model, data, tmp_path):
    image, _ = drawn_face(2)
    pixels = model.pixels([image])
    torch.testing.assert_close(data.image_features[2].float(), model.image_features(pixels)[0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(data.means[2].float(), model.posterior(pixels).mean[0], atol=2e-3, rtol=2e-3)
    data.save(tmp_path / "faces.safetensors")
    again = EncodedImages.load(tmp_path / "faces.safetensors")
    assert again.fingerprint == data.fingerprint
    assert len(again) == PICTURES
    assert again.fingerprint != dataclasses.replace(data, masks=None).fingerprint


def test_nothing_to_train_on(model):
    with pytest.raises(InputError):
        encode_images(model, [])
