"""One file under the first implementation's names, read back by diffusers' own converter."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from e4t_cli.errors import UsageError
from e4t_cli.formats import stable_diffusion, textual_inversion
from e4t_cli.formats.export_files import embedding_path
from e4t_cli.formats.stable_diffusion import compvis_state_dict, write_single_file
from e4t_cli.models.denoiser import TunedModel
from e4t_cli.models.text_to_image import TextToImageModel


def parts(*, real):
    """U-Net, VAE and text encoder of Stable Diffusion's shape; if `real`, of its sizes on meta."""
    wide = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768}
    small = {
        "block_out_channels": (8, 16, 16, 16), "cross_attention_dim": 12, "norm_num_groups": 4,
        "attention_head_dim": 2, "sample_size": 8,
    }  # fmt: skip
    kinds = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2,
    }  # fmt: skip
    vae = {"block_out_channels": (128, 256, 512, 512)}
    vae = vae if real else {"block_out_channels": (4, 8, 8, 8), "norm_num_groups": 4}
    words = {
        "hidden_size": 768 if real else 12, "intermediate_size": 3072 if real else 16,
        "num_hidden_layers": 12 if real else 2, "num_attention_heads": 12 if real else 2,
        "vocab_size": 49408 if real else 400, "max_position_embeddings": 77,
    }  # fmt: skip
    with torch.device("meta" if real else "cpu"):
        return (
            UNet2DConditionModel(**(wide if real else small)),
            AutoencoderKL(**kinds, **vae),
            CLIPTextModel(CLIPTextConfig(**words)),
        )


@pytest.mark.parametrize("real", [False, True])
def test_diffusers_reads_it_back(real):
    unet, vae, text_encoder = parts(real=real)
    written = dict(compvis_state_dict(unet, vae, text_encoder))
    found = theirs.convert_ldm_unet_checkpoint(written, unet.config)
    again = {
        "unet": (found, unet),
        "vae": (theirs.convert_ldm_vae_checkpoint(written, vae.config), vae),
    }
    for converted, part in again.values():
        own = part.state_dict()
        assert converted.keys() == own.keys()
        for key, value in own.items():
            assert converted[key].shape == value.shape
            assert real or torch.equal(converted[key], value)
    words = theirs.convert_ldm_clip_checkpoint(written)
    own = text_encoder.state_dict()
    for key, value in own.items():
        name = key if key in words else f"text_model.{key}"
        assert words[name].shape == value.shape and (real or torch.equal(words[name], value))
    assert theirs.infer_diffusers_model_type(written) == "v1" or not real


def test_published_key_names():
    """Written down by hand from the published checkpoint of Stable Diffusion 1.4."""
    written = dict(compvis_state_dict(*parts(real=True)))
    for name, shape in {
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.middle_block.1.proj_in.weight": (1280, 1280, 1, 1),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.decoder.up.3.upsample.conv.bias": (512,),
        "first_stage_model.post_quant_conv.weight": (4, 4, 1, 1),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
    }.items():
        assert tuple(written[name].shape) == shape, name
    kinds = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
    assert [sum(key.startswith(kind) for key in written) for kind in kinds] == [686, 248, 197]


@pytest.fixture
def small(model, monkeypatch):
    """The tiny base with as many blocks as Stable Diffusion, and their sizes accepted."""
    unet, vae, text_encoder = parts(real=False)
    monkeypatch.setattr(stable_diffusion, "SINGLE_FILE_CONFIG", {"block_out_channels": (8, 16, 16, 16)})
    return TextToImageModel(
        base=model.base, unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=model.tokenizer,
        noise_schedule=model.noise_schedule,
    )  # fmt: skip


def test_the_file_and_its_embedding(small, tmp_path):
    tuned, embedding = TunedModel.plain(small, "face"), torch.arange(12.0)
    path = tmp_path / "deep" / "me.safetensors"
    write_single_file(small, tuned, embedding, path)
    assert {one.name for one in path.parent.iterdir()} == {"me.safetensors", "me-word.safetensors"}
    assert torch.equal(load_file(embedding_path(path))["emb_params"], embedding[None])
    stored = load_file(path)
    floating = {value.dtype for value in stored.values() if value.is_floating_point()}
    assert floating == {torch.float16}
    key = "model.diffusion_model.input_blocks.0.0.weight"
    assert torch.equal(stored[key], small.unet.conv_in.weight.half())
    assert path.stat().st_mode & 0o044 == 0o044
    for name in ("me", "me-word"):
        (path.parent / f"{name}.safetensors").unlink()
        with pytest.raises(UsageError, match="exists already"):
            write_single_file(small, tuned, embedding, path)
        (path.parent / f"{name}.safetensors").write_bytes(b"mine")
    assert embedding_path(path).read_bytes() == b"mine"


def test_both_files_are_written_or_none(small, tmp_path, monkeypatch):
    rename, tuned = textual_inversion.rename_to_free_name, TunedModel.plain(small, "face")

    def name_taken_meanwhile(source, target):
        if source.name == "weights":
            raise FileExistsError(f"{target} exists")
        rename(source, target)

    monkeypatch.setattr(textual_inversion, "rename_to_free_name", name_taken_meanwhile)
    with pytest.raises(UsageError, match="exists"):
        write_single_file(small, tuned, torch.ones(12), tmp_path / "me.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_another_kind_of_model_is_refused(model, tmp_path):
    with pytest.raises(UsageError, match="another kind of model") as caught:
        write_single_file(model, TunedModel.plain(model, "face"), torch.ones(24), tmp_path / "x.safetensors")
    assert "folder" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("linear", "kind"), [(False, "1.4"), (True, "2.1")])
def test_the_version_of_stable_diffusion_is_detected(linear, kind):
    wide = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 1024}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**wide, use_linear_projection=linear)
    model = SimpleNamespace(unet=unet, base=SimpleNamespace(name=f"sd{kind}"))
    if linear:
        with pytest.raises(UsageError, match="sd2.1 is another kind"):
            stable_diffusion.check_single_file(model)
    else:
        stable_diffusion.check_single_file(model)
