"""The arms: ways of tuning on one photo, each a function that runs some steps.

exact        this program, as the paper describes it
adapters     this program, --tuning lora
naive        the same equation, written down plainly: the feature pass from the picture's own
             U-Net forward, the image tower at every step on 16 copies, dense offset networks
             at every forward, float32, torch's unfused optimiser
dreambooth   fine-tuning the U-Net on diffusers' modules: the photo and as many class pictures
             in a batch of 1 + 1, the VAE at every step
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.worlds import World
from e4t_cli.nn.unet import down_and_mid, embed_latents, pooled_features
from e4t_cli.nn.weight_offsets import WeightOffset, WeightOffsets
from e4t_cli.prompts import parse_prompt
from e4t_cli.training.tuning import tune

BATCH = 16
Arm = Callable[[World, int], None]


def exact(world: World, steps: int) -> None:
    tune(world.model, world.pack, world.photo, world.pack.tuning.replace(steps=steps))


def adapters(world: World, steps: int) -> None:
    config = world.pack.tuning.replace(steps=steps, method="lora")
    tune(world.model, world.pack, world.photo, config)


class DenseOffset(WeightOffset):
    """ΔW as the paper draws it: linear layers over the rows and columns of an M × N product."""

    def delta(self) -> Tensor:
        product = torch.outer(self.to_rows(self.initial), self.to_columns(self.initial))
        return self.over_columns(self.over_rows(product.T).T)


def naive(world: World, steps: int) -> None:
    model, pack = world.model, world.pack
    device = model.device
    unet = copy.deepcopy(model.unet).float().requires_grad_(True)
    encoder = copy.deepcopy(pack.encoder).to(device)
    offsets = WeightOffsets.for_unet(unet, DenseOffset).to(device)
    offsets.attach_to(unet)  # its weights are the U-Net's from here on
    weights = [*unet.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1.6e-5, foreach=False)
    descriptor = model.descriptor_id(pack.descriptor)
    e_domain = model.word_embedding(descriptor)
    tokens = model.tokenize([parse_prompt("a photo of S*")] * BATCH, descriptor)
    empty = model.tokenize([""] * BATCH, descriptor)
    for _ in range(steps):
        pixels = model.pixels([world.photo.image] * BATCH)
        z_0 = model.posterior(pixels).sample(torch.randn(BATCH, *model.latent_shape, device=device))
        t = torch.randint(0, model.train_timesteps, (BATCH,), device=device)
        epsilon = torch.randn_like(z_0)
        z_t = model.add_noise(z_0, epsilon, t)
        with torch.no_grad():
            nothing = model.embed_prompts(empty).float()
        features = pooled_features(down_and_mid(unet, embed_latents(unet, z_t, t), nothing))
        offset = encoder(model.image_features(pixels), features)
        text = model.embed_prompts(tokens, e_domain + 0.1 * offset).float()
        loss = functional.mse_loss(unet(z_t, t, text).sample, epsilon)
        (loss + 0.1 * offset.square().sum(dim=1).mean()).backward()
        loss.item()  # for the progress bar
        torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=False)
        optimizer.step()
        optimizer.zero_grad()


def dreambooth(world: World, steps: int) -> None:
    model = world.model
    device = model.device
    unet = copy.deepcopy(model.unet).float().requires_grad_(True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=5e-6)
    descriptor = model.descriptor_id(world.pack.descriptor)
    tokens = model.tokenize(["a photo of a face"] * 2, descriptor)
    for _ in range(steps):
        pixels = model.pixels([world.photo.image] * 2)
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


ARMS: dict[str, Arm] = {
    "exact": exact,
    "adapters": adapters,
    "naive": naive,
    "dreambooth": dreambooth,
}
