"""The head mask, with parsers made here: tiny SegFormers that paint by brightness."""

import pytest
import torch
from PIL import Image
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from e4t_cli import IntegrityError, PreparationTarget, find_domain
from e4t_cli.images import prepare_image
from e4t_domains import face as module

TARGET = PreparationTarget(size=64, base="mini")
NAMES = {0: "background", 1: "shirt", 2: "hair"}


def parser(folder, names=NAMES, chosen=None):
    """Save a random parser; `chosen` makes it answer that label everywhere."""
    torch.manual_seed(0)
    config = SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 8, 8],
        decoder_hidden_size=8,
        num_attention_heads=[1, 1, 1, 1],
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    model = SegformerForSemanticSegmentation(config)
    if chosen is not None:
        with torch.no_grad():
            model.decode_head.classifier.weight.zero_()
            model.decode_head.classifier.bias.copy_(torch.eye(len(names))[chosen])
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def fresh():
    module._load_parser.cache_clear()


@pytest.mark.parametrize(("label", "covered"), [(2, True), (1, False), (0, False)])
def test_labels_are_read_by_name(tmp_path, monkeypatch, label, covered):
    monkeypatch.setitem(module.PARSERS, "mini", parser(tmp_path, chosen=label))
    prepared = prepare_image(find_domain("face"), Image.new("RGB", (90, 70), "tan"), TARGET)
    if covered:
        assert prepared.mask.getextrema() == (255, 255)
        assert prepared.mask.size == prepared.image.size == (64, 64)
        assert prepared.notes == ()
    else:
        assert prepared.mask is None
        assert prepared.notes == ("no face was found: the whole picture counts in tuning",)


def test_the_mask_is_the_size_of_the_picture_and_binary(tmp_path):
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    mask = module.head_mask(noise, parser(tmp_path))
    assert mask.mode == "L"
    assert set(mask.tobytes()) <= {0, 255}
    again = module.head_mask(noise, tmp_path)
    assert mask.tobytes() == again.tobytes()


def test_without_a_parser_there_is_a_note(monkeypatch, tmp_path):
    monkeypatch.setitem(module.PARSERS, "mini", tmp_path / "not-there")
    for base in ("mini", "sd14"):
        target = PreparationTarget(size=64, base=base)
        prepared = module.prepare(Image.new("RGB", (90, 70)), target)
        assert prepared.mask is None
        assert base in prepared.notes[0]
    bare = module.prepare(
        Image.new("RGB", (90, 70)), PreparationTarget(size=64, base="m", mask=None)
    )
    assert (bare.mask, bare.notes) == (None, ())


def test_a_parser_that_does_not_fit_is_refused(tmp_path):
    picture = Image.new("RGB", (64, 64))
    other = parser(tmp_path / "other", names={0: "sky", 1: "sea"})
    with pytest.raises(IntegrityError, match="no part of a head"):
        module.head_mask(picture, other)
    lame = parser(tmp_path / "lame")
    from safetensors.torch import load_file, save_file

    tensors = load_file(lame / "model.safetensors")
    tensors.popitem()
    save_file(tensors, lame / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="does not fit"):
        module.head_mask(picture, lame)


def test_the_parser_of_mini_is_in_the_package():
    assert (module.PARSERS["mini"] / "config.json").is_file()
    assert (module.PARSERS["mini"] / "model.safetensors").is_file()
