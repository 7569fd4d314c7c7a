"""Tells the drawings that a base was trained on from other images, such as photographs.

A base that knows drawings only (`Base.drawing_limits`) neither denoises a photograph nor reproduces its texture.
Either measure alone is misled: the loss by a drawing that is rotated or framed, the error by fine strokes.
"""

from __future__ import annotations

import torch
from PIL import Image

from e4t_cli.models.text_to_image import TextToImageModel

TIMESTEP = 100  # of 1000: little noise, so that the loss is about details
SAMPLES = 4


@torch.no_grad()
def drawing_scores(model: TextToImageModel, image: Image.Image) -> tuple[float, float]:
    """Return how far an image is from the base's training images.

    Args:
        image: as it is prepared for tuning.

    Returns:
        The denoising loss without a prompt, and the median over pixels of the VAE's mean absolute error, in −1 … 1.
    """
    pixels = model.pixels([image])  # (1, 3, side, side)
    z_0 = model.posterior(pixels).mean
    epsilon = torch.randn(SAMPLES, *model.latent_shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    t = torch.full((SAMPLES,), TIMESTEP * model.train_timesteps // 1000, device=model.device)
    z_0 = z_0.expand_as(epsilon)
    z_t = model.add_noise(z_0, epsilon, t)
    text = model.uncond_embeds.expand(SAMPLES, -1, -1)
    predicted = model.unet(z_t.to(model.dtype), t, text.to(model.dtype)).sample.float()
    loss = (predicted - model.target(z_0, epsilon, t)).square().mean()
    latents = (z_0[:1] / model.vae.config["scaling_factor"]).to(model.dtype)
    decoded = model.vae.decode(latents).sample.float().clamp(-1, 1)
    error = (decoded - pixels).abs().mean(1).median()
    return float(loss), float(error)


def is_drawing(model: TextToImageModel, image: Image.Image) -> bool:
    """Whether an image is like those that the base was trained on; True for a base without limits."""
    limits = model.base.drawing_limits
    if limits is None:
        return True
    scores = drawing_scores(model, image)
    return any(score <= limit for score, limit in zip(scores, limits, strict=True))
