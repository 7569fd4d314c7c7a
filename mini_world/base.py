"""The denoiser of `mini`: diffusers' U-Net trained on the drawn world, and the folder that makes all parts one base."""

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

from mini_world.captions import Caption
from mini_world.data import SUBJECTS, Drawings
from mini_world.loop import draw_rows, pick_device, train
from mini_world.text import WIDTH, Captioner, CaptionTokenizer, Wordings, word_drawings
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
# Of min-SNR weighting: without it the steps of little noise, which are easy, take most of the gradient.
SNR_CAP = 5.0


def subject_weights(labels: numpy.ndarray) -> Tensor:
    """Weight of each latent in the loss, 1 on the background and 2 on the subject, fp16 (N, 16, 16)."""
    mask = torch.from_numpy(numpy.isin(labels, SUBJECT_LABELS)).half()
    return 1 + F.avg_pool2d(mask[:, None].float(), 4)[:, 0].half()


def shown_rows(drawings: Drawings, twice: tuple[str, ...]) -> Tensor:
    """Row numbers to draw from: every drawing once, those of the subjects in `twice` again."""
    again = numpy.isin(drawings.facts[:, 0], [SUBJECTS.index(subject) for subject in twice])
    return torch.cat([torch.arange(len(drawings)), torch.from_numpy(numpy.flatnonzero(again))])


def _start_simple(unet: UNet2DConditionModel) -> None:
    """Every residual branch and the output start at zero, as in the network that Stable Diffusion's U-Net comes from."""
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
    """The denoiser before its first step."""
    torch.manual_seed(3)
    unet = UNet2DConditionModel(**UNET_CONFIG)
    _start_simple(unet)
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
    words_rate: float = 0.0,
    seed: int,
    batch: int,
    wordings: int,
    twice: tuple[str, ...] = (),
) -> None:
    """Train the U-Net on encoded drawings (N, 8, 16, 16: mean and log-variance) under the text encoder.

    `words_rate`: the learning rate of the text encoder's layers; 0 leaves them as they are. Its table of words stays in any
    case: it is what personalization writes in. `wordings`: of each picture; one caption in ten is empty, for guidance.
    `twice`: subjects whose drawings are shown twice as often.
    """
    device = pick_device()
    captioner = Captioner(text_encoder.to(device).eval().requires_grad_(False))
    layers = [p for name, p in text_encoder.named_parameters() if "embedding" not in name]
    for parameter in layers:
        parameter.requires_grad_(words_rate > 0)
    schedule = DDPMScheduler(**SCHEDULE)
    snr = compute_snr(schedule, torch.arange(1000))
    weights_of_t = (snr.clamp(max=SNR_CAP) / snr).to(device)
    weights = subject_weights(drawings.labels[: len(encoded)]).to(device)
    encoded = encoded.to(device)
    shown = shown_rows(drawings.pick(slice(len(encoded))), twice).to(device)
    nothing = CaptionTokenizer(tokenizer)([Caption("", "")])
    captions = Wordings.join([word_drawings(drawings.pick(slice(len(encoded))), tokenizer, wordings), nothing]).to(device)

    def loss_of_step(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = shown[draw_rows(len(shown), batch, generator)]
        spoken = rows * wordings + draw_rows(wordings, batch, generator)
        silent = torch.rand(batch, generator=generator, device=device) < 0.1
        with torch.set_grad_enabled(words_rate > 0):
            hidden, _ = captioner(captions[spoken.where(~silent, len(captions) - 1)])
        mean, logvar = encoded[rows].float().chunk(2, 1)
        noise = torch.randn(2, *mean.shape, generator=generator, device=device)
        z_0, epsilon = (mean + (0.5 * logvar).exp() * noise[0]) * scaling_factor, noise[1]
        t = draw_rows(1000, batch, generator)
        z_t = schedule.add_noise(z_0, epsilon, t)
        predicted = unet(z_t, t, hidden).sample.float()
        error = (predicted - epsilon).pow(2).mean(1)
        weight = weights[rows].float() * weights_of_t[t][:, None, None]
        return {"loss": (error * weight).mean()}

    modules: dict[str, nn.Module] = {"unet": unet}
    groups = [{"params": list(unet.parameters()), "lr": learning_rate}]
    if words_rate:
        modules["words"] = text_encoder
        groups.append({"params": layers, "lr": words_rate})
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
    )
