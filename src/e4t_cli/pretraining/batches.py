"""Which pictures, in which sentences, under which noise: a function of seed and step alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from e4t_cli.base_model import Posterior, TextToImageModel, Tokens
from e4t_cli.domain import PretrainingRecipe
from e4t_cli.nn.precision import full_precision
from e4t_cli.nn.word_embedding_encoder import WordEmbeddingEncoder
from e4t_cli.prompts import training_prompts
from e4t_cli.randomness import choose, draw, epoch_order
from e4t_cli.training_loss import TrainingBatch

from .encoding import EncodedImages


class Batches:
    """The samples of each step: which pictures, in which sentences, under which noise."""

    def __init__(
        self,
        model: TextToImageModel,
        data: EncodedImages,
        recipe: PretrainingRecipe,
        templates: Sequence[str],
        descriptor_id: int,
        seed: int,
    ) -> None:
        self.model, self.data, self.recipe, self.seed = model, data, recipe, seed
        self.tokens: Tokens = model.tokenize(training_prompts(tuple(templates)), descriptor_id)
        self._orders: dict[int, Tensor] = {}

    def of(self, step: int, encoder: WordEmbeddingEncoder) -> TrainingBatch:
        data, device, size = self.data, self.model.device, self.recipe.batch_size
        draws = draw(
            self.seed,
            step,
            range(size),
            batch_size=size,
            train_timesteps=self.model.train_timesteps,
            shape=self.model.latent_shape,
        ).to(device)
        index = self._indices(step)
        shown = index
        if data.encoder_index is not None:
            choice = choose(draws.uniform[:, 1].cpu(), data.encoder_index.shape[1])
            shown = data.encoder_index[index, choice].long()
        posterior = Posterior(
            mean=data.means[index].to(device).float(), logvar=data.logvars[index].to(device).float()
        )
        masks = None
        if self.recipe.mask and data.masks is not None:
            masks = data.masks[index].to(device).float()
        with full_precision(device):
            folded = encoder.fold(data.image_features[shown].to(device).float())
        return TrainingBatch(
            z_0=posterior.sample(draws.posterior),
            timesteps=draws.timesteps,
            epsilon=draws.epsilon,
            folded=folded,
            tokens=self.tokens[choose(draws.uniform[:, 0], len(self.tokens.ids))],
            mask=masks,
        )

    def _indices(self, step: int) -> Tensor:
        """Walk through a new order of all pictures in each epoch."""
        size, count = self.recipe.batch_size, len(self.data)
        places = range(step * size, (step + 1) * size)
        epochs = {place // count for place in places}
        for epoch in epochs - self._orders.keys():
            self._orders[epoch] = epoch_order(self.seed, epoch, count)
        self._orders = {epoch: self._orders[epoch] for epoch in epochs}
        return torch.stack([self._orders[place // count][place % count] for place in places])
