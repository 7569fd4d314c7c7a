"""Inference-time personalization (section 3.4): a few steps on one picture.

The encoder, the offsets and the U-Net itself are tuned by the same loss as in pre-training
(eq. 5). Each step sees the one picture 16 times, under 16 sentences and 16 noise levels:
"a large batch ensures that our model observes the concept across multiple time scales".
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .base_model import TextToImageModel
from .concept import TunedModel
from .domain import PreparedImage, TuningRecipe
from .errors import DivergedError, ResourceError
from .nn.losses import SMALLEST_MASK, latent_mask
from .nn.weight_offsets import WeightOffsets
from .pretrained import PretrainedDomain
from .progress import Progress, ProgressCallback
from .prompts import training_prompts
from .randomness import choose, draw
from .training_loss import (
    TrainingBatch,
    adamw,
    evaluated_once,
    half_precision,
    training_loss,
)


def tune(
    model: TextToImageModel,
    pretrained: PretrainedDomain,
    prepared: PreparedImage,
    recipe: TuningRecipe | None = None,
    *,
    seed: int = 0,
    image_features: Tensor | None = None,
    micro_batch: int | None = None,
    autocast: bool | None = None,
    detach_features: bool = False,
    on_progress: ProgressCallback | None = None,
) -> TunedModel:
    """Learn one concept from one picture; `model` and `pretrained` stay as they are.

    Args:
        model: the base.
        pretrained: encoder, offsets and training sentences of the domain. Baselines are other
            values of it: a `FixedEmbedding` for an encoder, no offsets, other sentences.
        prepared: the picture and, if the recipe asks for one, its mask.
        recipe: the pack's by default; with 0 steps the encoder's guess is used as it is, and a
            rate of 0 freezes its group of weights.
        seed: of every draw.
        image_features: the picture's, (layers, width), if they were computed before.
        micro_batch: samples per backward pass; the gradient is that of the whole batch, whatever
            it is. None takes the whole batch. Either is halved when memory runs out, and at 1
            gradient checkpointing comes to help.
        autocast: run the U-Net in bfloat16, with the trained weights in float32; None where the
            hardware has bfloat16.
        detach_features: see `training_loss`.
        on_progress: called after each step with its losses.

    Raises:
        DivergedError: a loss or a gradient is not finite.
        ResourceError: not even one sample at a time fits into memory.
    """
    recipe = recipe or pretrained.tuning
    run = _Tuning(model, pretrained, prepared, recipe, seed, image_features, autocast)
    run.detach_features = detach_features
    size = min(micro_batch or recipe.batch_size, recipe.batch_size)
    if on_progress and run.note:
        on_progress(Progress(stage="tune", done=0, total=recipe.steps, note=run.note))
    for step in range(run.steps):
        while True:
            try:
                diffusion, penalty = run.gradients(step, size)
                break
            except torch.OutOfMemoryError as error:
                if size == 1 and not run.unet.is_gradient_checkpointing:
                    run.unet.enable_gradient_checkpointing()
                elif size == 1:
                    raise ResourceError(
                        "tuning does not fit into memory, even one sample at a time",
                        hint="use a smaller base, or another device",
                    ) from error
                size = (size + 1) // 2
        run.update(step)
        if on_progress:
            values = {
                "loss": diffusion + recipe.embedding_penalty * penalty,
                "diffusion": diffusion,
                "penalty": penalty,
            }
            on_progress(Progress(stage="tune", done=step + 1, total=recipe.steps, values=values))
    return run.finish()


class _Tuning:
    """The copies in training, and one step of it."""

    def __init__(
        self,
        model: TextToImageModel,
        pretrained: PretrainedDomain,
        prepared: PreparedImage,
        recipe: TuningRecipe,
        seed: int,
        image_features: Tensor | None,
        autocast: bool | None,
    ) -> None:
        self.model, self.recipe, self.seed, self.autocast = model, recipe, seed, autocast
        rates = (recipe.encoder_rate, recipe.offsets_rate, recipe.unet_rate)
        self.steps = recipe.steps if max(rates) > 0 else 0
        self.note = ""
        self.detach_features = False
        device = model.device
        # In float32 whatever the base is kept in: a whole tuning moves a weight by less than
        # the spacing of bfloat16 numbers.
        self.unet = copy.deepcopy(model.unet).float()
        self.encoder = copy.deepcopy(pretrained.encoder).to(device)
        self.offsets = WeightOffsets.from_factors(pretrained.offsets).to(device)
        rate = recipe.learning_rate
        if self.steps:
            self.optimizer = adamw(
                (self.encoder, rate * recipe.encoder_rate),
                (self.offsets, rate * recipe.offsets_rate),
                (self.unet, rate * recipe.unet_rate),
            )
        if self.offsets.paths:
            self.offsets.attach_to(self.unet)
        self.scale = pretrained.embedding_scale
        self.descriptor_id = model.descriptor_id(pretrained.descriptor)
        self.e_domain = model.word_embedding(self.descriptor_id)
        self.tokens = model.tokenize(
            training_prompts(tuple(pretrained.templates)), self.descriptor_id
        )
        pixels = model.pixels([prepared.image])
        self.posterior = model.posterior(pixels)
        if image_features is None:
            self.image_features = model.image_features(pixels)
        else:
            self.image_features = image_features[None].to(device).float()
        self.mask = self._mask(prepared)

    def _mask(self, prepared: PreparedImage) -> Tensor | None:
        if not self.recipe.mask or prepared.mask is None:
            return None
        whole = self.model.masks([prepared.mask])
        if float(whole.mean()) < SMALLEST_MASK:
            self.note = "the mask is empty: tuning on the whole picture"
        return latent_mask(whole, self.model.latent_shape[1:])

    def gradients(self, step: int, micro_batch: int) -> tuple[float, float]:
        """Accumulate the gradient of one step; returns the means of eq. 4 and eq. 2."""
        self.optimizer.zero_grad()
        total = torch.zeros(2, device=self.model.device)
        size = self.recipe.batch_size
        for first in range(0, size, micro_batch):
            batch = self._batch(step, range(first, min(first + micro_batch, size)))
            with evaluated_once(self.unet), half_precision(self.model.device, self.autocast):
                losses = training_loss(
                    self.model,
                    self.unet,
                    self.encoder,
                    batch,
                    e_domain=self.e_domain,
                    scale=self.scale,
                    detach_features=self.detach_features,
                )
            share = len(batch.timesteps) / size
            (losses.total(self.recipe.embedding_penalty) * share).backward()
            parts = torch.stack((losses.diffusion.mean(), losses.penalty.mean()))
            total += share * parts.detach()
        diffusion, penalty = total.tolist()
        return diffusion, penalty

    def update(self, step: int) -> None:
        trained = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        try:
            # Paper silent: clipping. Over all three groups at once, as one gradient.
            nn.utils.clip_grad_norm_(
                trained, self.recipe.gradient_clip, error_if_nonfinite=True, foreach=True
            )
        except RuntimeError as error:
            raise DivergedError(
                f"tuning diverged at step {step + 1}: a gradient is not finite",
                hint="try a smaller learning rate",
            ) from error
        self.optimizer.step()

    def _batch(self, step: int, positions: range) -> TrainingBatch:
        draws = draw(
            self.seed,
            step,
            positions,
            batch_size=self.recipe.batch_size,
            train_timesteps=self.model.train_timesteps,
            shape=self.model.latent_shape,
        ).to(self.model.device)
        count = len(positions)
        return TrainingBatch(
            # Paper silent: one encode of the picture, a sample of its posterior for each element.
            z_0=self.posterior.sample(draws.posterior),
            timesteps=draws.timesteps,
            epsilon=draws.epsilon,
            folded=self.encoder.fold(self.image_features).expand(count, -1),
            tokens=self.tokens[choose(draws.uniform[:, 0], len(self.tokens.ids))],
            mask=None if self.mask is None else self.mask.expand(count, -1, -1),
        )

    @torch.no_grad()
    def finish(self) -> TunedModel:
        """Merge the offsets, in float32, and let go of everything that was for training."""
        if self.offsets.paths:
            self.offsets.bake()
        for part in (self.unet, self.encoder):
            part.zero_grad()
        self.unet.disable_gradient_checkpointing()
        # torch's own `to`: diffusers' logs a warning about casts that are meant.
        nn.Module.to(self.unet, self.model.dtype)
        return TunedModel(
            unet=self.unet.requires_grad_(False),
            encoder=self.encoder.requires_grad_(False),
            folded=self.encoder.fold(self.image_features),
            e_domain=self.e_domain,
            descriptor_id=self.descriptor_id,
            scale=self.scale,
        )
