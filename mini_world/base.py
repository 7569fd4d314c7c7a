"""Trains the U-Net of `mini` and writes all parts as one folder in diffusers' layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from e4t_cli.prompts import training_templates
from e4t_cli.registry.discovery import find_domain
from mini_world.captions import Caption, vocabulary
from mini_world.data import SUBJECTS, Drawings
from mini_world.loop import default_device, random_rows, train
from mini_world.text import WIDTH, CaptionEncoder, CaptionTokenizer, TokenizedCaptions, tokenize_drawings
from mini_world.world import SUBJECT_LABELS

UNET_CONFIG = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (64, 128, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
# Stable Diffusion's schedule.
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
}
# The loss and the error of `e4t_cli.models.drawings` above which an image is no drawing (`python -m mini_world.photographs`).
DRAWING_LIMITS = [0.4, 0.05]
PAPER_DOMAINS = ("face", "cat", "art")
# γ of min-SNR weighting. Without it, the easy timesteps with little noise dominate the gradient.
SNR_CAP = 5.0


def subject_weights(labels: numpy.ndarray) -> Tensor:
    """Weight of each latent in the loss, 1 on the background and 2 on the subject, fp16 (N, 16, 16)."""
    mask = torch.from_numpy(numpy.isin(labels, SUBJECT_LABELS)).half()
    return 1 + F.avg_pool2d(mask[:, None].float(), 4)[:, 0].half()


def oversampled_rows(drawings: Drawings, oversampled: tuple[str, ...]) -> Tensor:
    """Row numbers to sample from: every drawing once, those of the `oversampled` subjects twice."""
    again = numpy.isin(drawings.facts[:, 0], [SUBJECTS.index(subject) for subject in oversampled])
    return torch.cat([torch.arange(len(drawings)), torch.from_numpy(numpy.flatnonzero(again))])


def _zero_init_residuals(unet: UNet2DConditionModel) -> None:
    """Initialize the last layer of every residual branch and the output layer with zeros, as guided-diffusion does."""
    last = [unet.conv_out]
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            last.append(module.conv2)
        elif isinstance(module, Transformer2DModel):
            last.append(module.proj_out)
    for layer in last:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def build_unet() -> UNet2DConditionModel:
    """The untrained U-Net."""
    torch.manual_seed(3)
    unet = UNet2DConditionModel(**UNET_CONFIG)
    _zero_init_residuals(unet)
    return unet


def train_unet(
    folder: Path,
    unet: UNet2DConditionModel,
    drawings: Drawings,
    encoded: Tensor,
    scaling_factor: float,
    tokenizer,
    text_encoder,
    *,
    name: str,
    steps: int,
    learning_rate: float,
    text_encoder_lr: float = 0.0,
    seed: int,
    batch: int,
    captions_per_image: int,
    oversampled: tuple[str, ...] = (),
) -> None:
    """Train the U-Net on encoded drawings (N, 8, 16, 16: mean and log-variance), conditioned on the text encoder.

    `text_encoder_lr`: the learning rate of the text encoder's layers; 0 freezes them. Its token embeddings are always frozen,
    because personalization replaces one of them. `captions_per_image`: variants; one caption in ten is empty, for
    classifier-free guidance. `oversampled`: subjects whose drawings are used twice as often.
    """
    device = default_device()
    caption_encoder = CaptionEncoder(text_encoder.to(device).eval().requires_grad_(False))
    layers = [p for name, p in text_encoder.named_parameters() if "embedding" not in name]
    for parameter in layers:
        parameter.requires_grad_(text_encoder_lr > 0)
    schedule = DDPMScheduler(**SCHEDULE)
    snr = compute_snr(schedule, torch.arange(1000))
    weights_of_t = (snr.clamp(max=SNR_CAP) / snr).to(device)
    weights = subject_weights(drawings.labels[: len(encoded)]).to(device)
    encoded = encoded.to(device)
    available = oversampled_rows(drawings.select(slice(len(encoded))), oversampled).to(device)
    empty = CaptionTokenizer(tokenizer)([Caption("", "")])
    captions = tokenize_drawings(drawings.select(slice(len(encoded))), tokenizer, captions_per_image)
    captions = TokenizedCaptions.concatenate([captions, empty]).to(device)

    def loss_of_step(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = available[random_rows(len(available), batch, generator)]
        caption_rows = rows * captions_per_image + random_rows(captions_per_image, batch, generator)
        dropped = torch.rand(batch, generator=generator, device=device) < 0.1
        with torch.set_grad_enabled(text_encoder_lr > 0):
            hidden, _ = caption_encoder(captions[caption_rows.where(~dropped, len(captions) - 1)])
        mean, logvar = encoded[rows].float().chunk(2, 1)
        noise = torch.randn(2, *mean.shape, generator=generator, device=device)
        z_0, epsilon = (mean + (0.5 * logvar).exp() * noise[0]) * scaling_factor, noise[1]
        t = random_rows(1000, batch, generator)
        z_t = schedule.add_noise(z_0, epsilon, t)
        predicted = unet(z_t, t, hidden).sample.float()
        error = (predicted - epsilon).pow(2).mean(1)
        weight = weights[rows].float() * weights_of_t[t][:, None, None]
        return {"loss": (error * weight).mean()}

    modules: dict[str, nn.Module] = {"unet": unet}
    groups = [{"params": list(unet.parameters()), "lr": learning_rate}]
    if text_encoder_lr:
        modules["words"] = text_encoder
        groups.append({"params": layers, "lr": text_encoder_lr})
    options = {"steps": steps, "learning_rate": learning_rate, "seed": seed, "groups": groups}
    warm_up, average = (200, 0.999) if steps > 1000 else (steps // 5, 1 - 5 / steps)
    train(name, folder, modules, loss_of_step, warm_up=warm_up, average=average, **options)


def write_base(target: Path, unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder, tokenizer, revision: str) -> None:
    """Write everything but the image tower in diffusers' layout, fp16."""
    unet.half().save_pretrained(target / "unet")
    vae.half().save_pretrained(target / "vae")
    text_encoder.half().save_pretrained(target / "text_encoder")
    tokenizer.save_pretrained(target / "tokenizer")
    DDPMScheduler(**SCHEDULE).save_pretrained(target / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (target / "base.toml").write_text(
        f'schema = 1\nname = "mini"\nlicence = "Apache-2.0"\nrevision = "{revision}"\nresolution = 64\nguidance = 3.0\n'
        f"drawing_limits = {DRAWING_LIMITS}\n"
    )
    write_vocabulary(target)


def write_vocabulary(target: Path) -> None:
    """Write the words that the base knows, vocabulary.json."""
    templates = [template for name in PAPER_DOMAINS for template in training_templates(find_domain(name))]
    lines = (f"{json.dumps(group)}: {json.dumps(words)}" for group, words in vocabulary(templates).items())
    (target / "vocabulary.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
