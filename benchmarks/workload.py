"""Builds the model to measure: Stable Diffusion 1.4 with random weights, or a small one for a CPU.

Time and memory depend on shapes, not on values, as long as these are neither zeros nor constants.
The benchmarks measure time and memory, not quality.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from e4t_cli.hub.bases import Base
from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.weight_offsets import WeightOffsets
from e4t_cli.nn.word_embedding_encoder import ImageTower, WordEmbeddingEncoder
from e4t_cli.registry.config import PretrainingConfig, TuningConfig
from e4t_cli.registry.domain import PreparedImage

SIZES: dict[str, dict[str, Any]] = {
    "sd14": {
        "resolution": 512,
        "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
                 "block_out_channels": (320, 640, 1280, 1280)},
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
        "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                 "num_attention_heads": 12, "max_position_embeddings": 77},
        "tower": {"image_size": 224, "patch_size": 14, "width": 1280, "layers": 32, "heads": 16,
                  "mlp_ratio": 4.0, "output_dim": 1024},
    },
    "small": {
        "resolution": 64,
        "unet": {"sample_size": 8, "cross_attention_dim": 64, "attention_head_dim": 4,
                 "block_out_channels": (32, 64, 64, 64), "norm_num_groups": 8},
        "vae": {"block_out_channels": (16, 16, 16, 16), "norm_num_groups": 8},
        "text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                 "num_attention_heads": 2, "max_position_embeddings": 77},
        "tower": {"image_size": 32, "patch_size": 4, "width": 64, "layers": 4, "heads": 4,
                  "mlp_ratio": 4.0, "output_dim": 32},
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A base, domain weights for it, and a photo."""

    size: str
    model: TextToImageModel
    pack: DomainWeights
    photo: PreparedImage


def make_workload(size: str, device: torch.device, folder: Path) -> Workload:
    """Build a workload in memory.

    Args:
        size: a key of `SIZES`.
        device: of the base.
        folder: for a small tokenizer in place of CLIP's; its size does not change the timings.
    """
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from open_clip.transformer import VisionTransformer
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from tests.conftest import write_tokenizer

    torch.manual_seed(0)
    sizes = SIZES[size]
    words = write_tokenizer(folder / "tokenizer")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        unet = UNet2DConditionModel(**sizes["unet"])
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            **sizes["vae"],
        )  # fmt: skip
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=max(words, 49408), bos_token_id=words - 2, eos_token_id=words - 1,
                pad_token_id=words - 1, projection_dim=sizes["text"]["hidden_size"],
                **sizes["text"],
            )
        )  # fmt: skip
        tower = VisionTransformer(**sizes["tower"])
    # torch's `to`, because diffusers' `to` logs a warning about these intended casts.
    order = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    model = TextToImageModel(
        base=Base(name=size, folder=folder, resolution=sizes["resolution"]),
        unet=nn.Module.to(unet, dtype, memory_format=order),
        vae=nn.Module.to(vae, dtype, memory_format=order),
        text_encoder=nn.Module.to(text, dtype),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=77),
        noise_schedule=DDPMScheduler(beta_schedule="scaled_linear"),
        image_tower=ImageTower(tower, (0.5,) * 3, (0.25,) * 3, sizes["tower"]["image_size"]).to(device, dtype),
    )
    model.__dict__["fingerprint"] = size  # there are no files to hash
    source = torch.Generator().manual_seed(1)
    encoder = WordEmbeddingEncoder(model.encoder_config())
    offsets = {}
    for path, (left, right) in WeightOffsets.for_unet(model.unet).factors().items():
        offsets[path] = tuple(torch.randn(factor.shape, generator=source) * 0.02 for factor in (left, right))
    pack = DomainWeights(
        name="face", descriptor="face", base_name=size, base_fingerprint=size, encoder=encoder,
        offsets=offsets, templates=("{}", "a photo of {}"),
        tuning=TuningConfig(steps=15, base_learning_rate=1e-6, reg_weight=0.1),
        pretraining=PretrainingConfig(steps=1),
    )  # fmt: skip
    noise = torch.randint(0, 256, (sizes["resolution"], sizes["resolution"], 3), generator=source)
    photo = PreparedImage(image=Image.fromarray(noise.byte().numpy()))
    return Workload(size=size, model=model, pack=pack, photo=photo)
