"""The training loop of `mini`: stopped or not, the same weights."""

import json

import pytest
import torch
from torch import nn

from mini_world import base, loop, vae
from mini_world.data import SUBJECTS, load_drawings
from mini_world.text import build_text_encoder, build_tokenizer


class Stopped(Exception):
    """Raised to end a training from outside."""


@pytest.fixture(autouse=True)
def on_one_cpu(monkeypatch):
    for module in (base, loop, vae):
        monkeypatch.setattr(module, "default_device", lambda: torch.device("cpu"))
    monkeypatch.delenv("RANK", raising=False)


def run(folder, *, steps=120, stop=None, average=0.9, seen=None, **options):
    """Train a tiny layer on noise; returns it as `train` leaves it."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)

    def loss_of_step(step, generator):
        if step == stop:
            raise Stopped
        x = torch.randn(8, 4, generator=generator)
        if seen is not None:
            seen.append((x, layer.weight.detach().clone()))
        error = layer(x) - x[:, :3].cumsum(1)
        return {"square": error.pow(2).mean(), "small": 1e-3 * layer.weight.pow(2).sum()}

    # A state is written whenever a line of the log is: every 50 steps.
    loop.train(
        "tiny", folder, {"layer": layer}, loss_of_step, steps=steps, learning_rate=1e-2,
        warm_up=20, average=average, save_every_seconds=-1.0, **options,
    )  # fmt: skip
    return layer


def state_of(folder):
    return torch.load(folder / "tiny.pt", weights_only=True)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("average", [None, 0.9])
def test_a_stopped_training_ends_where_an_unbroken_one_does(tmp_path, average):
    whole = run(tmp_path / "whole", average=average)
    for stop in (70, 104):
        with pytest.raises(Stopped):
            run(tmp_path / "broken", average=average, stop=stop)
    assert state_of(tmp_path / "broken")["step"] == 100
    resumed = run(tmp_path / "broken", average=average)
    assert same(whole, resumed)
    one, other = state_of(tmp_path / "whole"), state_of(tmp_path / "broken")
    for key, value in one["modules"].items():
        assert torch.equal(value, other["modules"][key])
    for number, moments in one["optimiser"]["state"].items():
        for key, value in moments.items():
            assert torch.equal(value, other["optimiser"]["state"][number][key])
    steps = [json.loads(line)["step"] for line in (tmp_path / "broken" / "tiny.jsonl").open()]
    assert steps == [50, 100]


def test_every_step_samples_its_own_batch_reproducibly(tmp_path):
    first, second = [], []
    run(tmp_path / "first", steps=5, seen=first)
    run(tmp_path / "second", steps=5, seen=second)
    batches = [x for x, _ in first]
    assert all(torch.equal(a, b) for a, (b, _) in zip(batches, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(batches, batches[1:], strict=False))


def test_the_average_is_what_is_returned(tmp_path):
    seen = []
    layer = run(tmp_path, steps=4, seen=seen)
    weights = [weight for _, weight in seen]
    last = state_of(tmp_path)["modules"]["layer.weight"]
    smooth = weights[0]
    for step, weight in enumerate([*weights[1:], last]):
        decay = min(0.9, (step + 1) / (step + 10))
        smooth = smooth * decay + weight * (1 - decay)
    torch.testing.assert_close(layer.weight.detach(), smooth)
    assert not torch.allclose(layer.weight, last, atol=1e-5)
    # And again, once everything is done.
    assert same(layer, run(tmp_path, steps=4))


def test_without_an_average_the_last_weights_are(tmp_path):
    layer = run(tmp_path, steps=4, average=None)
    assert torch.equal(layer.weight, state_of(tmp_path)["modules"]["layer.weight"])
    assert not layer.training


def test_it_learns_and_leaves_frozen_weights_alone(tmp_path):
    run(tmp_path, steps=300, average=None)
    lines = [json.loads(line) for line in (tmp_path / "tiny.jsonl").open()]
    assert lines[-1]["square"] < 0.5 * lines[0]["square"]
    frozen, free = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)
    before = frozen.weight.clone()

    def loss_of_step(step, generator):
        x = torch.randn(4, 2, generator=generator)
        return {"loss": (free(frozen(x)) - x).pow(2).mean()}

    modules = {"frozen": frozen, "free": free}
    options = {"steps": 3, "learning_rate": 1e-2, "average": 0.5}
    assert loop.train("two", tmp_path, modules, loss_of_step, **options) is modules
    assert torch.equal(frozen.weight, before)


def test_every_stage_can_be_run():
    from mini_world import stages
    from mini_world.__main__ import STAGES

    assert all(callable(getattr(stages, f"run_{name}")) for name in STAGES)
    assert {name for name in vars(stages) if name.startswith("run_")} == {f"run_{name}" for name in STAGES}


@pytest.mark.parametrize("text_encoder_lr", [0.0, 1e-3])
def test_the_text_encoder_trains_with_the_denoiser_on_request(tmp_path, text_encoder_lr):
    """The embedding table is never trained: personalization writes into it."""
    drawings = load_drawings(tmp_path, "some", 6, seed=4)
    tokenizer = build_tokenizer(tmp_path / "tokenizer")
    torch.manual_seed(0)
    unet, text_encoder = base.build_unet(), build_text_encoder(tokenizer)
    # The output starts at zero, and nothing behind a zero learns in the first step.
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    for name, weight in unet.named_parameters():
        if name.endswith("proj_out.weight"):
            torch.nn.init.normal_(weight, std=0.1)
    before = {name: weight.detach().clone() for name, weight in text_encoder.named_parameters()}
    first = unet.conv_in.weight.detach().clone()
    base.train_unet(
        tmp_path, unet, drawings, torch.zeros(6, 8, 16, 16), 1.0, tokenizer, text_encoder,
        name="few", seed=0, steps=10, learning_rate=1e-3, text_encoder_lr=text_encoder_lr,
        batch=2, captions_per_image=2,
    )  # fmt: skip
    assert not torch.equal(unet.conv_in.weight, first)
    moved = {n for n, w in text_encoder.named_parameters() if not torch.equal(w, before[n])}
    layers = {name for name in before if "embedding" not in name}
    assert moved <= layers
    # A key's bias changes no softmax, so it may be left where it was.
    assert {name for name in layers if "k_proj.bias" not in name} <= moved or not text_encoder_lr
    assert bool(moved) == bool(text_encoder_lr)


def test_the_decoder_is_trained_further_alone(tmp_path):
    """Latents keep their meaning: whatever was trained on them stays valid."""
    drawings = load_drawings(tmp_path, "some", 4, seed=4)
    torch.manual_seed(0)
    whole = vae.AutoencoderKL(**vae.CONFIG)
    encoded = vae.encode_images_to_latents(whole, torch.from_numpy(drawings.images))
    before = {name: weight.detach().clone() for name, weight in whole.named_parameters()}
    vae.train_decoder(tmp_path, whole, drawings, encoded, steps=2, batch=2)
    moved = {name for name, weight in whole.named_parameters() if not torch.equal(weight, before[name])}
    assert moved
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in moved)
    assert torch.equal(vae.encode_images_to_latents(whole, torch.from_numpy(drawings.images)), encoded)


def test_some_subjects_are_sampled_twice(tmp_path):
    drawings = load_drawings(tmp_path, "shown", 40, seed=5)
    dogs = [row for row, fact in enumerate(drawings.facts[:, 0]) if SUBJECTS[fact] == "dog"]
    assert dogs
    assert base.oversampled_rows(drawings, ()).tolist() == list(range(40))
    assert base.oversampled_rows(drawings, ("dog",)).tolist() == [*range(40), *dogs]


def test_a_fault_counts_where_the_weights_are():
    generator = torch.Generator().manual_seed(0)
    pixels, decoded = torch.rand(2, 2, 3, 16, 16, generator=generator)
    ones, half = torch.ones(2, 1, 16, 16), torch.ones(2, 1, 16, 16)
    half[..., 8:] = 0
    plain = vae._reconstruction_losses(decoded, pixels)
    for name, fault in vae._reconstruction_losses(decoded, pixels, ones).items():
        torch.testing.assert_close(fault, plain[name])
    decoded[..., :9] = pixels[..., :9]  # and the edge on the border is right on its left
    left = vae._reconstruction_losses(decoded, pixels, half)
    assert left["l1"] == left["mse"] == left["edges"] == 0
    assert vae._reconstruction_losses(decoded, pixels, 1 - half)["l1"] > 0


def test_the_loss_on_subjects_is_reported_separately(tmp_path):
    drawings = load_drawings(tmp_path, "told", 4, seed=4)
    torch.manual_seed(0)
    found = vae.reconstruction_psnr(vae.AutoencoderKL(**vae.CONFIG), drawings)
    assert set(found) == {"psnr", "psnr on subjects"}
    assert found["psnr"] != found["psnr on subjects"]
