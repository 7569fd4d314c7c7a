"""The three terms of section 3: eq. 4, eq. 2, and their sum, eq. 5.

L = L_diffusion + λ_r · L_reg

Eq. 5 and its optimiser, once for both stages, which differ in what they pass in.

z_t   = √ᾱ_t z_0 + √(1−ᾱ_t) ε
E     = encoder(I_c, pooled features of the U-Net's encoder on z_t, "")        section 3.1
e_c   = e_domain + s · E                                                       eq. 1
L     = ‖ε − ε_θ(z_t, t, prompt with e_c at S*)‖² + λ_r ‖E‖²                   eq. 4, 2, 5
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from e4t_cli.models.prompt_embedding import Tokens
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.precision import full_precision
from e4t_cli.nn.unet import down_and_mid, embed_latents, pooled_features, up_and_out
from e4t_cli.nn.word_embedding_encoder import Encoder

MIN_MASK_AREA = 0.01
"""Share of the picture under which a mask is taken for a failed one."""


def diffusion_loss(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Eq. 4 for each sample, inside the mask: Σ m·(prediction − target)² / (Σ m · channels).

    Args:
        prediction, target: (batch, channels, height, width).
        mask: soft weights in 0 … 1 (batch, height, width), or None for the whole picture.

    Returns:
        The loss of each sample, (batch,). Each is normalised by its own mask, so that neither the
        size of a subject nor the split into micro-batches changes its weight.
    """
    squared = (prediction - target).square()  # in the target's precision, not in bfloat16
    if mask is None:
        return squared.mean(dim=(1, 2, 3))
    weight = mask.unsqueeze(1)  # (batch, 1, height, width)
    return (weight * squared).sum(dim=(1, 2, 3)) / (weight.sum(dim=(1, 2, 3)) * squared.shape[1])


def regularization_loss(offset: Tensor) -> Tensor:
    """Eq. 2, ‖E(I_c)‖², for each sample: on the encoder's output, not on e_c. (batch,)."""
    return offset.square().sum(dim=1)


def latent_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring a mask of the picture to the size of its latents.

    Paper silent: by area, so that a border latent counts in part; and a mask of under 1 % of the
    picture is taken for "nothing found" and replaced by the whole picture.

    Args:
        mask: (batch, height, width) in 0 … 1.
        size: height and width of the latents.

    Returns:
        (batch, *size) in 0 … 1.
    """
    small = functional.adaptive_avg_pool2d(mask.unsqueeze(1), size).squeeze(1)
    found = small.mean(dim=(1, 2), keepdim=True) >= MIN_MASK_AREA
    return small.where(found, small.new_ones(()))


BETAS, WEIGHT_DECAY = (0.9, 0.999), 1e-2
"""Of AdamW, in both stages. Paper silent."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingBatch:
    """What eq. 5 is evaluated on.

    Args:
        z_0: latents of the pictures (batch, channels, height, width).
        timesteps: t of each sample (batch,).
        epsilon: the noise, shaped like z_0.
        folded: `encoder.fold` of the pictures' features (batch, hidden), differentiable.
        tokens: a training prompt for each sample.
        mask: soft weights of the diffusion loss (batch, height, width), or None.
    """

    z_0: Tensor
    timesteps: Tensor
    epsilon: Tensor
    encoded_image: Tensor
    tokens: Tokens
    mask: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Losses:
    """Eq. 4 and eq. 2 for each sample, (batch,)."""

    diffusion: Tensor
    penalty: Tensor

    def total(self, weight: float) -> Tensor:
        """Eq. 5 with λ_r = `weight`. Paper silent: both terms are means over the batch."""
        return (self.diffusion + weight * self.penalty).mean()


def training_loss(
    model: TextToImageModel,
    unet: nn.Module,
    encoder: Encoder,
    batch: TrainingBatch,
    *,
    e_domain: Tensor,
    scale: float,
    detach_features: bool = False,
) -> Losses:
    """Evaluate both terms of eq. 5.

    Args:
        model: the frozen base: noise schedule and text encoder.
        unet: the U-Net in training, with its offsets attached. Paper silent: the feature pass
            runs on the same weights ("the denoiser's U-net itself"), not on the base's.
        encoder: E.
        e_domain: embedding of the descriptor (embedding_width,).
        scale: s of eq. 1.
        detach_features: let no gradient through the feature pass. Paper silent: it flows by
            default, which is the exact gradient of eq. 5; without it a step costs an eighth less.
    """
    z_t = model.add_noise(batch.z_0, batch.epsilon, batch.timesteps).to(unet.dtype)
    beginning = embed_latents(unet, z_t, batch.timesteps)
    features = None
    if encoder.reads_unet:
        nothing = model.uncond_embeds.to(z_t.dtype).expand(len(z_t), -1, -1)
        features = pooled_features(down_and_mid(unet, beginning, nothing)).to(
            batch.encoded_image.dtype
        )
        if detach_features:
            # Not torch.no_grad around the pass: the main pass shares its evaluated ΔW.
            features = features.detach()
    with full_precision(z_t.device):  # a few small layers: exact for free
        offset = encoder.predict_offset(batch.encoded_image, features)
    text = model.embed_prompts(batch.tokens, e_domain + scale * offset).to(z_t.dtype)
    prediction = up_and_out(unet, down_and_mid(unet, beginning, text), text)
    target = model.target(batch.z_0, batch.epsilon, batch.timesteps)
    return Losses(
        diffusion=diffusion_loss(prediction, target, batch.mask),
        penalty=regularization_loss(offset),
    )


def adamw(*groups: tuple[nn.Module, float]) -> torch.optim.Optimizer:
    """Return AdamW over modules and their learning rates; a rate of zero freezes its module."""
    trained = []
    for module, rate in groups:
        module.requires_grad_(rate > 0)
        if rate > 0:
            trained.append({"params": list(module.parameters()), "lr": rate})
    # Fused: one pass over the weights, 40 % of a step on small models on the CPU.
    return torch.optim.AdamW(trained, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
