"""A tiny Stable Diffusion, built in code and saved as a base folder: no network, no real weights.

Same classes as the real thing (diffusers, transformers, open_clip) with a few thousand random
parameters in each part. Everything is seeded, so a failing test fails again.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

WORDS = (
    *("a", "photo", "of", "face", "cat", "dog", "art", "on", "the", "beach"),
    *("as", "an", "astronaut", "with", "red", "hat", "drawing", "one"),
)
RESOLUTION = 32


def pytest_configure():
    """Let programs that tests start receive Ctrl-C, also where a shell runs everything in the background."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _one_thread_and_own_home(tmp_path_factory, monkeypatch):
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("home")
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("E4T_TUNED_CACHE", "0")  # tests that compare two tunings want two
    # `--offline` sets variables of the whole process, which here has other tests to run.
    before = dict(os.environ)
    yield
    for name in ("E4T_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.pop(name, None)
        if name in before:
            os.environ[name] = before[name]


def write_tokenizer(folder: Path) -> int:
    """Write a CLIP tokenizer that knows WORDS whole and spells the rest; returns its size."""
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = letters + [f"{letter}</w>" for letter in letters]
    merges: list[str] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pair = f"{parts[0]} {parts[1]}"
            parts = [parts[0] + parts[1], *parts[2:]]
            if pair not in merges:
                merges.append(pair)
                vocabulary.append(parts[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    ids = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 16,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(ids)


def write_base(folder: Path, *, prediction_type: str = "epsilon") -> Path:
    """Write a whole base with random weights, in the layout of the packaged ones."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from open_clip.transformer import VisionTransformer
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokens = write_tokenizer(folder / "tokenizer")
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=24,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=RESOLUTION,
        mid_block_add_attention=False,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=tokens,
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=tokens - 2,
            eos_token_id=tokens - 1,
            pad_token_id=tokens - 1,
            projection_dim=24,
        )
    )
    schedule = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    # Random output layers start near zero; scaled up, so that what tests compare is not.
    with torch.no_grad():
        unet.conv_out.weight.mul_(4)
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    text_encoder.save_pretrained(folder / "text_encoder")
    schedule.save_pretrained(folder / "scheduler")
    vision = {
        "image_size": 32, "patch_size": 8, "width": 32, "layers": 4, "head_width": 16,
    }  # fmt: skip
    tower = VisionTransformer(image_size=32, patch_size=8, width=32, layers=4, heads=2, mlp_ratio=4.0, output_dim=16)
    (folder / "image_tower").mkdir()
    save_file(tower.state_dict(), folder / "image_tower" / "model.safetensors")
    config = {
        "model_cfg": {"embed_dim": 16, "vision_cfg": vision},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "size": 32},
    }
    (folder / "image_tower" / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (folder / "base.toml").write_text(
        f'schema = 1\nname = "tiny"\nlicence = "Apache-2.0"\nrevision = "test"\nresolution = {RESOLUTION}\n'
    )
    return folder


def drawn_face(index: int = 0, size: int = RESOLUTION) -> tuple[Image.Image, Image.Image]:
    """Return a simple drawing of a face, and its mask."""
    image, mask = Image.new("RGB", (size, size), (90, 140, 200)), Image.new("L", (size, size))
    head = (size // 5, size // 8, size * 4 // 5, size * 7 // 8)
    skin = (230 - 9 * index % 120, 180 - 17 * index % 120, 140)
    ImageDraw.Draw(image).ellipse(head, fill=skin, outline=(40, 20, 10))
    ImageDraw.Draw(image).ellipse((size * 2 // 5 - 2, size // 2 - 3, size * 2 // 5 + 2, size // 2), fill=0)
    ImageDraw.Draw(mask).ellipse(head, fill=255)
    return image, mask


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    """The folder of a tiny base."""
    return write_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="session")
def checked_base(base_folder, tmp_path_factory):
    """The tiny base with a tiny checker beside it."""
    import shutil

    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    folder = tmp_path_factory.mktemp("checked") / "tiny"
    shutil.copytree(base_folder, folder)
    torch.manual_seed(0)
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 32,
        "num_attention_heads": 2, "patch_size": 16, "projection_dim": 8,
    }  # fmt: skip
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config=vision, text_config={"hidden_size": 8}, projection_dim=8)
    )
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(2.0)  # no similarity is that high: nothing is flagged
        checker.special_care_embeds_weights.fill_(2.0)
    checker.save_pretrained(folder / "safety_checker")
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(
        json.dumps({"crop_size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3})
    )
    return folder


@pytest.fixture(scope="session")
def _shared_model(base_folder):
    from e4t_cli.models.text_to_image import TextToImageModel

    return TextToImageModel.load(base_folder)


@pytest.fixture
def model(_shared_model):
    """The tiny base, loaded; whatever a test does, its U-Net must be as before afterwards."""
    before = {key: value.clone() for key, value in _shared_model.unet.state_dict().items()}
    yield _shared_model
    after = _shared_model.unet.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.fixture
def face():
    """A prepared image with its mask."""
    from e4t_cli.registry.domain import PreparedImage

    image, mask = drawn_face()
    return PreparedImage(image=image, mask=mask)


@pytest.fixture
def domain_weights(model):
    """Domain weights with random values, large enough to change every result."""
    from e4t_cli.models.domain_weights import DomainWeights
    from e4t_cli.nn.weight_offsets import WeightOffsets
    from e4t_cli.nn.word_embedding_encoder import WordEmbeddingEncoder
    from e4t_cli.registry.config import PretrainingConfig, TuningConfig

    source = torch.Generator().manual_seed(1)
    encoder = WordEmbeddingEncoder(model.encoder_config())
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.copy_(torch.randn(weight.shape, generator=source) * 0.3)
    factors = {}
    for path, (left, right) in WeightOffsets.for_unet(model.unet).factors().items():
        factors[path] = (
            torch.randn(left.shape, generator=source) * 0.2,
            torch.randn(right.shape, generator=source) * 0.2,
        )
    return DomainWeights(
        name="face",
        descriptor="face",
        base_name="tiny",
        base_fingerprint=model.fingerprint,
        encoder=encoder,
        offsets=factors,
        tuning=TuningConfig(steps=3, base_learning_rate=1e-5, reg_weight=0.1, batch_size=4, mask=True),
        pretraining=PretrainingConfig(steps=5, batch_size=4),
        templates=("{}", "a photo of {}"),
    )
