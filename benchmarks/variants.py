"""The variants of tuning that are compared; each is a function that runs some steps.

full         this program, full fine-tuning as in the paper
lora         this program, --tuning lora
naive        a direct implementation of the same equation: a U-Net forward pass for the features,
             the image tower at every step on 16 copies, dense offset networks in every forward
             pass, float32, torch's unfused optimizer
dreambooth   fine-tuning the U-Net on diffusers' modules: a batch of the photo and one class
             image, the VAE at every step
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.workload import Workload
from e4t_cli.nn.unet import down_and_mid, embed_latents, pooled_features
from e4t_cli.nn.weight_offsets import WeightOffset, WeightOffsets
from e4t_cli.prompts import parse_prompt
from e4t_cli.training.tuning import tune

BATCH = 16
Variant = Callable[[Workload, int], None]


def full(workload: Workload, steps: int) -> None:
    tune(workload.model, workload.pack, workload.photo, workload.pack.tuning.replace(steps=steps))


def lora(workload: Workload, steps: int) -> None:
    config = workload.pack.tuning.replace(steps=steps, method="lora")
    tune(workload.model, workload.pack, workload.photo, config)


class DenseOffset(WeightOffset):
    """ΔW as in the paper's figure: linear layers over the rows and columns of an M × N matrix."""

    def delta(self) -> Tensor:
        product = torch.outer(self.to_rows(self.initial), self.to_columns(self.initial))
        return self.over_columns(self.over_rows(product.T).T)


def naive(workload: Workload, steps: int) -> None:
    model, pack = workload.model, workload.pack
    device = model.device
    unet = copy.deepcopy(model.unet).float().requires_grad_(True)
    encoder = copy.deepcopy(pack.encoder).to(device)
    offsets = WeightOffsets.for_unet(unet, DenseOffset).to(device)
    offsets.attach_to(unet)  # registers its weights in the U-Net
    weights = [*unet.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1.6e-5, foreach=False)
    descriptor = model.descriptor_id(pack.descriptor)
    e_domain = model.word_embedding(descriptor)
    tokens = model.tokenize([parse_prompt("a photo of S*")] * BATCH, descriptor)
    empty = model.tokenize([""] * BATCH, descriptor)
    for _ in range(steps):
        pixels = model.pixels([workload.photo.image] * BATCH)
        z_0 = model.posterior(pixels).sample(torch.randn(BATCH, *model.latent_shape, device=device))
        t = torch.randint(0, model.train_timesteps, (BATCH,), device=device)
        epsilon = torch.randn_like(z_0)
        z_t = model.add_noise(z_0, epsilon, t)
        with torch.no_grad():
            uncond_embeds = model.embed_prompts(empty).float()
        features = pooled_features(down_and_mid(unet, embed_latents(unet, z_t, t), uncond_embeds))
        offset = encoder(model.image_features(pixels), features)
        text = model.embed_prompts(tokens, e_domain + 0.1 * offset).float()
        loss = functional.mse_loss(unet(z_t, t, text).sample, epsilon)
        (loss + 0.1 * offset.square().sum(dim=1).mean()).backward()
        loss.item()  # for the progress bar
        torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=False)
        optimizer.step()
        optimizer.zero_grad()


def dreambooth(workload: Workload, steps: int) -> None:
    model = workload.model
    device = model.device
    unet = copy.deepcopy(model.unet).float().requires_grad_(True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=5e-6)
    descriptor = model.descriptor_id(workload.pack.descriptor)
    tokens = model.tokenize(["a photo of a face"] * 2, descriptor)
    for _ in range(steps):
        pixels = model.pixels([workload.photo.image] * 2)
        z_0 = model.posterior(pixels).sample(torch.randn(2, *model.latent_shape, device=device))
        t = torch.randint(0, model.train_timesteps, (2,), device=device)
        epsilon = torch.randn_like(z_0)
        text = model.embed_prompts(tokens).detach().float()
        predicted = unet(model.add_noise(z_0, epsilon, t), t, text).sample
        own, prior = (predicted - epsilon).square().chunk(2)
        (own.mean() + prior.mean()).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


VARIANTS: dict[str, Variant] = {
    "full": full,
    "lora": lora,
    "naive": naive,
    "dreambooth": dreambooth,
}
