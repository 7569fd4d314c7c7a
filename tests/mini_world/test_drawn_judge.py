"""The judge: shapes, augmentation, and the accuracy of the shipped one."""

import torch

from mini_world.clip import ABSENT, HEAD_SIZES, HEADS, attribute_targets
from mini_world.data import load_drawings
from mini_world.judge import CONTEXT_NAMES, CONTEXT_SIZES, Judge, _augment, accuracy, classify
from mini_world.vae import to_pixels


def test_shapes():
    torch.manual_seed(0)
    judge = Judge(width=4).eval()
    pixels = torch.rand(3, 3, 64, 64) * 2 - 1
    attributes, context = judge(pixels)
    assert attributes.shape == (3, sum(HEAD_SIZES))
    assert context.shape == (3, sum(CONTEXT_SIZES))
    values, scene = classify(judge, pixels)
    assert values.shape == (3, len(HEADS))
    assert scene.shape == (3, len(CONTEXT_NAMES))
    assert (values < torch.tensor(HEAD_SIZES)).all()
    assert (scene < torch.tensor(CONTEXT_SIZES)).all()
    start = 0
    for column, size in enumerate(HEAD_SIZES):
        assert torch.equal(values[:, column], attributes[:, start : start + size].argmax(1))
        start += size


def test_degraded_images_are_still_images(drawings):
    from mini_world.evaluate import pixels_of

    pixels = pixels_of([drawing.image for drawing in drawings[:32]])
    kept = pixels.clone()
    worse = _augment(pixels, torch.Generator().manual_seed(1))
    assert torch.equal(pixels, kept)
    assert worse.shape == pixels.shape
    assert worse.dtype == pixels.dtype
    # Contrast of at most 1.15, and noise of at most 0.08.
    assert worse.abs().max() < 1.15 + 0.08 * 6
    assert worse.abs().quantile(0.99) < 1.25
    assert not torch.equal(worse, pixels)
    # Shifted by two pixels at most, and otherwise the same drawing.
    apart = [(torch.roll(worse, (dy, dx), (2, 3)) - pixels).abs().mean() for dy in range(-2, 3) for dx in range(-2, 3)]
    assert min(apart) < 0.12
    again = _augment(pixels, torch.Generator().manual_seed(1))
    assert torch.equal(again, worse)
    assert not torch.equal(_augment(pixels, torch.Generator().manual_seed(2)), worse)


def test_the_shipped_judge_reads_drawings_it_has_never_seen(judge, tmp_path):
    assert not any(weight.requires_grad for weight in judge.parameters())
    assert not judge.training
    fresh = load_drawings(tmp_path, "fresh", 200, seed=20_261, held_out=True)
    values, _ = classify(judge, to_pixels(torch.from_numpy(fresh.images)))
    targets = attribute_targets(fresh)
    right = int((values == targets).sum())
    found = accuracy(judge, fresh)
    assert right / int((targets != ABSENT).sum()) >= 0.85, found
    assert found["place"] >= 0.95, found
