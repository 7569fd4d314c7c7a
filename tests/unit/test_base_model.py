import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from e4t_cli.errors import IntegrityError, UsageError, WeightsUnavailable
from e4t_cli.models.fingerprints import folder_fingerprint
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.precision import half_precision
from e4t_cli.nn.weight_offsets import FactoredWeightOffset, WeightOffset
from e4t_cli.prompts import parse_prompt
from tests.conftest import drawn_face


@pytest.fixture
def copy(base_folder, tmp_path):
    """A copy of the base folder, to be damaged."""
    return shutil.copytree(base_folder, tmp_path / "base")


def test_everything_is_frozen(model):
    for part in (model.unet, model.vae, model.text_encoder, model.image_tower):
        assert not part.training
        assert not any(weight.requires_grad for weight in part.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_part_has_the_dtype_that_was_asked_for(base_folder, dtype):
    model = TextToImageModel.load(base_folder, dtype=dtype)
    for part in (model.unet, model.vae, model.text_encoder, model.image_tower):
        assert {weight.dtype for weight in part.parameters()} == {dtype}
    features = model.image_features(model.pixels([drawn_face()[0]]))
    assert features.dtype == torch.float32


def test_half_precision_files_with_a_variant_name(copy, model):
    for part in ("unet", "vae", "text_encoder"):
        for path in (copy / part).glob("*.safetensors"):
            halved = {key: value.half() for key, value in load_file(path).items()}
            save_file(halved, path.with_name(f"{path.stem}.fp16.safetensors"), {"format": "pt"})
            path.unlink()
    loaded = TextToImageModel.load(copy)
    expected = model.unet.conv_in.weight.half().float()
    assert torch.equal(loaded.unet.conv_in.weight, expected)


def test_loading_changes_nothing_in_another_thread(base_folder):
    """diffusers and transformers set torch's default dtype and patch `nn.Module` while they load."""
    loads = [lambda: TextToImageModel.load(base_folder, dtype=torch.float16)] * 10
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:  # two loads at once, while this thread builds modules
            running = [pool.submit(load) for load in loads]
            built = 0
            while built < 100 or not all(one.done() for one in running):
                for module in (
                    nn.Linear(4, 4),
                    WeightOffset(4, 4),
                    FactoredWeightOffset(torch.zeros(4, 3), torch.eye(3)),
                ):
                    for value in module.parameters():
                        assert (value.dtype, value.device.type) == (torch.float32, "cpu")
                built += 1
            for one in running:
                assert one.result().unet.dtype == torch.float16
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize(
    ("part", "rename"),
    [
        ("text_encoder", lambda key: f"text_model.{key}"),
        ("text_encoder", lambda key: key.removeprefix("text_model.")),
        ("vae", lambda key: key.replace("to_q", "query").replace("to_k", "key").replace("to_out.0", "proj_attn")),
    ],
)
def test_weights_under_the_names_of_older_versions(copy, model, part, rename):
    path = next((copy / part).glob("*.safetensors"))
    tensors = {rename(key): value for key, value in load_file(path).items()}
    save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(3)}, path, {"format": "pt"})
    loaded, expected = getattr(TextToImageModel.load(copy), part), getattr(model, part)
    for (name, value), (_, other) in zip(loaded.state_dict().items(), expected.state_dict().items(), strict=True):
        assert torch.equal(value, other), name
    assert all(torch.equal(one, other) for one, other in zip(loaded.buffers(), expected.buffers(), strict=True))


def test_weights_in_several_files(copy, model):
    path = next((copy / "unet").glob("*.safetensors"))
    shutil.rmtree(copy / "unet")
    model.unet.save_pretrained(copy / "unet", max_shard_size="60KB")
    assert not path.exists()
    loaded = TextToImageModel.load(copy).unet
    assert all(
        torch.equal(one, other) for one, other in zip(loaded.parameters(), model.unet.parameters(), strict=True)
    )


def test_a_missing_weight_is_never_initialised(copy):
    path = next((copy / "unet").glob("*.safetensors"))
    tensors = load_file(path)
    tensors.pop("conv_in.bias")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(IntegrityError, match="conv_in"):
        TextToImageModel.load(copy)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_parts(copy, part):
    shutil.rmtree(copy / part)
    with pytest.raises(WeightsUnavailable, match=part):
        TextToImageModel.load(copy)


@pytest.mark.parametrize("name", ["scheduler/scheduler_config.json", "tokenizer/vocab.json", "unet/config.json"])
def test_damaged_settings(copy, name):
    (copy / name).write_text("{ torn")
    with pytest.raises(IntegrityError, match=name.partition("/")[0]):
        TextToImageModel.load(copy)


def test_damaged_files(copy):
    path = next((copy / "text_encoder").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(IntegrityError, match="text_encoder"):
        TextToImageModel.load(copy)


def test_other_kinds_of_model(copy):
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', '"sample"'))
    with pytest.raises(IntegrityError, match="predicts 'sample'"):
        TextToImageModel.load(copy)


# ── the image tower ──


def test_the_hierarchy_is_the_class_token_of_every_second_layer(model):
    pixels = model.pixels([drawn_face(index)[0] for index in range(2)])
    seen = []
    blocks = model.image_tower.visual.transformer.resblocks
    hooks = [block.register_forward_hook(lambda m, i, output: seen.append(output)) for block in blocks]
    features = model.image_features(pixels)
    for hook in hooks:
        hook.remove()
    expected = [model.image_tower.visual.ln_post(seen[index][:, 0]) for index in (1, 3)]
    torch.testing.assert_close(features, torch.stack(expected, dim=1))


def test_images_of_another_size_are_resized_for_the_tower(model):
    pixels = torch.nn.functional.interpolate(model.pixels([drawn_face()[0]]), scale_factor=2)
    assert model.image_features(pixels).shape == (1, 2, 32)


def test_the_tower_is_loaded_at_its_first_use(copy):
    shutil.rmtree(copy / "image_tower")
    model = TextToImageModel.load(copy)
    with pytest.raises(WeightsUnavailable, match="image tower"):
        _ = model.image_tower


@pytest.mark.parametrize(
    "change",
    [{"patch_size": 16}, {"width": 64}, {"timm_model_name": "vit"}, {"layers": 5}, {"width": None}],
)
def test_another_tower_than_the_configs(copy, change):
    path = copy / "image_tower" / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["vision_cfg"].update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(IntegrityError, match="image tower"):
        _ = TextToImageModel.load(copy).image_tower


# ── images and latents ──


def test_latents_are_in_the_units_of_the_unet(model):
    pixels = model.pixels([drawn_face()[0]])
    assert pixels.shape == (1, 3, 32, 32)
    assert pixels.abs().max() <= 1
    posterior = model.posterior(pixels)
    own = model.vae.encode(pixels).latent_dist
    scale = model.vae.config.scaling_factor
    torch.testing.assert_close(posterior.mean, own.mean * scale)
    noise = torch.randn(posterior.mean.shape)
    expected = (own.mean + own.std * noise) * scale
    torch.testing.assert_close(posterior.sample(noise), expected, rtol=1e-4, atol=1e-5)
    (decoded,) = model.decode(posterior.mean)
    assert decoded.size == (32, 32)
    assert decoded.mode == "RGB"


def test_images_of_another_size_and_mode_are_fitted(model):
    image, mask = drawn_face(size=100)
    assert model.pixels([image.convert("L")]).shape == (1, 3, 32, 32)
    assert model.masks([mask]).shape == (1, 32, 32)
    assert model.masks([mask]).max() == 1


# ── prompts ──


def words(model, tokens, row=0):
    return model.tokenizer.convert_ids_to_tokens(tokens.ids[row].tolist())


def test_the_place_of_the_concept_is_exact(model):
    token = model.descriptor_id("face")
    prompts = [parse_prompt("a photo of S*'s red hat"), parse_prompt('"S*," and S*')]
    tokens = model.tokenize(prompts, token)
    assert words(model, tokens)[:6] == [
        "<|startoftext|>", "a</w>", "photo</w>", "of</w>", "face</w>", "'",
    ]  # fmt: skip
    assert tokens.placeholder.sum(dim=1).tolist() == [1, 2]
    assert (tokens.ids[tokens.placeholder] == token).all()
    plain = model.tokenize(["a photo of face's red hat"], token)
    assert torch.equal(plain.ids, tokens.ids[:1])
    assert not plain.placeholder.any()


def test_padding_is_what_the_tokenizer_does(model):
    own = model.tokenizer("a photo of face", padding="max_length", max_length=16).input_ids
    assert model.tokenize(["a photo of face"], 0).ids[0].tolist() == own


def test_long_prompts_report_what_was_left_out(model):
    token = model.descriptor_id("face")
    long = parse_prompt("S* " + "with hat " * 10 + "on the beach")
    tokens = model.tokenize([long, parse_prompt("S* on the beach")], token)
    assert tokens.ids.shape == (2, 16)
    assert tokens.dropped[0].endswith("on the beach")
    assert tokens.dropped[1] == ""
    with pytest.raises(UsageError, match="placeholder"):
        model.tokenize([parse_prompt("with hat " * 10 + "S*")], token)


def test_a_descriptor_is_one_word(model):
    assert model.descriptor_id("face") == model.tokenizer.convert_tokens_to_ids("face</w>")
    with pytest.raises(UsageError, match="tokens"):
        model.descriptor_id("zebra")


def test_the_cached_empty_prompt_does_not_depend_on_the_first_caller(model):
    """Training encodes in bfloat16 and with another attention kernel, generation in float32."""

    def recomputed():
        model.__dict__.pop("uncond_embeds", None)
        return model.uncond_embeds

    plain = recomputed()
    assert plain.dtype == torch.float32
    with half_precision(model.device, torch.bfloat16):
        model.embed_prompts(model.tokenize([""], 0))  # leaves bfloat16 casts of the weights behind
        assert torch.equal(recomputed(), plain)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert torch.equal(recomputed(), plain)
    own = model.embed_prompts(model.tokenize([""], 0))
    torch.testing.assert_close(plain, own)


# ── identity ──


def test_the_fingerprint_is_that_of_the_content(base_folder, copy, model):
    assert folder_fingerprint(base_folder) == folder_fingerprint(copy) == model.fingerprint
    (copy / "base.toml").write_text("")
    assert folder_fingerprint(copy) == model.fingerprint
    path = next((copy / "unet").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert folder_fingerprint(copy) != model.fingerprint


def test_loading_prints_nothing(base_folder, capfd):
    TextToImageModel.load(base_folder)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "Loading" not in printed.err
