"""Masks from prompts, with a CLIPSeg of the real classes and a few thousand random parameters."""

import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

from e4t_cli.errors import InputError, IntegrityError, WeightsUnavailable
from e4t_cli.hub.paths import HubAccess
from e4t_cli.images import preparation as segmenters
from e4t_cli.registry.domain import PreparationTarget
from tests.conftest import write_tokenizer


@pytest.fixture
def clipseg(tmp_path):
    """A tiny CLIPSeg in a folder as the hub has it."""
    segmenters._load_clipseg.cache_clear()
    folder = tmp_path / "clipseg"
    size = write_tokenizer(folder)
    torch.manual_seed(0)
    text = {
        "vocab_size": size,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "bos_token_id": size - 2,
        "eos_token_id": size - 1,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    config = CLIPSegConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=16,
        reduce_dim=8,
        extract_layers=[0, 1, 2],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    CLIPSegForImageSegmentation(config).save_pretrained(folder)
    plan = {"size": {"height": 48, "width": 48}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(plan))
    return folder


def target(folder):
    return PreparationTarget(size=64, base="mini", fetch=lambda repository: folder)


def test_a_mask_of_the_images_size_that_depends_on_image_and_prompt(clipseg, monkeypatch):
    monkeypatch.setattr(segmenters, "MIN_PROBABILITY", 0.5)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    masks = {}
    for words in ("a cat", "a dog", "a red hat"):
        mask = segmenters.mask_by_words(noise, words, target(clipseg))
        assert mask.mode == "L" and mask.size == noise.size
        assert set(mask.tobytes()) <= {0, 255}
        assert mask.tobytes() == segmenters.mask_by_words(noise, words, target(clipseg)).tobytes()
        masks[words] = mask.tobytes()
    # With random weights a mask can be all or nothing; the probabilities behind it differ.
    model, tokenizer, side, mean, deviation = segmenters._load_clipseg(clipseg, "cpu")
    assert (side, mean[0], deviation[0]) == (48, 0.5, 0.25)
    pixels = torch.zeros(1, 3, side, side)
    logits = [model(pixel_values=pixels, **tokenizer([words], return_tensors="pt")).logits
              for words in masks]  # fmt: skip
    assert not torch.equal(logits[0], logits[1])


def test_loaded_once(clipseg):
    image = Image.new("RGB", (32, 32))
    segmenters.mask_by_words(image, "a cat", target(clipseg))
    (clipseg / "config.json").unlink()
    segmenters.mask_by_words(image, "a dog", target(clipseg))
    assert segmenters._load_clipseg.cache_info().misses == 1


def test_files_that_do_not_fit(clipseg):
    from safetensors.torch import load_file, save_file

    tensors = load_file(clipseg / "model.safetensors")
    tensors.pop(next(key for key in tensors if key.startswith("decoder.layers.0")))
    save_file(tensors, clipseg / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="does not fit: decoder"):
        segmenters.mask_by_words(Image.new("RGB", (32, 32)), "a cat", target(clipseg))
    (clipseg / "model.safetensors").unlink()
    with pytest.raises(IntegrityError, match="cannot be used"):
        segmenters.mask_by_words(Image.new("RGB", (32, 32)), "a cat", target(clipseg))


def test_without_a_source_there_is_one_error():
    bare = PreparationTarget(size=64, base="mini")
    with pytest.raises(WeightsUnavailable, match="clipseg"):
        segmenters.mask_by_words(Image.new("RGB", (32, 32)), "a cat", bare)


def test_what_is_here_is_used_and_what_is_not_is_asked_about(monkeypatch, tmp_path):
    calls, terms, here = [], [], []

    def fetch_files(repository, revision, patterns, access, **options):
        calls.append((repository, revision, tuple(patterns), access.offline))
        if access.offline and not here:
            raise WeightsUnavailable("not here")
        return tmp_path

    def accept(requested, access):
        terms.append(requested)
        if not access.accept_license:
            raise WeightsUnavailable("not accepted")

    monkeypatch.setattr(segmenters, "fetch_files", fetch_files)
    monkeypatch.setattr(segmenters, "get_repo_info", lambda *arguments: None)
    monkeypatch.setattr(segmenters, "accept", accept)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    parser = "jonathandinu/face-parsing"
    unasked = segmenters.snapshot_downloader(HubAccess())
    for _ in range(3):
        with pytest.raises(WeightsUnavailable, match="not accepted"):
            unasked(parser)
    assert len(terms) == 1  # the failure is cached, for ten thousand images
    assert "research" in terms[0].note and terms[0].asks
    assert segmenters.snapshot_downloader(HubAccess(accept_license=True))(parser) == tmp_path
    assert calls[-1] == (parser, None, ("*.json", "*.safetensors"), False)
    with pytest.raises(WeightsUnavailable, match="not here"):
        segmenters.snapshot_downloader(HubAccess(offline=True, accept_license=True))(parser)
    here.append(True)
    assert segmenters.snapshot_downloader(HubAccess(offline=True))(segmenters.CLIPSEG) == tmp_path
    assert "merges.txt" in calls[-1][2] and len(terms) == 2


def test_other_errors_are_raised(monkeypatch):
    def fetch_files(*arguments, **options):
        raise InputError("odd")

    monkeypatch.setattr(segmenters, "fetch_files", fetch_files)
    with pytest.raises(InputError):
        segmenters.snapshot_downloader(HubAccess())("a/b")


def test_loads_in_two_threads_share_the_switch_of_the_progress_bars(tmp_path):
    from transformers.utils import logging

    shown, first_loads, first_may_end = [], threading.Event(), threading.Event()

    class Loader:
        @staticmethod
        def from_pretrained(folder, **_):
            if folder.name == "first":
                first_loads.set()
                assert first_may_end.wait(30)
            else:
                first_may_end.set()
                first.join(30)  # it began before this one, and ends before it
                shown.append(logging.is_progress_bar_enabled())
            return torch.nn.Identity(), {"missing_keys": [], "mismatched_keys": []}

    assert logging.is_progress_bar_enabled()
    first = threading.Thread(target=segmenters.load_segmenter, args=(Loader, tmp_path / "first", "first"))
    first.start()
    assert first_loads.wait(30)
    segmenters.load_segmenter(Loader, tmp_path / "second", "second")
    assert shown == [False]
    assert logging.is_progress_bar_enabled()
