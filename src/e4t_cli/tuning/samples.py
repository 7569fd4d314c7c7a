"""What a step of tuning is made of: one picture, under 16 noise levels and in 16 sentences."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from e4t_cli.base_model import TextToImageModel
from e4t_cli.domain import PreparedImage
from e4t_cli.nn.losses import SMALLEST_MASK, latent_mask
from e4t_cli.nn.word_embedding_encoder import Encoder
from e4t_cli.pretrained import PretrainedDomain
from e4t_cli.prompts import training_prompts
from e4t_cli.randomness import draw
from e4t_cli.recipes import TuningRecipe
from e4t_cli.training_loss import TrainingBatch


class Samples:
    """The picture, looked at once, and the samples of each step.

    Args:
        image_features: the picture's, (vectors, width), if they were computed before.
    """

    def __init__(
        self,
        model: TextToImageModel,
        pretrained: PretrainedDomain,
        prepared: PreparedImage,
        recipe: TuningRecipe,
        seed: int,
        image_features: Tensor | None = None,
    ) -> None:
        self.model, self.recipe, self.seed, self.note = model, recipe, seed, ""
        pixels = model.pixels([prepared.image])
        self.posterior = model.posterior(pixels)
        if image_features is None:
            self.image_features = pretrained.image_features(model, pixels)
        else:
            self.image_features = image_features[None].to(model.device).float()
        self.mask = self._mask(prepared)
        self.tokens = model.tokenize(
            training_prompts(tuple(pretrained.templates)),
            model.descriptor_id(pretrained.descriptor),
        )

    def _mask(self, prepared: PreparedImage) -> Tensor | None:
        if not self.recipe.mask or prepared.mask is None:
            return None
        whole = self.model.masks([prepared.mask])
        if float(whole.mean()) < SMALLEST_MASK:
            self.note = "the mask is empty: tuning on the whole picture"
        return latent_mask(whole, self.model.latent_shape[1:])

    def of(self, step: int) -> tuple[Tensor, ...]:
        """Return what is different in each step, on the device and always in the same shapes."""
        size = self.recipe.batch_size
        draws = draw(
            self.seed,
            step,
            range(size),
            batch_size=size,
            train_timesteps=self.model.train_timesteps,
            shape=self.model.latent_shape,
        ).to(self.model.device)
        sentences = draws.sentences(len(self.tokens.ids))
        return draws.posterior, draws.epsilon, draws.timesteps, sentences

    def batch(self, some: Sequence[Tensor], encoder: Encoder) -> TrainingBatch:
        """Return what eq. 5 is evaluated on.

        Args:
            some: what `of` returned, or the same rows of each.
            encoder: E; the picture's part of it is computed anew, with a gradient.
        """
        posterior, epsilon, timesteps, sentences = some
        count = len(timesteps)
        return TrainingBatch(
            # Paper silent: one encode of the picture, a sample of its posterior for each element.
            z_0=self.posterior.sample(posterior),
            timesteps=timesteps,
            epsilon=epsilon,
            folded=encoder.fold(self.image_features).expand(count, -1),
            tokens=self.tokens[sentences],
            mask=None if self.mask is None else self.mask.expand(count, -1, -1),
        )
