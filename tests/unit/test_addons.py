"""LoRAs, textual inversions and VAEs of other programs, added to a base: as diffusers does, or refused by name."""

import hashlib
import json
import shutil
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from e4t_cli.errors import IntegrityError, UsageError
from e4t_cli.formats.addons import apply_addons
from e4t_cli.formats.lora import kohya_name, lora_of
from e4t_cli.formats.recognition import recognize
from e4t_cli.formats.stable_diffusion import vae_name
from e4t_cli.hub.addons import Addon, BaseAddons, check_same
from e4t_cli.models.denoiser import TunedModel
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.prompts import parse_prompt
from e4t_cli.sampling import generate_latents
from e4t_cli.schedulers import SamplingConfig

RESNET = "down_blocks.0.resnets.0.conv1"  # a convolution of 3 × 3
QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0"
PROJECTION = "down_blocks.1.attentions.0.proj_in"
TEXT = "encoder.layers.0.self_attn.v_proj"
MLP = "encoder.layers.1.mlp.fc1"
LAYERS = {"unet": (RESNET, QUERY, OUT, PROJECTION), "text_encoder": (TEXT, MLP)}
RANK = 2


def layer(model, part, path):
    return getattr(model, part).get_submodule(path)


def matrices(model, *, seed=0, layers=LAYERS):
    """Return up, down and alpha of some layers, by part and path; no two alphas are the same."""
    source, found = torch.Generator().manual_seed(seed), {}
    for number, (part, path) in enumerate((part, path) for part, paths in layers.items() for path in paths):
        shape = layer(model, part, path).weight.shape
        up = torch.randn(shape[0], RANK, *[1] * (len(shape) - 2), generator=source) * 0.3
        down = torch.randn(RANK, *shape[1:], generator=source) * 0.3
        found[part, path] = up, down, 1.0 + number
    return found


def kohya(found):
    values = {}
    for (part, path), (up, down, alpha) in found.items():
        name = kohya_name(part, path)
        values |= {
            f"{name}.lora_up.weight": up,
            f"{name}.lora_down.weight": down,
            f"{name}.alpha": torch.tensor(alpha),
        }
    return values


def named(found, down_name, up_name, rename=lambda part, path: f"{part}.{path}"):
    values = {}
    for (part, path), (up, down, _) in found.items():
        values |= {f"{rename(part, path)}{up_name}": up, f"{rename(part, path)}{down_name}": down}
    return values


def oldest(part, path):
    """Return the name in diffusers' files with attention processors."""
    parent, _, last = path.removesuffix(".0").rpartition(".")
    return f"{part}.{parent}.processor.{last}" if last.startswith("to_") else f"{part}.{path}"


def long_text(part, path):
    return f"{part}.text_model.{path}" if part == "text_encoder" else f"{part}.{path}"


def write(path, values, metadata=None):
    save_file({key: value.contiguous() for key, value in values.items()}, path, metadata)
    return path


def loaded(folder, dtype=torch.float32, **addons):
    """Return the base with add-ons, and the notes."""
    model, notes, remarks = TextToImageModel.load(folder, dtype=dtype), [], []
    apply_addons(model, BaseAddons.parse(**addons), notes.append, remarks.append)
    return model, notes, remarks


def expected(model, found, scale=1.0, alphas=True):
    return {
        (part, path): layer(model, part, path).weight.float()
        + scale
        * (alpha / RANK if alphas else 1.0)
        * (up.flatten(1) @ down.flatten(1)).view_as(layer(model, part, path).weight)
        for (part, path), (up, down, alpha) in found.items()
    }


def assert_merged(base, changed, weights):
    for part in LAYERS:
        for path, module in getattr(base, part).named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                want = weights.get((part, path), module.weight)
                torch.testing.assert_close(layer(changed, part, path).weight, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_kohya_names_with_alphas_of_their_own(model, base_folder, tmp_path, scale):
    found = matrices(model)
    path = write(tmp_path / "style.safetensors", kohya(found))
    changed, notes, remarks = loaded(base_folder, loras=[f"{path}:{scale}"])
    assert_merged(model, changed, expected(model, found, scale))
    assert notes == [] and remarks == [f"LoRA style:{scale:g}: layers: 4 U-Net, 2 text encoder"]


@pytest.mark.parametrize(
    ("down", "up", "rename"),
    [
        (".lora_A.weight", ".lora_B.weight", long_text),
        (".lora_A.default.weight", ".lora_B.default.weight", long_text),
        (".lora.down.weight", ".lora.up.weight", lambda part, path: f"{part}.{path}"),
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", long_text),
        ("_lora.down.weight", "_lora.up.weight", oldest),
    ],
)
def test_names_of_diffusers_without_alphas(model, base_folder, tmp_path, down, up, rename):
    found = matrices(model)
    path = write(tmp_path / "style.safetensors", named(found, down, up, rename))
    changed, notes, _ = loaded(base_folder, loras=[str(path)])
    assert_merged(model, changed, expected(model, found, alphas=False))
    assert notes == []


def test_alphas_in_a_description_of_diffusers(model, base_folder, tmp_path):
    found = matrices(model)
    about = {
        "unet.r": RANK, "unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 3},
        "text_encoder.lora_alpha": 1,
    }  # fmt: skip
    values = named(found, ".lora_A.weight", ".lora_B.weight", long_text)
    path = write(tmp_path / "a.safetensors", values, {"lora_adapter_metadata": json.dumps(about)})
    alphas = {key: (3 if "to_q" in key[1] else 8) if key[0] == "unet" else 1 for key in found}
    own = {key: (up, down, alphas[key]) for key, (up, down, _) in found.items()}
    assert_merged(model, loaded(base_folder, loras=[str(path)])[0], expected(model, own))
    alone = {key.replace("unet.", "base_model.model."): v for key, v in values.items() if key.startswith("unet.")}
    write(tmp_path / "adapter_model.safetensors", alone)
    with pytest.raises(IntegrityError, match="does not say its alpha"):
        loaded(base_folder, loras=[str(tmp_path / "adapter_model.safetensors")])
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 3}}))
    unet = {key: value for key, value in own.items() if key[0] == "unet"}
    changed, *_ = loaded(base_folder, loras=[str(tmp_path / "adapter_model.safetensors")])
    assert_merged(model, changed, expected(model, unet))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "use_rslora": True}))
    with pytest.raises(IntegrityError, match="rsLoRA"):
        loaded(base_folder, loras=[str(tmp_path / "adapter_model.safetensors")])


def test_several_are_summed_in_float32_and_rounded_once(model, base_folder, tmp_path):
    one, two = matrices(model), matrices(model, seed=1)
    paths = [str(write(tmp_path / f"{n}.safetensors", kohya(some))) for n, some in enumerate((one, two))]
    changed, *_ = loaded(base_folder, dtype=torch.bfloat16, loras=[paths[0], f"{paths[1]}:2"])
    again, *_ = loaded(base_folder, dtype=torch.bfloat16, loras=[f"{paths[1]}:2", paths[0]])
    plain = TextToImageModel.load(base_folder, dtype=torch.bfloat16)
    first, second = expected(plain, one), expected(plain, two, 2.0)
    for (part, path), value in first.items():
        weight = layer(plain, part, path).weight.float()
        want = value + second[part, path] - weight
        found = layer(changed, part, path).weight
        torch.testing.assert_close(found.float(), want, rtol=2**-8, atol=1e-6)
        assert torch.equal(found, layer(again, part, path).weight)  # in whatever order they are given
    assert changed.addons == again.addons


def test_it_is_the_inverse_of_what_is_written(model, base_folder, tmp_path):
    """Base and LoRA of full rank are the tuned U-Net."""
    tuned = TextToImageModel.load(base_folder)
    with torch.no_grad():
        for path in (RESNET, QUERY, OUT, PROJECTION):
            tuned.unet.get_submodule(path).weight.add_(
                torch.randn_like(tuned.unet.get_submodule(path).weight), alpha=0.1
            )
    path = write(tmp_path / "me.safetensors", lora_of(model.unet, tuned.unet, 1024).weights)
    changed, *_ = loaded(base_folder, loras=[str(path)])
    for key, value in tuned.unet.state_dict().items():
        torch.testing.assert_close(changed.unet.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_layers_that_the_base_has_not_are_named(model, base_folder, tmp_path):
    values = kohya(matrices(model))
    pair = {
        "lora_unet_mid_block_x.lora_up.weight": torch.zeros(2, 2),
        "lora_unet_mid_block_x.lora_down.weight": torch.zeros(2, 2),
    }
    path = write(tmp_path / "a.safetensors", {**values, **pair, "bundle_emb.x": torch.zeros(2)})
    changed, (note,), _ = loaded(base_folder, loras=[str(path)])
    assert note == "a.safetensors: left out what tiny has no layer for: lora_unet_mid_block_x, bundle_emb.x"
    assert_merged(model, changed, expected(model, matrices(model)))
    for number in range(6):
        values |= {key.replace("mid", f"mid{number}"): value.clone() for key, value in pair.items()}
    with pytest.raises(IntegrityError, match="7 of the 13 layers") as raised:
        write(path, {**values, **pair})
        loaded(base_folder, loras=[str(path)])
    assert "are not in tiny" in str(raised.value)


def pair_of(name, up=(4, 2), down=(2, 4)):
    return {f"{name}.lora_up.weight": torch.zeros(up), f"{name}.lora_down.weight": torch.zeros(down)}


ANY = "lora_unet_" + QUERY.replace(".", "_")
GOOD = pair_of(ANY, (64, 2), (2, 64))
WRONG_LORAS = {
    "loha": ({f"{ANY}.hada_w1_a": torch.zeros(2, 2)}, "but LoHa ("),
    "lokr": ({f"{ANY}.lokr_w1": torch.zeros(2, 2)}, "but LoKr ("),
    "oft": ({f"{ANY}.oft_blocks": torch.zeros(2, 2)}, "but OFT ("),
    "dora": ({**pair_of(ANY), f"{ANY}.dora_scale": torch.zeros(2)}, "but DoRA ("),
    "dora of peft": ({"unet.x.lora_magnitude_vector": torch.zeros(2)}, "but DoRA ("),
    "tucker": ({**pair_of(ANY), f"{ANY}.lora_mid.weight": torch.zeros(2, 2)}, "lora_mid"),
    "differences": ({**pair_of(ANY), f"{ANY}.diff_b": torch.zeros(2)}, "whole differences"),
    "biases": ({"unet.x.lora_B.bias": torch.zeros(2), "unet.x.lora_A.weight": torch.zeros(2, 2)}, "LoRA with biases"),
    "sdxl": (pair_of("lora_te2_text_model_encoder_layers_0_mlp_fc1"), "is a LoRA for SDXL"),
    "sdxl unet": (pair_of("lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"), "is a LoRA for SDXL"),
    "flux": (pair_of("lora_unet_double_blocks_0_img_attn_proj"), "is a LoRA for Flux"),
    "other names": (pair_of("lora_unet_input_blocks_1_1_proj_in"), "1 of the 1 layers"),
    "another width": (pair_of(ANY, up=(640, 2), down=(2, 64)), "was not trained on a base as tiny"),
    "another rank": (pair_of(ANY, up=(64, 3), down=(2, 64)), "do not fit each other"),
    "one half": ({f"{ANY}.lora_up.weight": torch.zeros(64, 2)}, "has no lora_down"),
    "not finite": ({**GOOD, f"{ANY}.lora_up.weight": torch.full((64, 2), torch.nan)}, "not finite"),
    "strange alpha": ({**GOOD, f"{ANY}.alpha": torch.tensor(torch.inf)}, "alpha"),
    "a textual inversion": ({"emb_params": torch.zeros(1, 24)}, "is a textual inversion, not a LoRA"),
    "a vae": ({"decoder.mid.block_1.norm1.weight": torch.zeros(2)}, "is a VAE, not a LoRA"),
    "a model": ({"model.diffusion_model.x": torch.zeros(2)}, "is a whole model, not a LoRA"),
    "anything": ({"x.y": torch.zeros(2), "z": torch.zeros(1)}, "is no LoRA: it has x.y, z"),
    "nothing": ({}, "is no LoRA: it has nothing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_LORAS)
def test_wrong_loras_are_named(base_folder, tmp_path, kind):
    values, words = WRONG_LORAS[kind]
    path = write(tmp_path / "wrong.safetensors", values)
    with pytest.raises(IntegrityError, match="wrong.safetensors") as raised:
        loaded(base_folder, loras=[str(path)])
    assert words in raised.value.message and "\n" not in raised.value.message


# ── textual inversions, and whole pictures ──


def in_pipeline(folder, prepare, prompt, negative=""):
    """Return the latents of diffusers' pipeline, made with e4t's noise of seed 1."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    prepare(pipeline)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return pipeline(
        prompt, negative_prompt=negative, latents=noise, num_inference_steps=20, guidance_scale=3.0,
        output_type="latent",
    ).images  # fmt: skip


@pytest.fixture(scope="module")
def pipeline_folder(base_folder, tmp_path_factory):
    """The tiny base as a folder of diffusers."""
    from e4t_cli.formats.stable_diffusion import write_folder

    model = TextToImageModel.load(base_folder)
    plain, folder = TunedModel.plain(model, "face"), tmp_path_factory.mktemp("pipeline") / "base"
    write_folder(model, plain, plain.e_domain, folder, token="<other>", readme="", dtype=torch.float32)
    return folder


def own_latents(model, prompt, negative=""):
    few = SamplingConfig(steps=20, guidance=3.0, negative_prompt=negative)
    plain = TunedModel.plain(model, "face")
    return generate_latents(model, plain, [parse_prompt(prompt, require_placeholder=False)], [1], few)


def a1111_file(path, tokens=2, seed=3):
    values = torch.randn(tokens, 24, generator=torch.Generator().manual_seed(seed))
    return write(path, {"emb_params": values})


def test_diffusers_generates_the_same_with_textual_inversions(base_folder, pipeline_folder, tmp_path):
    several = a1111_file(tmp_path / "my-style.safetensors")
    single = write(tmp_path / "x.safetensors", {"<toy>": torch.randn(24, generator=torch.Generator().manual_seed(4))})
    negative = a1111_file(tmp_path / "easynegative.safetensors", 3, seed=5)
    model, *_ = loaded(base_folder, embeddings=[f"{several}:anna", str(single), str(negative)])

    def prepare(pipeline):
        pipeline.load_textual_inversion(several, token="anna")
        pipeline.load_textual_inversion(single)
        pipeline.load_textual_inversion(negative, token="easynegative")

    prompt = "a drawing of anna, with <toy> on the beach"
    theirs = in_pipeline(pipeline_folder, prepare, prompt, "easynegative, red hat")
    own = own_latents(model, prompt, "easynegative, red hat")
    torch.testing.assert_close(theirs, own, rtol=1e-3, atol=1e-3)
    plain = own_latents(TextToImageModel.load(base_folder), prompt, "easynegative, red hat")
    assert (plain - own).abs().max() > 1e-2


def test_diffusers_generates_the_same_with_a_lora(base_folder, pipeline_folder, tmp_path):
    """With one alpha and all of a text encoder's attention: diffusers 0.42.1 scales several alphas wrongly, and leaves
    layers out, with a log line, where only some of the attention is in the file."""
    pytest.importorskip("peft")
    attention = tuple(f"encoder.layers.0.self_attn.{one}_proj" for one in ("q", "k", "v", "out"))
    layers, plain = {**LAYERS, "text_encoder": attention}, TextToImageModel.load(base_folder)
    found = {key: (up, down, 3.0) for key, (up, down, _) in matrices(plain, layers=layers).items()}
    path, word = write(tmp_path / "style.safetensors", kohya(found)), a1111_file(tmp_path / "anna.safetensors")
    model, *_ = loaded(base_folder, loras=[f"{path}:0.7"], embeddings=[str(word)])

    def prepare(pipeline):
        pipeline.load_lora_weights(path)
        pipeline.fuse_lora(lora_scale=0.7)
        pipeline.load_textual_inversion(word, token="anna")

    theirs = in_pipeline(pipeline_folder, prepare, "a drawing of anna", "red hat")
    own = own_latents(model, "a drawing of anna", "red hat")
    torch.testing.assert_close(theirs, own, rtol=1e-3, atol=1e-3)
    plain, *_ = loaded(base_folder, embeddings=[str(word)])
    assert (own_latents(plain, "a drawing of anna", "red hat") - own).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ANNA", "aa"), ("anna's hat", "aa"), ("<anna>", "aa"), ('"anna,"', "aa"), ("annabel", ""), ("joanna", ""),
        ("S* and anna-maria", "Saab"), ("anna anna", "aaaa"), ("maria S*", "bS"), ("anna*", ""),
    ],
)  # fmt: skip
def test_words_match_as_the_placeholder_does(base_folder, tmp_path, prompt, ids):
    a1111_file(tmp_path / "anna.safetensors")
    a1111_file(tmp_path / "maria.safetensors", 1)
    model, *_ = loaded(base_folder, embeddings=[str(tmp_path / f"{one}.safetensors") for one in ("anna", "maria")])
    tokens = model.tokenize([parse_prompt(prompt, require_placeholder=False)], 5)
    first, end = model.words.first, model.tokenizer.eos_token_id
    row = [int(one) for one in tokens.ids[0, 1:] if one != end]
    assert "".join("S" if one == 5 else "ab"[(one - first) // 2] for one in row if one == 5 or one >= first) == ids


def test_what_does_not_fit_is_told_with_its_words(base_folder, tmp_path):
    a1111_file(tmp_path / "anna.safetensors")
    model, *_ = loaded(base_folder, embeddings=[str(tmp_path / "anna.safetensors")])
    (dropped,) = model.tokenize(["a " * 13 + "anna on the beach"], 5).dropped
    assert dropped == "anna on the beach"
    assert model.tokenize(["anna"], 5).dropped == ("",)


WRONG_WORDS = {
    "sdxl": ({"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}, "for SDXL"),
    "another base": ({"emb_params": torch.zeros(1, 768)}, "embeddings of 768 values, and the words of tiny have 24"),
    "a lora": (pair_of(ANY), "is a LoRA, not a textual inversion"),
    "several": ({"a": torch.zeros(24), "b": torch.zeros(24)}, "is no textual inversion"),
    "not finite": ({"emb_params": torch.full((1, 24), torch.nan)}, "not finite"),
    "empty": ({"emb_params": torch.zeros(0, 24)}, "has no embedding"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_WORDS)
def test_wrong_embeddings_are_named(base_folder, tmp_path, kind):
    values, words = WRONG_WORDS[kind]
    path = write(tmp_path / "wrong.safetensors", values)
    with pytest.raises(IntegrityError, match="wrong.safetensors") as raised:
        loaded(base_folder, embeddings=[str(path)])
    assert words in raised.value.message


@pytest.mark.parametrize("option", ["loras", "embeddings", "vae"])
@pytest.mark.parametrize(
    ("name", "data", "kind", "words"),
    [
        ("x.pt", b"PK\x03\x04", IntegrityError, "is a pickle"), ("x.bin", b"any", IntegrityError, "is a pickle"),
        ("x.safetensors", b"\x80\x02", IntegrityError, "is a pickle"),
        ("x.safetensors", b"", IntegrityError, "damaged"), ("x.safetensors", b"<html>" * 9, IntegrityError, "a web"),
        (None, b"", UsageError, "no file"),
    ],
)  # fmt: skip
def test_files_that_are_none(tmp_path, option, name, data, kind, words):
    path = tmp_path / (name or "x.safetensors")
    if name:
        path.write_bytes(data)
    with pytest.raises(kind, match=words):
        BaseAddons.parse(**{option: str(path) if option == "vae" else [str(path)]}).check()


def test_files_and_what_is_behind_their_colon(tmp_path):
    (tmp_path / "a:1").write_bytes(b"")
    found = BaseAddons.parse(loras=["a", "b:0.5", f"{tmp_path}/a:1", f"{tmp_path}/a:1:2", "C:\\x.safetensors"])
    assert [(str(one.path), one.scale) for one in found.loras] == [
        ("a", 1.0), ("b", 0.5), (f"{tmp_path}/a:1", 1.0), (f"{tmp_path}/a:1", 2.0), ("C:\\x.safetensors", 1.0),
    ]  # fmt: skip
    for wrong in ("a:x", "a:nan", "a:inf"):
        with pytest.raises(UsageError, match="scale of a LoRA"):
            BaseAddons.parse(loras=[wrong])
    for word in ("one", "two"):
        a1111_file(tmp_path / f"{word}.safetensors")
    same = BaseAddons.parse(embeddings=[f"{tmp_path}/one.safetensors:Me", f"{tmp_path}/two.safetensors:me"])
    with pytest.raises(UsageError, match="two embeddings have the word 'me'"):
        same.check()


def test_a_vae_of_the_hub_is_fetched_first(model):
    with pytest.raises(UsageError, match="the VAE owner/vae was not fetched") as raised:
        apply_addons(model, BaseAddons.parse(vae="owner/vae"))
    assert "fetch_addons" in raised.value.hint and model.addons == ()


# ── VAE ──


@pytest.fixture
def other_vae(model):
    source = torch.Generator().manual_seed(9)
    return {
        key: value + 0.05 * torch.randn(value.shape, generator=source) for key, value in model.vae.state_dict().items()
    }


def test_a_vae_in_any_layout_is_the_same(model, base_folder, other_vae, tmp_path):
    blocks = len(model.vae.config["block_out_channels"])
    first = {vae_name(key, blocks): value for key, value in other_vae.items()}
    write(tmp_path / "a.safetensors", other_vae)
    write(tmp_path / "b.safetensors", first | {"loss.x": torch.zeros(1)})
    write(tmp_path / "c.safetensors", {f"first_stage_model.{key}": value for key, value in first.items()})
    shutil.copytree(base_folder / "vae", tmp_path / "d" / "vae")
    write(tmp_path / "d" / "vae" / "diffusion_pytorch_model.safetensors", other_vae)
    for given in ("a.safetensors", "b.safetensors", "c.safetensors", "d", "d/vae"):
        changed, *_ = loaded(base_folder, vae=str(tmp_path / given))
        assert all(torch.equal(value, other_vae[key]) for key, value in changed.vae.state_dict().items())
        assert not any(weight.requires_grad for weight in changed.vae.parameters())
        assert [one.kind for one in changed.addons] == ["vae"]


def test_wrong_vaes_are_named(base_folder, other_vae, tmp_path):
    lacking = {key: value for key, value in other_vae.items() if "conv_out" not in key}
    wider = other_vae | {"quant_conv.bias": torch.zeros(99)}
    spoilt = other_vae | {"quant_conv.bias": torch.full((8,), torch.nan)}
    for values, words in (
        (lacking, "lacks"),
        (wider, "another shape"),
        (spoilt, "not finite"),
        (pair_of(ANY), "a LoRA"),
    ):
        path = write(tmp_path / "wrong.safetensors", values)
        with pytest.raises(IntegrityError, match=words):
            loaded(base_folder, vae=str(path))
    with pytest.raises(IntegrityError, match="has no VAE"):
        loaded(base_folder, vae=str(tmp_path))


# ── what is recorded ──


def test_hashes_are_those_of_the_web_ui(model, tmp_path):
    lora = write(tmp_path / "style.safetensors", kohya(matrices(model)))
    word = a1111_file(tmp_path / "neg.safetensors")
    data = lora.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    found = BaseAddons.parse(loras=[f"{lora}:0.8"], embeddings=[f"{word}:bad"]).check()
    assert [one.as_dict() for one in found] == [
        {"kind": "lora", "name": "style", "sha256": hashlib.sha256(data[begin:]).hexdigest(), "scale": 0.8},
        {"kind": "embedding", "name": "neg", "sha256": hashlib.sha256(word.read_bytes()).hexdigest(), "word": "bad"},
    ]
    assert [Addon.from_dict(one.as_dict()) for one in found] == list(found)
    with safe_open(lora, framework="pt") as opened:
        values = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    write(lora, values, {"ss_output_name": "another description"})
    assert BaseAddons.parse(loras=[f"{lora}:0.8"]).check() == found[:1]


@pytest.mark.parametrize("wrong", [None, {}, {"kind": "lora"}, {"kind": "x", "name": "", "sha256": ""},
                                   {"kind": "lora", "name": 1, "sha256": ""},
                                   {"kind": "lora", "name": "", "sha256": "", "more": 1}])  # fmt: skip
def test_records_are_checked(wrong):
    with pytest.raises(ValueError, match="add-on"):
        Addon.from_dict(wrong)


def test_what_is_compared():
    style = Addon(kind="lora", name="style", sha256="a" * 64, scale=0.8)
    renamed = Addon(kind="lora", name="other", sha256="a" * 64, scale=0.8)
    stronger = Addon(kind="lora", name="style", sha256="a" * 64, scale=1.0)
    word = Addon(kind="embedding", name="x", sha256="b" * 64, word="x")
    check_same([style], [renamed, word], "this concept")
    check_same([word], [], "this concept")
    for then, now, words in (
        ([style], [], "was made with the LoRA style:0.8 [aaaaaaaaaaaa], which is not given"),
        (
            [style],
            [stronger],
            "was made with the LoRA style:0.8 [aaaaaaaaaaaa], not with the LoRA style:1 [aaaaaaaaaaaa]",
        ),
        ([], [style], "was made without the LoRA style:0.8 [aaaaaaaaaaaa]"),
    ):
        with pytest.raises(IntegrityError) as raised:
            check_same(then, now, "this concept")
        assert raised.value.message == f"this concept {words}"
    assert raised.value.hint.startswith("leave --lora out")


@pytest.mark.parametrize("option", ["loras", "embeddings", "vae"])
def test_empty_names_and_addresses_are_refused(option):
    for given, hint in (
        ("", "may be unset"),
        ("https://huggingface.co/owner/name", "owner/name"),
        ("https://civitai.com/api/download/1?type=Model&format=SafeTensor", "'https://civitai.com/api"),
    ):
        with pytest.raises(UsageError, match="empty name|takes no address") as raised:
            BaseAddons.parse(**{option: given if option == "vae" else [given]})
        assert hint in raised.value.hint and "\n" not in raised.value.message


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"), (b"\n<!DOCTYPE html>", "a web page")],
)
def test_downloads_that_failed_are_named(tmp_path, data, words):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    for option in ("loras", "embeddings", "vae"):
        with pytest.raises(IntegrityError, match=words) as raised:
            BaseAddons.parse(**{option: str(path) if option == "vae" else [str(path)]}).check()
        assert raised.value.hint


@pytest.mark.parametrize("length", [640, 1152, 19280])
def test_the_length_of_a_header_is_no_sign_of_another_format(tmp_path, length):
    """Its bytes are those that pickles (640, 1152) and zip archives (19280) begin with."""
    table = {"emb_params": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}}
    path = tmp_path / "word.safetensors"
    path.write_bytes(struct.pack("<Q", length) + json.dumps(table).encode().ljust(length) + bytes(8))
    assert path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04", b"PK")
    assert BaseAddons.parse(embeddings=[str(path)]).check()[0].word == "word"
    assert recognize(path).type == "word"
