"""Which pictures, in which sentences, under which noise: a function of seed, step and position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from e4t_cli.base_model import Posterior, TextToImageModel, Tokens
from e4t_cli.nn.precision import full_precision, half_precision
from e4t_cli.nn.word_embedding_encoder import WordEmbeddingEncoder
from e4t_cli.prompts import training_prompts
from e4t_cli.randomness import Draws, draw, sent
from e4t_cli.recipes import PretrainingRecipe
from e4t_cli.training_loss import (
    Losses,
    TrainingBatch,
    evaluated_once,
    training_loss,
)

from .encoding import TrainingData


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """What one forward pass is given, on the model's device.

    Args:
        z_0: latents (batch, channels, height, width).
        timesteps: t of each sample (batch,).
        epsilon: the noise, shaped like z_0.
        image_features: what the encoder is shown (batch, layers, width).
        tokens: a training prompt for each sample.
        mask: soft weights of the diffusion loss (batch, height, width), or None.
    """

    z_0: Tensor
    timesteps: Tensor
    epsilon: Tensor
    image_features: Tensor
    tokens: Tokens
    mask: Tensor | None = None


class Batches:
    """The samples of each step, or those at some positions of its batch.

    Args:
        batch_size: of the whole batch of a step, over all processes and micro-batches.
    """

    def __init__(
        self,
        model: TextToImageModel,
        data: TrainingData,
        recipe: PretrainingRecipe,
        templates: Sequence[str],
        descriptor_id: int,
        seed: int,
        batch_size: int | None = None,
    ) -> None:
        self.model, self.data, self.recipe, self.seed = model, data, recipe, seed
        self.batch_size = batch_size or recipe.batch_size
        self.tokens: Tokens = model.tokenize(training_prompts(tuple(templates)), descriptor_id)
        self._drawn: tuple[int, Draws] | None = None

    def of(self, step: int, positions: range | None = None) -> Samples:
        """Return the samples at `positions` of a step's batch; None is all of it."""
        positions = range(self.batch_size) if positions is None else positions
        device = self.model.device
        draws = self._draws(step)[positions].to(device)
        rows = self.data.rows(
            seed=self.seed, step=step, positions=positions, batch_size=self.batch_size
        )
        posterior = Posterior(
            mean=sent(rows.means, device).float(), logvar=sent(rows.logvars, device).float()
        )
        masks = None
        if self.recipe.mask and rows.masks is not None:
            masks = sent(rows.masks, device).float()
        return Samples(
            z_0=posterior.sample(draws.posterior),
            timesteps=draws.timesteps,
            epsilon=draws.epsilon,
            image_features=sent(rows.image_features, device).float(),
            tokens=self.tokens[draws.sentences(len(self.tokens.ids))],
            mask=masks,
        )

    def _draws(self, step: int) -> Draws:
        """Draw for the whole batch, once for all micro-batches of a step."""
        if self._drawn is None or self._drawn[0] != step:
            size, model = self.batch_size, self.model
            draws = draw(
                self.seed,
                step,
                range(size),
                batch_size=size,
                train_timesteps=model.train_timesteps,
                shape=model.latent_shape,
            )
            self._drawn = (step, draws)
        return self._drawn[1]


class Objective(nn.Module):
    """Eq. 5 as one module with one forward pass, whose parameters are those that learn.

    Both passes through the U-Net are inside, so that an engine that exchanges gradients between
    processes sees each of them used once a step. The frozen base is out of its sight: it is
    neither sent to the other processes nor given gradients.

    Args:
        half: the format of the products, None for that of the weights.
    """

    def __init__(
        self,
        model: TextToImageModel,
        unet: nn.Module,
        encoder: WordEmbeddingEncoder,
        offsets: nn.Module,
        *,
        e_domain: Tensor,
        scale: float,
        half: torch.dtype | None = None,
        detach_features: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.offsets = encoder, offsets
        self._frozen = (model, unet, e_domain)  # a tuple hides modules from nn.Module
        self.scale, self.half, self.detach_features = scale, half, detach_features

    def forward(self, samples: Samples) -> Losses:
        model, unet, e_domain = self._frozen
        with full_precision(model.device):
            folded = self.encoder.fold(samples.image_features)
        batch = TrainingBatch(
            z_0=samples.z_0,
            timesteps=samples.timesteps,
            epsilon=samples.epsilon,
            folded=folded,
            tokens=samples.tokens,
            mask=samples.mask,
        )
        cast = unet.dtype != self.half
        with evaluated_once(unet), half_precision(model.device, self.half, cast=cast):
            return training_loss(
                model,
                unet,
                self.encoder,
                batch,
                e_domain=e_domain,
                scale=self.scale,
                detach_features=self.detach_features,
            )
