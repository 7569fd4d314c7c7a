"""Invariants of Stable Diffusion 1.4 at full size, on the meta device: shapes, FLOP and memory plans."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from e4t_cli.hub.bases import Base
from e4t_cli.models.denoiser import CFGDenoiser, TunedModel
from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.models.prompt_embedding import Tokens
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.patch_encoder import PatchEncoder, PatchEncoderConfig
from e4t_cli.nn.precision import PrecisionPolicy
from e4t_cli.nn.unet import feature_widths
from e4t_cli.nn.weight_offsets import WeightOffsets
from e4t_cli.nn.word_embedding_encoder import EncoderConfig, ImageTower, WordEmbeddingEncoder
from e4t_cli.registry.config import PretrainingConfig, TuningConfig
from e4t_cli.system_memory import GB
from e4t_cli.training.loss import TrainingBatch, training_loss
from e4t_cli.training.memory import plan_tuning
from e4t_cli.training.trainable import METHODS
from tests.conftest import write_tokenizer

BATCH = 16


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from open_clip.transformer import VisionTransformer
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
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        tower = VisionTransformer(
            image_size=224, patch_size=14, width=1280, layers=32, heads=16, mlp_ratio=4.0,
            output_dim=1024,
        )  # fmt: skip
        image_tower = ImageTower(tower, mean=(0.5,) * 3, std=(0.25,) * 3, size=224)
    model = TextToImageModel(
        base=Base(name="sd14", folder=folder, resolution=512),
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        noise_schedule=DDPMScheduler(beta_schedule="scaled_linear"),
        image_tower=image_tower,
    )
    # The tokenizer above is a small one: its tokens of "" are set by hand.
    model.__dict__["uncond_embeds"] = torch.empty(1, 77, 768, device="meta")
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
    """96 offsets, 13 feature vectors, 10,880 values."""
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


@pytest.fixture(scope="module")
def domain_weights(stable_diffusion, encoder):
    with torch.device("meta"):
        factors = WeightOffsets.for_unet(stable_diffusion.unet).factors()
    return DomainWeights(
        name="face", descriptor="face", base_name="sd14", base_fingerprint="",
        encoder=encoder, offsets=factors, templates=("{}",),
        tuning=TuningConfig(steps=15, base_learning_rate=1e-6, reg_weight=0.1),
        pretraining=PretrainingConfig(steps=30_000),
    )  # fmt: skip


def flops(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("count", [1, 8])
def test_sampling_costs_what_plain_stable_diffusion_costs(stable_diffusion, encoder, count):
    """Under guidance the refinement is 1 % of the work: the feature pass is shared."""
    model = stable_diffusion
    tuned = TunedModel(
        unet=model.unet,
        encoder=encoder,
        encoded_image=torch.empty(1, 1280, device="meta"),
        e_domain=torch.empty(768, device="meta"),
        descriptor_id=0,
        scale=0.1,
    )
    z_t = torch.empty(count, 4, 64, 64, device="meta")
    t = torch.tensor(500, device="meta")
    both = torch.cat((z_t, z_t))
    text = torch.empty(2 * count, 77, 768, device="meta")
    predict = CFGDenoiser(model, tuned, tokens(count), guidance=7.5)
    with torch.no_grad():
        plain = flops(lambda: model.unet(both, t, text))
        ours = flops(lambda: predict(z_t, t))
    assert 1.0 < ours / plain <= 1.01


def test_the_image_is_encoded_once(stable_diffusion):
    """ViT-H/14 and the VAE's encoder encode one image, not 16 copies: 0.34 and 1.12 TFLOP."""
    model = stable_diffusion
    pixels = torch.empty(1, 3, 512, 512, device="meta")
    assert 0.3e12 < flops(lambda: model.image_features(pixels)) < 0.37e12
    assert 1.0e12 < flops(lambda: model.vae.encode(pixels).latent_dist.mean) < 1.2e12
    latents = torch.empty(1, 4, 64, 64, device="meta")
    with torch.no_grad():
        assert 2.4e12 < flops(lambda: model.vae.decode(latents).sample) < 2.6e12


@pytest.fixture
def on(stable_diffusion):
    """The same model as it would be on a device, for counting only."""

    def model(device, dtype):
        return SimpleNamespace(
            unet=stable_diffusion.unet, vae=stable_diffusion.vae,
            text_encoder=stable_diffusion.text_encoder, device=torch.device(device), dtype=dtype,
            latent_shape=(4, 64, 64),
        )  # fmt: skip

    return model


def planned(text):
    """The number and the plan of a cell of the table in benchmarks/README.md."""
    words = {
        "checkpointing": "gradient checkpointing",
        "all 16": "16 at a time",
    }
    number, _, rest = text.replace("optimiser", "optimizer").partition(":")
    return number, {words.get(part.strip(), part.strip()) for part in rest.split(",")}


def table_of_plans():
    page = (Path(__file__).parents[2] / "benchmarks" / "README.md").read_text(encoding="utf-8")
    table = page.partition("| `--vram` | full | lora |")[2].partition("\n\n")[0]
    for vram, exact, adapters in re.findall(r"^\| (\d+) \| (.*) \| (.*) \|$", table, re.M):
        exact, _, eight = exact.partition("; with `e4t[8bit]` ")
        yield pytest.param(vram, "full", False, exact, id=f"exact {vram}")
        yield pytest.param(vram, "lora", False, adapters, id=f"adapters {vram}")
        if eight:
            yield pytest.param(vram, "full", True, eight, id=f"8 bits {vram}")


@pytest.mark.parametrize(("vram", "method", "eight_bit", "cell"), list(table_of_plans()))
def test_the_published_plans_are_the_plans(on, domain_weights, vram, method, eight_bit, cell):
    plan = plan_tuning(
        on("cuda", torch.bfloat16), domain_weights, domain_weights.tuning.replace(method=method, batch_size=BATCH),
        vram=vram, consume=True, half=torch.bfloat16, eight_bit=eight_bit, ram=64 * GB,
    )  # fmt: skip
    number, parts = planned(cell)
    assert f"{plan.peak / GB:.1f}" == number
    assert set(plan.summary().partition("; ")[2].split(", ")) == parts


def test_the_plan_of_the_full_size_rehearsal_is_what_it_took(on, domain_weights):
    """docs/rehearsal.md: 22.1 GiB, with the encoder of the public face weights."""
    config = PatchEncoderConfig(
        unet_width=10_880, hidden_width=1280, embedding_width=768, tower_width=1280,
        tower_layers=32, tower_heads=16, tower_image_size=224, tower_patch_size=14,
    )  # fmt: skip
    with torch.device("meta"):
        public = replace(domain_weights, encoder=PatchEncoder(config))
    plan = plan_tuning(
        on("cpu", torch.float32), public, domain_weights.tuning.replace(batch_size=BATCH),
        vram="20", consume=True, half=torch.bfloat16,
    )  # fmt: skip
    assert plan.micro_batch == 1 and plan.checkpointing
    assert plan.peak == pytest.approx(22.1 * GB, rel=0.05)


class Started(TorchDispatchMode):
    """Count the operations that launch a kernel; views launch none."""

    VIEWS = {
        "view", "t", "transpose", "expand", "slice", "detach", "permute", "unsqueeze", "squeeze",
        "select", "split", "as_strided", "alias", "empty", "empty_like", "new_empty_strided",
        "_unsafe_view",
    }  # fmt: skip
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.__name__.partition(".")[0] not in self.VIEWS
        return function(*args, **(kwargs or {}))


def test_the_number_of_kernels_that_one_full_step_launches(stable_diffusion, domain_weights):
    """benchmarks/README.md has the number: launching them from the CPU is what a GPU waits for."""
    page = (Path(__file__).parents[2] / "benchmarks" / "README.md").read_text(encoding="utf-8")
    step, _ = prepared_step(stable_diffusion, domain_weights, domain_weights.tuning)
    with Started() as started:
        step()
    published = re.search(r"some ([\d,]+) operations", page)[1].replace(",", "")
    assert started.count == pytest.approx(int(published), rel=0.02)
    assert started.count <= 3300


def prepared_step(model, domain_weights, config):
    """Return one tuning step, to be called, and the weights that it trains."""
    parts = METHODS[config.method](
        model, domain_weights, config, 0, precision=PrecisionPolicy.resolve(model.device, model.dtype)
    )
    trained = []
    for weights, rate in parts.groups:
        for weight in weights:
            weight.requires_grad_(rate > 0)
            trained += [weight] if rate > 0 else []
    empty = torch.empty(BATCH, 4, 64, 64, device="meta")

    def step():
        batch = TrainingBatch(
            z_0=empty,
            timesteps=torch.zeros(BATCH, dtype=torch.long, device="meta"),
            epsilon=empty,
            encoded_image=parts.encoder.encode_image(torch.empty(1, 16, 1280, device="meta")).expand(BATCH, -1),
            tokens=tokens(BATCH),
        )
        with parts.cached():
            losses = training_loss(
                model, parts.unet, parts.encoder, batch, scale=0.1,
                e_domain=torch.empty(768, device="meta"), detach_features=parts.detach_features,
            )  # fmt: skip
        losses.total(0.1).backward()

    return step, trained


def one_step(model, domain_weights, config):
    """Return the work of one tuning step, and what it trains."""
    step, trained = prepared_step(model, domain_weights, config)
    work = flops(step)
    assert all(weight.grad is not None for weight in trained)
    return work, sum(weight.numel() for weight in trained)


def test_one_full_tuning_step(stable_diffusion, domain_weights):
    """U-Net, feature pass, text encoder and offsets, forward and backward: 51.6 TFLOP."""
    work, trained = one_step(stable_diffusion, domain_weights, domain_weights.tuning)
    assert 45e12 < work <= 51.6e12
    assert 890e6 < trained < 910e6


def test_one_lora_tuning_step(stable_diffusion, domain_weights):
    """No gradient of a weight of the base, and none through the feature pass: 31.9 TFLOP."""
    work, trained = one_step(stable_diffusion, domain_weights, domain_weights.tuning.replace(method="lora"))
    assert 28e12 < work <= 31.9e12
    assert 1.7e6 < trained < 2.6e6  # 5 MB in float16
