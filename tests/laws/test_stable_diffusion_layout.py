"""The whole of Stable Diffusion 1.4 on the meta device: shapes and work, without a number in it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from e4t_cli.base_model import TextToImageModel, Tokens
from e4t_cli.bases import Base
from e4t_cli.concept import TunedModel
from e4t_cli.generation import Sampling, _Predictor
from e4t_cli.nn.unet_features import feature_widths
from e4t_cli.nn.weight_offsets import WeightOffsets
from e4t_cli.nn.word_embedding_encoder import EncoderConfig, WordEmbeddingEncoder
from e4t_cli.training_loss import TrainingBatch, evaluated_once, training_loss
from tests.conftest import write_tokenizer

BATCH = 16


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("sd14")
    write_tokenizer(folder / "tokenizer")
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8, in_channels=4,
            out_channels=4, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
        )  # fmt: skip
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                num_attention_heads=12, max_position_embeddings=77, projection_dim=768,
                bos_token_id=49406, eos_token_id=49407,
            )
        )  # fmt: skip
        vae = AutoencoderKL(block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",)
                            * 4, up_block_types=("UpDecoderBlock2D",) * 4)  # fmt: skip
    model = TextToImageModel(
        base=Base(name="sd14", folder=folder, resolution=512),
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        noise_schedule=DDPMScheduler(beta_schedule="scaled_linear"),
    )
    # The tokenizer above is a small one: what it says to "" is put in by hand.
    model.__dict__["empty_text"] = torch.empty(1, 77, 768, device="meta")
    return model


@pytest.fixture(scope="module")
def encoder(stable_diffusion):
    config = EncoderConfig(
        image_layers=16,
        image_width=1280,
        unet_widths=feature_widths(stable_diffusion.unet),
        hidden_width=1280,
        embedding_width=768,
    )
    with torch.device("meta"):
        return WordEmbeddingEncoder(config)


def tokens(count):
    ids = torch.zeros(count, 77, dtype=torch.long, device="meta")
    return Tokens(ids=ids, placeholder=ids == 1)


def test_layout(stable_diffusion, encoder):
    """96 offsets, 13 feature vectors, 10,880 numbers."""
    with torch.device("meta"):
        offsets = WeightOffsets.for_unet(stable_diffusion.unet)
    assert len(offsets.paths) == 96
    widths = feature_widths(stable_diffusion.unet)
    assert len(widths) == 13
    assert sum(widths) == 10_880
    assert stable_diffusion.latent_shape == (4, 64, 64)
    network = sum(weight.numel() for weight in offsets.parameters())
    factored = sum(left.numel() + right.numel() for left, right in offsets.factors().values())
    assert 143e6 < network < 144e6
    assert 0.44e6 < factored < 0.45e6
    assert 35e6 < sum(weight.numel() for weight in encoder.parameters()) < 46e6


def test_drawing_costs_what_plain_stable_diffusion_costs(stable_diffusion, encoder):
    """Under guidance the refinement is 1 % of the work: the feature pass is shared."""
    model, count = stable_diffusion, 8
    tuned = TunedModel(
        unet=model.unet,
        encoder=encoder,
        folded=torch.empty(1, 1280, device="meta"),
        e_domain=torch.empty(768, device="meta"),
        descriptor_id=0,
        scale=0.1,
    )
    z_t = torch.empty(count, 4, 64, 64, device="meta")
    t = torch.tensor(500, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as plain:
        both = torch.cat((z_t, z_t))
        model.unet(both, t, torch.empty(2 * count, 77, 768, device="meta"))
    predict = _Predictor(model, tuned, tokens(count), Sampling(guidance=7.5))
    with torch.no_grad(), FlopCounterMode(display=False) as ours:
        assert predict(z_t, t).shape == z_t.shape
    assert 1.0 < ours.get_total_flops() / plain.get_total_flops() <= 1.02


def test_one_exact_tuning_step(stable_diffusion, encoder):
    """U-Net, feature pass, text encoder and offsets, forwards and backwards: 51.6 TFLOP."""
    model, unet = stable_diffusion, stable_diffusion.unet
    with torch.device("meta"):
        offsets = WeightOffsets.from_factors(WeightOffsets.for_unet(unet).factors())
    unet.requires_grad_(True)
    empty = torch.empty(BATCH, 4, 64, 64, device="meta")
    with offsets.attached_to(unet), FlopCounterMode(display=False) as counter:
        batch = TrainingBatch(
            z_0=empty,
            timesteps=torch.zeros(BATCH, dtype=torch.long, device="meta"),
            epsilon=empty,
            folded=encoder.fold(torch.empty(1, 16, 1280, device="meta")).expand(BATCH, -1),
            tokens=tokens(BATCH),
        )
        with evaluated_once(unet):
            losses = training_loss(
                model, unet, encoder, batch, e_domain=torch.empty(768, device="meta"), scale=0.1
            )
        losses.total(0.1).backward()
    assert all(weight.grad is not None for weight in (*unet.parameters(), *encoder.parameters()))
    assert all(weight.grad is not None for weight in offsets.parameters())
    unet.requires_grad_(False)
    assert 45e12 < counter.get_total_flops() <= 51.6e12
