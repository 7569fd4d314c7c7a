"""The VAE of the next base, its perceptual distance and its discriminator, at tiny lengths."""

import json

import numpy
import pytest
import torch

from mini_world.next import loop, perceptual, vae
from mini_world.next.data import load_drawings


@pytest.fixture(autouse=True)
def on_one_cpu(monkeypatch):
    for module in (loop, perceptual, vae):
        monkeypatch.setattr(module, "default_device", lambda: torch.device("cpu"))
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    return load_drawings(tmp_path_factory.mktemp("drawings"), "few", 12, processes=1)


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return perceptual.Classifier((8, 8, 8)).eval()


def pixels_of(drawings, count=4):
    return vae.to_pixels(torch.from_numpy(drawings.images[:count]))


def test_sizes():
    model = vae.build_vae()
    assert model.encode(torch.zeros(1, 3, 128, 128)).latent_dist.mean.shape == (1, 8, 16, 16)
    assert sum(p.numel() for p in model.parameters()) < 3e6
    assert vae.Discriminator()(torch.zeros(2, 3, 128, 128)).shape == (2, 1, 32, 32)


def test_a_new_vae_is_shallow_and_has_a_narrow_posterior():
    model = vae.build_vae()
    x = torch.randn(1, 128, 8, 8)
    block = model.decoder.mid_block.resnets[0]
    assert torch.equal(block(x, None), x)
    posterior = model.encode(torch.rand(1, 3, 64, 64)).latent_dist
    assert posterior.std.max() < 0.2


def test_the_terms_of_the_reconstruction():
    pixels = torch.rand(2, 3, 16, 16)
    assert all(value == 0 for value in vae.reconstruction_losses(pixels, pixels).values())
    shifted = {k: v.item() for k, v in vae.reconstruction_losses(pixels + 0.5, pixels).items()}
    assert shifted == pytest.approx({"l1": 0.5, "mse": 1.5, "edges": 0.0, "wide": 0.5}, abs=1e-6)
    weights = torch.zeros(2, 1, 16, 16)
    weights[..., :8, :] = 2.0
    error = torch.zeros_like(pixels)
    error[..., 9:, :] = 1.0  # outside of what counts
    terms = vae.reconstruction_losses(pixels + error, pixels, weights)
    assert terms["l1"].item() == pytest.approx(0, abs=1e-6) and terms["mse"].item() == pytest.approx(0, abs=1e-6)


def test_the_perceptual_distance(drawings, classifier):
    pixels = pixels_of(drawings)
    assert perceptual.perceptual_distance(classifier, pixels, pixels).item() == 0
    noisy = pixels + 0.1 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    noisier = pixels + 0.5 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    near, far = (perceptual.perceptual_distance(classifier, one, pixels).item() for one in (noisy, noisier))
    assert 0 < near < far
    decoded = noisy.requires_grad_(True)
    wanted = pixels.clone().requires_grad_(True)
    perceptual.perceptual_distance(classifier, decoded, wanted).backward()
    assert decoded.grad.abs().max() > 0 and wanted.grad is None


def test_the_classifier_is_told_what_drawings_show(drawings):
    targets = perceptual.targets_of(drawings)
    assert targets.shape == (12, len(perceptual.SIZES))
    for row in range(12):
        present = targets[row] != perceptual.ABSENT
        who = drawings.identity(row)
        assert present.sum() == 6 + (len(who.values) if who else 0)
        assert (targets[row][present] < torch.tensor(perceptual.SIZES)[present]).all()
    logits = torch.zeros(12, sum(perceptual.SIZES), requires_grad=True)
    loss = perceptual.classification_loss(logits, targets)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_the_adaptive_weight_makes_gradients_equal():
    layer = torch.nn.Conv2d(2, 1, 1)
    out = layer(torch.rand(1, 2, 4, 4))
    one, other = out.pow(2).mean(), 0.01 * out.mean()
    weight = vae.adaptive_weight(one, other, layer.weight)
    wanted, found = (torch.autograd.grad(loss, layer.weight, retain_graph=True)[0] for loss in (one, weight * other))
    assert found.norm().item() == pytest.approx(wanted.norm().item(), rel=0.1)
    assert not weight.requires_grad


def test_the_discriminator_tells_noise_from_drawings(drawings):
    torch.manual_seed(0)
    model = vae.Discriminator(8)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    real = pixels_of(drawings)[..., 32:96, 32:96]
    for _ in range(12):
        loss = vae.hinge_loss(model(real), model(torch.randn_like(real)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5 < vae.hinge_loss(torch.zeros(1), torch.zeros(1))


def test_both_stages_train_and_the_second_leaves_latents_alone(tmp_path, drawings, classifier, monkeypatch):
    monkeypatch.setitem(vae.VAE_CONFIG, "block_out_channels", (16, 16, 16, 16))
    monkeypatch.setattr(loop, "LOG_EVERY", 4)
    monkeypatch.setattr(vae, "HEAD_START", 4)
    model = vae.train_vae(tmp_path, drawings, classifier, crop_steps=16, whole_steps=4, batch=1, crop=32)
    lines = [json.loads(line) for line in (tmp_path / "vae.jsonl").read_text().splitlines()]
    assert lines[3]["l1"] < lines[0]["l1"]
    assert "perceptual" in lines[4] and "perceptual" not in lines[3]
    assert model.config.scaling_factor != 0.18215
    images = torch.from_numpy(numpy.array(drawings.images[:8]))
    encoded = vae.encode_images_to_latents(model, images)
    assert encoded.shape == (8, 16, 16, 16) and encoded.dtype == torch.float16
    before = {name: value.clone() for name, value in model.state_dict().items()}
    vae.train_decoder(tmp_path, model, drawings, encoded, classifier, steps=16, batch=1, adversarial_from=4)
    lines = [json.loads(line) for line in (tmp_path / "decoder.jsonl").read_text().splitlines()]
    assert "discriminator" in lines[1] and "adversarial" not in lines[1] and "adversarial" in lines[-1]
    for name, value in model.state_dict().items():
        changed = not torch.equal(value, before[name])
        assert changed == name.startswith(("decoder.", "post_quant_conv."))
    found = vae.reconstruction_psnr(model, drawings.select(slice(8)))
    assert found.keys() == {"psnr", "psnr on subjects"} and min(found.values()) > 5


def test_the_reconstruction_error_in_decibels(drawings, monkeypatch):
    few = drawings.select(slice(4))
    monkeypatch.setattr(vae, "reconstruct", lambda _, images: vae.to_pixels(images) + 0.2)
    assert vae.reconstruction_psnr(None, few) == {"psnr": 20.0, "psnr on subjects": 20.0}
