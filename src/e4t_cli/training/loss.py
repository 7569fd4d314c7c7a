"""The losses of section 3.3: eq. 4 (diffusion), eq. 2 (regularization) and their sum, eq. 5.

z_t   = √ᾱ_t z_0 + √(1−ᾱ_t) ε
E     = encoder(I_c, pooled features of the U-Net's encoder on z_t, "")        section 3.1
e_c   = e_domain + s · E                                                       eq. 1
L     = ‖ε − ε_θ(z_t, t, prompt with e_c at S*)‖² + λ_r ‖E‖²                   eq. 4, 2, 5
"""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional

from e4t_cli.models.prompt_embedding import Tokens
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.precision import full_precision
from e4t_cli.nn.unet import down_and_mid, embed_latents, pooled_features, up_and_out
from e4t_cli.nn.word_embedding_encoder import Encoder

MIN_MASK_AREA = 0.01  # share of the image below which a mask counts as a failed one


def diffusion_loss(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Eq. 4 for each sample, inside the mask: Σ m·(prediction − target)² / (Σ m · channels).

    Departure: eq. 4 has no denominator and the paper's mask only multiplies (section 3.4). Divided
    by the mask's own area, the loss weighs a small subject like a large one, against the same λ_r,
    and does not depend on the split into micro-batches.

    Args:
        prediction, target: (batch, channels, height, width).
        mask: soft weights in 0 … 1 (batch, height, width), or None for the whole image.

    Returns (batch,).
    """
    squared = (prediction - target).square()  # in the target's dtype, not in bfloat16
    if mask is None:
        return squared.mean(dim=(1, 2, 3))
    weight = mask.unsqueeze(1)  # (batch, 1, height, width)
    return (weight * squared).sum(dim=(1, 2, 3)) / (weight.sum(dim=(1, 2, 3)) * squared.shape[1])


def regularization_loss(offset: Tensor) -> Tensor:
    """Eq. 2, ‖E(I_c)‖², for each sample: on the encoder's output, not on e_c. (batch,)."""
    return offset.square().sum(dim=1)


def latent_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Downsample a mask of the image to the size of its latents.

    Paper silent: by area, so that a latent on the border counts in part; and a mask of under 1 %
    of the image is taken for "nothing found" and replaced by the whole image.

    Args:
        mask: (batch, height, width) in 0 … 1.
        size: height and width of the latents.

    Returns:
        (batch, *size) in 0 … 1.
    """
    small = functional.adaptive_avg_pool2d(mask.unsqueeze(1), size).squeeze(1)
    found = small.mean(dim=(1, 2), keepdim=True) >= MIN_MASK_AREA
    return small.where(found, small.new_ones(()))


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingBatch:
    """The samples that eq. 5 is evaluated on."""

    z_0: Tensor  # latents of the images (batch, channels, height, width)
    timesteps: Tensor  # t of each sample (batch,)
    epsilon: Tensor  # the noise, shaped like z_0
    encoded_image: Tensor  # `encoder.encode_image` of their features (batch, hidden), differentiable
    tokens: Tokens  # a training prompt for each sample
    mask: Tensor | None = None  # soft weights of the diffusion loss (batch, height, width)


@dataclass(frozen=True, kw_only=True, eq=False)
class Losses:
    """Eq. 4 and eq. 2 for each sample, (batch,)."""

    diffusion: Tensor
    regularization: Tensor

    def total(self, weight: float) -> Tensor:
        """Eq. 5 with λ_r = `weight`. Paper silent: both terms are means over the batch."""
        return (self.diffusion + weight * self.regularization).mean()


def training_loss(
    model: TextToImageModel,
    unet: UNet2DConditionModel,
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
        detach_features: stop the gradient at the feature pass. Paper silent: it flows by default,
            which is the exact gradient of eq. 5; without it a step costs an eighth less.
    """
    z_t = model.add_noise(batch.z_0, batch.epsilon, batch.timesteps).to(unet.dtype)
    embedded = embed_latents(unet, z_t, batch.timesteps)
    features = None
    if encoder.reads_unet:
        uncond = model.uncond_embeds.to(z_t.dtype).expand(len(z_t), -1, -1)
        features = pooled_features(down_and_mid(unet, embedded, uncond)).to(batch.encoded_image.dtype)
        if detach_features:  # not torch.no_grad around the pass: the main pass shares its cached ΔW
            features = features.detach()
    with full_precision(z_t.device):  # a few small layers: exact for free
        offset = encoder.predict_offset(batch.encoded_image, features)
    text = model.embed_prompts(batch.tokens, e_domain + scale * offset).to(z_t.dtype)
    prediction = up_and_out(unet, down_and_mid(unet, embedded, text), text)
    target = model.target(batch.z_0, batch.epsilon, batch.timesteps)
    return Losses(diffusion=diffusion_loss(prediction, target, batch.mask), regularization=regularization_loss(offset))
