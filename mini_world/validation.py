"""Validates pre-training on held-out identities: does the predicted embedding represent the identity?

`own` and `swapped`: the loss on an image when the encoder's input is that image, and when it is another one. `identity`: the
judge's score of images generated without tuning.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import torch

from e4t_cli.nn.randomness import choose, draw
from e4t_cli.nn.weight_offsets import WeightOffsets
from e4t_cli.pretraining.loop import PretrainingStep
from e4t_cli.prompts import training_prompts
from e4t_cli.registry.config import TuningConfig
from e4t_cli.schedulers import SamplingConfig
from e4t_cli.training.loss import TrainingBatch, training_loss
from mini_world.data import Drawings
from mini_world.domains import encode_drawings
from mini_world.evaluate import held_out_photos, run_method, tuned_method

SAMPLING = SamplingConfig(steps=12, guidance=3.0)
NO_TUNING = TuningConfig(steps=0, base_learning_rate=1e-6, reg_weight=0.0)


class ValidationLogger:
    """Called after every step of `pretrain_domain`; writes a line every 250 steps to `watch-<name>.jsonl`."""

    def __init__(self, model, folder: Path, name: str, drawings: Drawings, judge=None, photos: int = 6) -> None:
        self.model, self.name, self.judge = model, name, judge
        self.path = folder / f"watch-{name}.jsonl"
        some = drawings.select(slice(64))
        self.data = encode_drawings(model, some, folder / f"encoded-heldout-{name}.safetensors", masks=name != "art")
        self.photos = held_out_photos(name, photos, seed=77)

    def __call__(self, step: PretrainingStep) -> None:
        if step.step % 250 and step.step != 50:
            return
        pretrained = step.snapshot()
        own, swapped = self.losses(pretrained)
        line = {"step": step.step, "own": own, "swapped": swapped, "gap": (swapped - own) / own}
        if self.judge is not None:
            method = tuned_method(self.model, pretrained, NO_TUNING)
            scores = run_method(self.model, self.judge, self.name, self.photos, method, SAMPLING).summary()
            line |= {"identity": scores["identity"], "prompt": scores["prompt"]}
        line["offset_rms"] = float(numpy.sqrt(numpy.mean([(a @ b).pow(2).mean().item() for a, b in pretrained.offsets.values()])))
        with self.path.open("a") as log:
            log.write(json.dumps({k: round(v, 5) for k, v in line.items()}) + "\n")

    @torch.no_grad()
    def losses(self, pretrained) -> tuple[float, float]:
        """Masked loss with the image's own embedding and with its neighbour's, for the same noise."""
        model, data, count, device = self.model, self.data, len(self.data), self.model.device
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
