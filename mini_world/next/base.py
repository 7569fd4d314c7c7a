"""Trains the U-Net of `mini` and writes all parts as one folder in diffusers' layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from e4t_cli.prompts import training_templates
from e4t_cli.registry.discovery import find_domain
from mini_world.next.captions import Caption, vocabulary
from mini_world.next.data import Drawings
from mini_world.next.loop import default_device, process_rank, random_rows, train
from mini_world.next.text import WIDTH, CaptionEncoder, CaptionTokenizer, TokenizedCaptions, tokenize_drawings
from mini_world.next.world import SUBJECT_LABELS

# With 8 channels instead of 4 a forward pass costs the same: 680 MFLOP instead of 677 (torch's FlopCounterMode).
UNET_CONFIG = {
    "sample_size": 16,
    "in_channels": 8,
    "out_channels": 8,
    "layers_per_block": 1,
    "block_out_channels": (64, 128, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
RESOLUTION = 128
# Stable Diffusion's schedule.
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}
# How StableDiffusionPipeline samples unless it is told otherwise. "trailing" begins at the last time step, as training did;
# `steps_offset` is Stable Diffusion's, which e4t assumes of every base.
SAMPLER = SCHEDULE | {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "final_sigmas_type": "zero",
}
GUIDANCE = 3.0
# The loss and the error of `e4t_cli.models.drawings` above which an image is no drawing (`python -m mini_world.photographs`).
DRAWING_LIMITS = [0.4, 0.05]
PAPER_DOMAINS = ("face", "cat", "art")
# γ of min-SNR weighting. Without it, the easy timesteps with little noise dominate the gradient.
SNR_CAP = 5.0
_ROWS = 2048  # of label maps that are read at once

TextLoss = Callable[[CaptionEncoder, torch.Generator], dict[str, Tensor]]


def subject_weights(labels: numpy.ndarray) -> Tensor:
    """Weight of each latent in the loss, 1 on the background and 2 on the subject, fp16 (N, 16, 16).

    Args:
        labels: (N, 128, 128), in a file of its own perhaps, which is read in parts.
    """
    side = UNET_CONFIG["sample_size"]
    parts = []
    for start in range(0, len(labels), _ROWS):
        mask = torch.from_numpy(numpy.isin(labels[start : start + _ROWS], SUBJECT_LABELS))
        parts.append(1 + F.avg_pool2d(mask[:, None].float(), mask.shape[-1] // side)[:, 0].half())
    return torch.cat(parts)


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
    steps: int,
    learning_rate: float,
    words_rate: float,
    batch: int,
    captions_per_image: int,
    seed: int = 0,
    text_loss: TextLoss | None = None,
    heads: nn.Module | None = None,
) -> None:
    """Train the U-Net on encoded drawings (N, 16, 16, 16: mean and log-variance), and the text encoder's layers with it.

    The token embeddings are frozen, because personalization replaces one of them.

    Args:
        drawings: the first N are those encoded.
        words_rate: the peak learning rate of the text encoder's layers; 0 freezes them.
        batch: of all processes together.
        captions_per_image: variants; one caption in ten is empty, for classifier-free guidance.
        text_loss: terms of a further loss of the text encoder on captions of its own; its random numbers are from the generator.
            It keeps the text encoder transmitting what the U-Net does not need yet, as rare identifiers.
        heads: the layers of `text_loss`, which are trained further at `words_rate`.
    """
    device = default_device()
    ranks = process_rank()[1]
    if batch % ranks:
        raise ValueError(f"a batch of {batch} cannot be split among {ranks} processes")
    own = batch // ranks
    caption_encoder = CaptionEncoder(text_encoder.to(device).eval().requires_grad_(False))
    layers = [p for name, p in text_encoder.named_parameters() if "embedding" not in name]
    for parameter in layers:
        parameter.requires_grad_(words_rate > 0)
    schedule = DDPMScheduler(**SCHEDULE)
    snr = compute_snr(schedule, torch.arange(1000))
    weights_of_t = (snr.clamp(max=SNR_CAP) / snr).to(device)
    weights = subject_weights(drawings.labels[: len(encoded)]).to(device)
    encoded = encoded.to(device)
    empty = CaptionTokenizer(tokenizer)([Caption("", "")])
    captions = tokenize_drawings(drawings.select(slice(len(encoded))), tokenizer, captions_per_image)
    captions = TokenizedCaptions.concatenate([captions, empty]).to(device)

    def loss_of_step(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = random_rows(len(encoded), own, generator)
        caption_rows = rows * captions_per_image + random_rows(captions_per_image, own, generator)
        dropped = torch.rand(own, generator=generator, device=device) < 0.1
        chosen = captions[caption_rows.where(~dropped, len(captions) - 1)]
        with torch.set_grad_enabled(words_rate > 0):
            hidden, _ = caption_encoder(chosen)
        mean, logvar = encoded[rows].float().chunk(2, 1)
        noise = torch.randn(2, *mean.shape, generator=generator, device=device)
        z_0, epsilon = (mean + (0.5 * logvar).exp() * noise[0]) * scaling_factor, noise[1]
        t = random_rows(1000, own, generator)
        predicted = unet(schedule.add_noise(z_0, epsilon, t), t, hidden).sample.float()
        error = (predicted - epsilon).pow(2).mean(1)
        parts = {"loss": (error * weights[rows].float() * weights_of_t[t][:, None, None]).mean()}
        return parts | (text_loss(caption_encoder, generator) if text_loss is not None and words_rate else {})

    modules: dict[str, nn.Module] = {"unet": unet}
    if words_rate:
        modules["words"] = text_encoder
        if heads is not None:
            modules["heads"] = heads

    def optimizer(parameters: dict[str, nn.Parameter], rate: float) -> list[torch.optim.Optimizer]:
        own = [p for name, p in parameters.items() if name.startswith("unet.")]
        others = [p for name, p in parameters.items() if not name.startswith("unet.")]
        groups = [{"params": own}, {"params": others, "lr": rate * words_rate / learning_rate}]
        options = {"lr": rate, "weight_decay": 0.01, "betas": (0.9, 0.98), "fused": True}
        return [torch.optim.AdamW(groups if others else groups[:1], **options)]

    warm_up, average = (200, 0.999) if steps > 1000 else (max(1, steps // 5), max(0.0, 1 - 5 / steps))
    train(
        "unet", folder, modules, loss_of_step,
        steps=steps, learning_rate=learning_rate, optimizer=optimizer, seed=seed, warm_up=warm_up, average=average or None,
    )  # fmt: skip


def write_base(
    target: Path, unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder, tokenizer, *, name: str, revision: str
) -> None:
    """Write everything but the image tower in diffusers' layout: U-Net and VAE in float16, the text encoder in float32.

    diffusers reads weights as float32 unless it is told otherwise, and the float16 of U-Net and VAE is a format of the files.
    transformers 5 reads a text encoder in the dtype of its config instead, and Textual Inversion would then train the token
    table in float16, to NaN.
    """
    unet.half().save_pretrained(target / "unet")
    vae.half().save_pretrained(target / "vae")
    text_encoder.float().save_pretrained(target / "text_encoder")
    write_tokenizer(target / "tokenizer", tokenizer)
    write_scheduler(target / "scheduler")
    for config in target.glob("*/config.json"):
        settings = json.loads(config.read_text())
        settings.pop("_name_or_path", None)  # the folder it was trained in
        config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (target / "base.toml").write_text(
        f'schema = 1\nname = "{name}"\nlicence = "Apache-2.0"\nrevision = "{revision}"\nresolution = {RESOLUTION}\n'
        f"guidance = {GUIDANCE}\ndrawing_limits = {DRAWING_LIMITS}\n"
    )
    write_vocabulary(target)


def write_scheduler(folder: Path) -> None:
    """Write DPM-Solver++'s config with the schedule and what differs from the defaults.

    Without the other defaults: diffusers writes -Infinity among them, which is no JSON, and null for values that other schedulers
    have defaults of their own for.
    """
    DPMSolverMultistepScheduler(**SAMPLER).save_pretrained(folder)
    path = folder / "scheduler_config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k in SAMPLER or k.startswith("_")}
    path.write_text(json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_tokenizer(folder: Path, tokenizer) -> None:
    """Write a tokenizer with tokenizer.json, and with vocab.json and merges.txt, which many programs read instead."""
    tokenizer.save_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False) + "\n", encoding="utf-8")
    merges = "".join(f"{pair if isinstance(pair, str) else ' '.join(pair)}\n" for pair in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")


def write_vocabulary(target: Path) -> None:
    """Write the words that the base knows, vocabulary.json."""
    templates = [template for name in PAPER_DOMAINS for template in training_templates(find_domain(name))]
    lines = (f"{json.dumps(group)}: {json.dumps(words)}" for group, words in vocabulary(templates).items())
    (target / "vocabulary.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
