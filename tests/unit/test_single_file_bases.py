"""A base that is one file: what it is, what it lacks, and that its conversion is the folder of the same weights."""

import json
import os
import shutil
import time

import open_clip
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from e4t_cli.errors import IntegrityError, UsageError, WeightsUnavailable
from e4t_cli.hub import cache
from e4t_cli.hub import single_file as names
from e4t_cli.hub.bases import find_base, hub_location
from e4t_cli.hub.paths import user_cache
from e4t_cli.hub.resolve import find_cached_base, is_cached, look_up_base
from e4t_cli.hub.single_file import find_converted, is_file_name, list_converted_files, recognize_file
from e4t_cli.models import single_file
from e4t_cli.models.fingerprints import differing_parts, weights_fingerprint
from e4t_cli.models.loading import empty_part, load_part
from e4t_cli.models.single_file import CONFIGS, KINDS, convert_file, write_tensors, write_tokenizer
from tests.single_files import write_small_file

ONE, TWO, FOUR = torch.zeros(1), torch.zeros(2, 3), torch.zeros(2, 9, 1, 1)
UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_small_file(tmp_path_factory.mktemp("single"))


@pytest.fixture
def small(written, monkeypatch, tmp_path):
    monkeypatch.setenv("E4T_CACHE_DIR", str(tmp_path / "cache"))
    written.accept(monkeypatch)
    return written


# ── other files ──

TENSORS = {
    "a LoRA": ["lora_unet_down_blocks_0.lora_down.weight", "unet.down_blocks.0.attn1.to_q.lora_A.weight",
               "unet.x.processor.to_q_lora.down.weight", "lora_unet_x.hada_w1_a", "lora_unet_x.lokr_w1"],
    "a textual inversion": ["emb_params", "<cat-toy>", "clip_g", "my-word"],
    "a ControlNet": ["control_model.time_embed.0.weight", "controlnet_cond_embedding.conv_in.weight"],
    "a Stable Diffusion XL": ["conditioner.embedders.1.model.ln_final.bias", f"{UNET}label_emb.0.0.weight",
                              "add_embedding.linear_1.weight"],
    "a Stable Diffusion 3": ["model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"],
    "a Flux": ["double_blocks.0.img_attn.norm.key_norm.scale", f"{UNET}double_blocks.0.img_attn.qkv.weight"],
    "another kind of model": [f"{UNET}blocks.0.attn.weight", "transformer_blocks.0.attn.to_q.weight"],
    "an IP-Adapter": ["image_proj.proj.weight"],
    "a motion module": ["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"],
    "a VAE": ["encoder.conv_in.weight", "first_stage_model.decoder.conv_in.weight"],
    "a text encoder": ["text_model.embeddings.token_embedding.weight", "cond_stage_model.model.ln_final.bias"],
    "the U-Net of a folder": ["down_blocks.0.resnets.0.conv1.weight"],
    "no model that e4t knows": ["what.ever"],
}  # fmt: skip
BYTES = {
    "a picture": b"\x89PNG\r\n\x1a\n" + b"\0" * 99,
    "a checkpoint of pickles": b"PK\x03\x04" + b"\0" * 99,
    "a quantized model (GGUF)": b"GGUF\3\0\0\0" + b"\0" * 99,
    "a web page": b"<!DOCTYPE html><html>",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "no safetensors file": b"hello",
    "empty": b"",
    "damaged: it does not begin": (1 << 60).to_bytes(8, "little") + b'{"a"',
}


def refused(path, says, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(IntegrityError) as caught:
        recognize_file(path)
    assert caught.value.exit_code == 5 and caught.value.hint
    assert f"{path.name} is {says}" in caught.value.message
    with pytest.raises(IntegrityError):
        find_base(path)
    with pytest.raises(IntegrityError):
        look_up_base(str(path))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("says", "key"), [(says, key) for says, keys in TENSORS.items() for key in keys])
def test_other_safetensors_are_named(says, key, tmp_path):
    value = torch.zeros(2, 768) if key == "my-word" else ONE[None, None, None]
    save_file({key: value}, tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", says, tmp_path)


@pytest.mark.parametrize(("says", "data"), BYTES.items())
def test_other_files_are_named(says, data, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(data)
    refused(tmp_path / "model.safetensors", says, tmp_path)


def test_pickles_are_named_by_their_suffix_too(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"anything")
    refused(tmp_path / "model.ckpt", "a checkpoint of pickles", tmp_path)


def test_a_concept_is_named(tmp_path):
    save_file({"image": ONE}, tmp_path / "me.safetensors", {"e4t": "{}"})
    refused(tmp_path / "me.safetensors", "a concept of e4t", tmp_path)


@pytest.mark.parametrize(("channels", "says"), [(9, "a model for inpainting"), (8, "a model for editing"), (5, "an")])
def test_other_inputs_of_the_u_net_are_named(small, tmp_path, channels, says):
    path = small.save(tmp_path / "x.safetensors", **{f"{UNET}input_blocks.0.0.weight": torch.zeros(4, channels, 3, 3)})
    refused(path, says, tmp_path)


def test_a_file_cut_short_is_named(small, tmp_path):
    data = small.file.read_bytes()
    for length in (len(data) - 1, len(data) // 2, 5000, 9):
        (tmp_path / "x.safetensors").write_bytes(data[:length])
        refused(tmp_path / "x.safetensors", "damaged", tmp_path)


def test_a_part_of_a_folder_names_the_folder(small):
    with pytest.raises(IntegrityError) as caught:
        recognize_file(small.folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    assert caught.value.hint == f"--base {small.folder}"


@pytest.mark.parametrize(("part", "prefix"), [("VAE", "first_stage_model."), ("text encoder", "cond_stage_model.")])
def test_a_file_without_a_part_says_which(small, tmp_path, part, prefix):
    path = small.save(tmp_path / "x.safetensors", without=prefix)
    with pytest.raises(IntegrityError, match=f"has no {part}") as caught:
        recognize_file(path)
    assert caught.value.hint


def test_another_width_and_another_dtype_are_refused(small, tmp_path):
    other = small.save(tmp_path / "x.safetensors", **{names.CONTEXT: torch.zeros(2, 5)})
    with pytest.raises(IntegrityError, match="words of 5 values"):
        recognize_file(other)
    other = small.save(tmp_path / "x.safetensors", **{names.CONTEXT: torch.zeros(2, 32, dtype=torch.float8_e4m3fn)})
    with pytest.raises(IntegrityError, match="stored in F8_E4M3"):
        recognize_file(other)


# ── names that are paths ──


def test_a_file_is_never_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    assert hub_location("owner/model") is not None
    (tmp_path / "owner" / "model").write_bytes(b"hello")
    for name in ("owner/model", "owner/none.safetensors", "owner/none.ckpt", "none.SAFETENSORS"):
        assert hub_location(name) is None and is_file_name(name)
    with pytest.raises(IntegrityError, match="owner/model is no safetensors"):
        find_base("owner/model")
    for name in ("owner/none.safetensors", "none.ckpt", "./none.safetensors"):
        with pytest.raises(UsageError, match="does not exist"):
            find_base(name)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(UsageError, match="not a file"):
        find_base("pipe.safetensors")


# ── the conversion ──


def test_it_is_the_folder_of_the_same_weights(small):
    file = recognize_file(small.file)
    assert (file.version, file.prediction_type, file.has_ema) == ("1", "", False)
    converted = convert_file(file)
    for part, kind in KINDS.items():
        own, other = (load_part(kind, root / part, "cpu", torch.float16) for root in (converted.folder, small.folder))
        for key, value in other.state_dict().items():
            assert torch.equal(own.state_dict()[key], value), key
        with safe_open(next((converted.folder / part).glob("*.safetensors")), "pt") as stored:
            assert {str(stored.get_slice(key).get_dtype()) for key in stored.keys()} == {"F16"}  # noqa: SIM118
    recorded = weights_fingerprint(small.folder)
    base = find_base(small.file)
    assert (base.name, base.resolution, base.folder) == ("model", 64, converted.folder)
    assert recorded == weights_fingerprint(base.folder) and differing_parts(base, recorded) == []


def test_old_names_and_float32(small, tmp_path):
    older = {
        key.replace(".transformer.text_model.", ".transformer."): value.float() for key, value in small.state.items()
    }
    save_file(older, tmp_path / "older.safetensors")
    converted = convert_file(recognize_file(tmp_path / "older.safetensors"))
    assert weights_fingerprint(converted.folder) == weights_fingerprint(small.folder)
    with safe_open(converted.folder / "text_encoder" / "model.safetensors", "pt") as stored:
        assert {str(stored.get_slice(key).get_dtype()) for key in stored.keys()} == {"F32"}  # noqa: SIM118


def test_averaged_weights_beside_the_plain_ones(small, tmp_path):
    path = small.save(tmp_path / "x.safetensors", **{"model_ema.input_blocks00weight": TWO, "model_ema.decay": ONE})
    assert recognize_file(path).has_ema
    assert weights_fingerprint(convert_file(recognize_file(path)).folder) == weights_fingerprint(small.folder)


def every_part(state):
    """One key of each part, and each of the text encoder's kinds."""
    text = "cond_stage_model.transformer.text_model."
    yield from (f"{UNET}input_blocks.1.1.proj_in.bias", f"{UNET}input_blocks.3.0.op.weight", f"{UNET}out.2.bias")
    yield from ("first_stage_model.quant_conv.bias", "first_stage_model.encoder.down.0.downsample.conv.weight")
    yield from ("first_stage_model.decoder.mid.attn_1.q.weight", f"{text}final_layer_norm.weight")
    yield from (f"{text}encoder.layers.3.mlp.fc1.weight", f"{text}embeddings.position_embedding.weight")


@pytest.mark.parametrize("key", list(every_part({})))
def test_one_missing_weight_is_refused(small, tmp_path, key):
    """diffusers 0.42 loads a file that lacks one of the text encoder, which then gives any picture."""
    assert key in small.state
    path = small.save(tmp_path / "x.safetensors", without=key)
    with pytest.raises(IntegrityError, match="lacks [12] of|is damaged"):
        convert_file(recognize_file(path))
    assert not list_converted_files() and not list((user_cache() / "single-files").glob("*"))


def test_another_shape_is_refused(small, tmp_path):
    path = small.save(tmp_path / "x.safetensors", **{"first_stage_model.quant_conv.bias": torch.zeros(3)})
    with pytest.raises(IntegrityError, match=r"quant_conv.bias is \(3,\) of torch.float32, not \(8,\)"):
        convert_file(recognize_file(path))


def test_it_is_converted_once(small, tmp_path, monkeypatch):
    first = convert_file(recognize_file(small.file))
    stages = []
    assert convert_file(recognize_file(small.file), stages.append).folder == first.folder and not stages
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(small.file.read_bytes())
    assert find_converted(str(copy)) is None and look_up_base(str(copy)) == ("copy", 512, True)
    assert find_cached_base(str(copy)) is None and is_cached(str(copy))
    with pytest.raises(WeightsUnavailable, match="not converted yet"):
        find_base(copy)
    monkeypatch.setattr(single_file, "_write_parts", None)
    assert convert_file(recognize_file(copy)).folder == first.folder  # the same bytes
    assert find_converted(str(copy)).folder == first.folder
    copy.write_bytes(copy.read_bytes() + b"\0")
    assert find_converted(str(copy)) is None


def test_a_name_stands_for_one_conversion(small, tmp_path):
    first = convert_file(recognize_file(small.file))
    (tmp_path / "other").mkdir()
    other = small.save(tmp_path / "other" / "model.safetensors", **{f"{UNET}out.2.bias": torch.ones(4)})
    second = convert_file(recognize_file(other))
    assert second.name == f"model-{names.sha256_of(other)[:8]}" and second.folder != first.folder
    for one in (first, second):
        assert find_base(one.name).folder == one.folder and look_up_base(one.name)[0] == one.name
    sd15 = convert_file(
        recognize_file(small.save(tmp_path / "SD15.safetensors", **{f"{UNET}out.2.bias": torch.ones(4) * 2}))
    )
    assert sd15.name == "file-sd15"


def test_a_conversion_whose_weights_were_deleted_is_made_again(small):
    folder = convert_file(recognize_file(small.file)).folder
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert find_converted(str(small.file)) is None
    convert_file(recognize_file(small.file))
    assert weights_fingerprint(folder) == weights_fingerprint(small.folder)


def test_the_cache_lists_and_prunes_it(small, tmp_path):
    path = small.save(tmp_path / "mine.safetensors")
    folder = convert_file(recognize_file(path)).folder
    item = next(item for item in cache.list_cache() if item.kind == "converted base")
    assert (item.name, item.path) == ("mine", folder) and item.size > path.stat().st_size * 0.9
    assert not cache.prunable()
    past = time.time() - cache.GIVEN_UP_SECONDS - 1
    os.utime(folder / names.SOURCE, (past, past))
    assert [item.path for item in cache.prunable()] == [folder]
    path.rename(tmp_path / "away.safetensors")
    assert not cache.prunable()  # it could not be made again
    cache.remove(cache.find_items("mine")[0])
    assert not folder.exists() and not list_converted_files()


@pytest.mark.parametrize("text", ["[]", "{", "", '{"name": 3}', '{"format": 1}'])
def test_a_damaged_record_counts_as_none(small, text):
    folder = convert_file(recognize_file(small.file)).folder
    (folder / names.SOURCE).write_text(text)
    assert find_converted(str(small.file)) is None
    assert weights_fingerprint(convert_file(recognize_file(small.file)).folder) == weights_fingerprint(small.folder)
    assert find_converted(str(small.file)).folder == folder


# ── settings ──


def test_the_vocabulary_is_that_of_clip(tmp_path):
    write_tokenizer(tmp_path)
    for version in "12":
        (tmp_path / "tokenizer_config.json").write_bytes(
            (CONFIGS / version / "tokenizer" / "tokenizer_config.json").read_bytes()
        )
        tokenizer, theirs = CLIPTokenizer.from_pretrained(tmp_path), open_clip.SimpleTokenizer()
        assert (len(tokenizer), tokenizer.model_max_length) == (49_408, 77)
        assert tokenizer.pad_token_id == {"1": 49_407, "2": 0}[version]
        for text in ("a photo of a cat", "it's 3 o'clock", "café naïve", "日本語", "🦊 fox", "S* as an astronaut"):
            assert tokenizer(text).input_ids == [49_406, *theirs.encode(text), 49_407]
    published = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert [published[word] for word in ("!", "a</w>", "the</w>", "cat</w>", "<|endoftext|>")] == [
        0,
        320,
        518,
        2368,
        49_407,
    ]


@pytest.mark.parametrize(("version", "counts"), [("1", (686, 248, 196)), ("2", (686, 248, 372))])
def test_the_configs_are_those_of_the_published_models(version, counts):
    """The numbers of weights of Stable Diffusion 1.4 and 2.1."""
    parts = {part: empty_part(kind, CONFIGS / version / part, torch.float16) for part, kind in KINDS.items()}
    found = [[key for key in one.state_dict() if "position_ids" not in key] for one in parts.values()]
    assert tuple(map(len, found)) == counts
    millions = [round(sum(weight.numel() for weight in one.parameters()) / 1e6, 1) for one in parts.values()]
    assert millions == {"1": [859.5, 83.7, 123.1], "2": [865.9, 83.7, 340.4]}[version]


def test_stable_diffusion_2_under_the_names_of_open_clip(small, tmp_path, monkeypatch):
    """Its text encoder has joined projections there, and one layer more than is used."""
    source = CLIPTextModel.from_pretrained(small.folder / "text_encoder", variant="fp16", dtype=torch.float16)
    prefix, found = "cond_stage_model.model.", {}
    for key, value in source.state_dict().items():
        name = key.removeprefix("text_model.")
        for theirs, ours in (("encoder.layers.", "transformer.resblocks."), ("embeddings.token", "token"),
                             ("embeddings.position_embedding.weight", "positional_embedding"),
                             ("final_layer_norm", "ln_final"), ("layer_norm", "ln_"), ("self_attn", "attn"),
                             ("fc1", "c_fc"), ("fc2", "c_proj")):  # fmt: skip
            name = name.replace(theirs, ours)
        found[f"{prefix}{name}"] = value
    for layer in range(12):
        attention = f"{prefix}transformer.resblocks.{layer}.attn."
        for kind in ("weight", "bias"):
            joined = [found.pop(f"{attention}{one}_proj.{kind}") for one in "qkv"]
            found[f"{attention}in_proj_{kind}"] = torch.cat(joined)
    rest = {key: value for key, value in small.state.items() if not key.startswith("cond_stage_model.")}
    extra = {f"{prefix}text_projection": torch.zeros(32, 32), f"{prefix}logit_scale": ONE}
    save_file({**rest, **found, **extra}, tmp_path / "two.safetensors")
    converted = convert_file(recognize_file(tmp_path / "two.safetensors"))
    assert weights_fingerprint(converted.folder) == weights_fingerprint(small.folder)


@pytest.mark.parametrize(
    ("stated", "predicts"), [("v", "v_prediction"), ("epsilon", "epsilon"), ("", "measured"), ("odd", "measured")]
)
def test_what_stable_diffusion_2_predicts(small, tmp_path, monkeypatch, stated, predicts):
    monkeypatch.setitem(names.VERSIONS, 32, "2")
    monkeypatch.setattr(single_file, "CONFIGS", tmp_path / "configs")
    shutil.copytree(small.configs / "1", tmp_path / "configs" / "2")
    monkeypatch.setattr(single_file, "_measured_prediction", lambda folder: "measured")
    save_file(small.state, tmp_path / "two.safetensors", {"modelspec.prediction_type": stated} if stated else None)
    folder = convert_file(recognize_file(tmp_path / "two.safetensors")).folder
    schedule = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert schedule["prediction_type"] == predicts
    assert find_base(tmp_path / "two.safetensors").resolution == (768 if stated == "v" else 64)


@pytest.mark.parametrize(("offset", "predicts"), [(0.0, "epsilon"), (-3.0, "v_prediction")])
def test_the_u_net_itself_tells_what_it_predicts(monkeypatch, offset, predicts, tmp_path):
    class UNet:
        config = {"cross_attention_dim": 4}

        def __call__(self, x, t, context):
            assert x.shape == (1, 4, 8, 8) and int(t) == 999 and context.shape == (1, 2, 4)
            return type("Output", (), {"sample": x + offset})

    monkeypatch.setattr(single_file, "load_part", lambda *arguments: UNet())
    assert single_file._measured_prediction(tmp_path) == predicts


def test_tensors_are_written_as_safetensors_reads_them(tmp_path):
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    tensors = {f"{kind}é": torch.randn(3, 5).to(kind).T for kind in kinds} | {"scalar": torch.tensor(2.0)}
    write_tensors(tensors, tmp_path / "x.safetensors")
    again = load_file(tmp_path / "x.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in tensors)
