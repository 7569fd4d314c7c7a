"""Eq. 5 and its optimiser, once for both stages, which differ in what they pass in.

z_t   = √ᾱ_t z_0 + √(1−ᾱ_t) ε
E     = encoder(I_c, pooled features of the U-Net's encoder on z_t, "")        section 3.1
e_c   = e_domain + s · E                                                       eq. 1
L     = ‖ε − ε_θ(z_t, t, prompt with e_c at S*)‖² + λ_r ‖E‖²                   eq. 4, 2, 5
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .base_model import TextToImageModel, Tokens
from .nn.losses import diffusion_loss, embedding_penalty
from .nn.precision import full_precision
from .nn.unet_features import decoder_half, encoder_half, pooled_features, stem
from .nn.word_embedding_encoder import Encoder

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
    folded: Tensor
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
    beginning = stem(unet, z_t, batch.timesteps)
    features = None
    if encoder.reads_unet:
        nothing = model.empty_text.to(z_t.dtype).expand(len(z_t), -1, -1)
        features = pooled_features(encoder_half(unet, beginning, nothing)).to(batch.folded.dtype)
        if detach_features:
            # Not torch.no_grad around the pass: the main pass shares its evaluated ΔW.
            features = features.detach()
    with full_precision(z_t.device):  # a few small layers: exact for free
        offset = encoder.refine(batch.folded, features)
    text = model.embed_prompts(batch.tokens, e_domain + scale * offset).to(z_t.dtype)
    prediction = decoder_half(unet, encoder_half(unet, beginning, text), text)
    target = model.target(batch.z_0, batch.epsilon, batch.timesteps)
    return Losses(
        diffusion=diffusion_loss(prediction, target, batch.mask),
        penalty=embedding_penalty(offset),
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


def evaluated_once(unet: nn.Module) -> AbstractContextManager[None]:
    """Evaluate each ΔW once for the feature pass and the main pass, inside a `with` block.

    Not under gradient checkpointing: what backward recomputes has to be what forward computed.
    """
    if getattr(unet, "is_gradient_checkpointing", False):
        return nullcontext()
    return parametrize.cached()
