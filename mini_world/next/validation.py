"""Validates pre-training on held-out identities: does the predicted embedding represent the identity?

`own` and `swapped`: the loss on an image when the encoder's input is that image, and when it is another one.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import torch

from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.nn.randomness import choose, draw
from e4t_cli.nn.weight_offsets import WeightOffsets
from e4t_cli.pretraining.encoded_images import EncodedImages
from e4t_cli.pretraining.loop import PretrainingStep
from e4t_cli.prompts import training_prompts
from e4t_cli.training.loss import TrainingBatch, training_loss

EVERY = 250  # steps


@torch.no_grad()
def own_and_swapped(model, data: EncodedImages, pretrained: DomainWeights) -> tuple[float, float]:
    """Mean loss of eq. 4 with each image's own embedding and with its neighbour's, for the same noise.

    Args:
        model: the base, a `TextToImageModel`.
        data: held-out images, neighbours of another identity.
    """
    count, device = len(data), model.device
    descriptor = model.descriptor_id(pretrained.descriptor)
    tokens = model.tokenize(training_prompts(pretrained.templates), descriptor)
    draws = draw(5, 0, range(count), batch_size=count, train_timesteps=model.train_timesteps, shape=model.latent_shape)
    draws, z_0 = draws.to(device), data.means.to(device).float()
    offsets, encoder = WeightOffsets.from_factors(pretrained.offsets).to(device), pretrained.encoder.to(device)
    encoded_image = encoder.encode_image(data.image_features.to(device).float())
    found = []
    with offsets.attached_to(model.unet):
        for features in (encoded_image, encoded_image.roll(1, 0)):
            batch = TrainingBatch(
                z_0=z_0,
                timesteps=draws.timesteps,
                epsilon=draws.epsilon,
                encoded_image=features,
                tokens=tokens[choose(draws.uniform[:, 0], len(tokens.ids))],
                mask=None if data.masks is None else data.masks.to(device).float(),
            )
            losses = training_loss(
                model, model.unet, encoder, batch, e_domain=model.word_embedding(descriptor), scale=pretrained.embedding_scale
            )
            found.append(float(losses.diffusion.mean()))
    return found[0], found[1]


class ValidationLogger:
    """Called after every step of `pretrain_domain`; writes a line every 250 steps and at the end to `path`."""

    def __init__(self, model, data: EncodedImages, path: Path, last: int) -> None:
        self.model, self.data, self.path, self.last = model, data, path, last
        self.facts: dict[str, float] = {}

    def __call__(self, step: PretrainingStep) -> None:
        if step.step % EVERY and step.step != self.last:
            return
        self.measure(step.step, step.snapshot())
        with self.path.open("a") as log:
            log.write(json.dumps(self.facts) + "\n")

    def measure(self, step: int, pretrained: DomainWeights) -> dict[str, float]:
        """What `own_and_swapped` finds, with the relative difference and the size of the weight offsets."""
        own, swapped = own_and_swapped(self.model, self.data, pretrained)
        squares = [(a.float() @ b.float()).pow(2).mean().item() for a, b in pretrained.offsets.values()]
        found = {"own": own, "swapped": swapped, "gap": (swapped - own) / own, "offset_rms": float(numpy.mean(squares) ** 0.5)}
        self.facts = {"step": step} | {key: round(value, 5) for key, value in found.items()}
        return self.facts
