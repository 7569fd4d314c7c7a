"""The loop of domain pre-training (section 3.3)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from e4t_cli.base_model import TextToImageModel
from e4t_cli.domain import PretrainingRecipe, TuningRecipe
from e4t_cli.errors import DivergedError
from e4t_cli.nn.weight_offsets import WeightOffsets
from e4t_cli.nn.word_embedding_encoder import WordEmbeddingEncoder
from e4t_cli.pretrained import PretrainedDomain
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.randomness import generator
from e4t_cli.training_loss import adamw, evaluated_once, half_precision, training_loss

from .batches import Batches
from .checkpoints import Checkpoints
from .encoding import EncodedImages

REPORT_EVERY = 10
"""Steps between two progress reports; a report waits for the device."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PretrainingStep:
    """What `on_step` sees after each optimiser step.

    Args:
        step: steps done, 1 …
        encoder, offsets: in training; look, do not touch.
        diffusion, penalty: eq. 4 and eq. 2 of this step's samples (batch,), detached.
        snapshot: call it for a copy of the domain as it is now, ready for `tune`.
    """

    step: int
    encoder: WordEmbeddingEncoder
    offsets: WeightOffsets
    diffusion: Tensor
    penalty: Tensor
    snapshot: Callable[[], PretrainedDomain]


def pretrain_domain(
    model: TextToImageModel,
    data: EncodedImages,
    *,
    name: str,
    descriptor: str,
    recipe: PretrainingRecipe,
    tuning: TuningRecipe,
    templates: Sequence[str],
    seed: int = 0,
    licence: str = "",
    notes: str = "",
    autocast: bool | None = None,
    detach_features: bool = False,
    hidden_width: int | None = None,
    checkpoints: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = True,
    on_progress: ProgressCallback | None = None,
    on_step: Callable[[PretrainingStep], None] | None = None,
) -> PretrainedDomain:
    """Train a domain's encoder and offsets on a frozen base.

    Args:
        data: from `encode_images` with this model.
        name, descriptor: of the domain.
        recipe: the numbers of training.
        tuning: the recipe that the pack will carry for personalization.
        templates: training sentences with "{}" in the concept's place.
        seed: of the first weights and of every draw.
        licence, notes: for the pack's card.
        autocast: run the U-Net in bfloat16, with the trained weights in float32; None where the
            hardware has bfloat16.
        detach_features: see `training_loss`.
        hidden_width: of the encoder; None takes the image tower's width.
        checkpoints: a folder for resumable state; the last two are kept. None keeps none.
        checkpoint_every: steps between checkpoints.
        resume: go on from the newest checkpoint in the folder, if there is one.
        on_progress: called every few steps with the mean losses since the last report.
        on_step: called after each step.

    Raises:
        UsageError: the checkpoints are those of another run.
        DivergedError: a loss is not finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "initial").initial_seed())
        encoder = WordEmbeddingEncoder(model.encoder_config(hidden_width)).to(model.device)
        offsets = WeightOffsets.for_unet(model.unet).to(model.device)
    # A copy, so that the model stays usable, also for what `on_step` draws; in float32, because
    # in half precision a small ΔW would be lost in the product.
    unet = copy.deepcopy(model.unet).float()
    optimizer = adamw(
        (encoder, recipe.learning_rate * recipe.encoder_rate),
        (offsets, recipe.learning_rate * recipe.offsets_rate),
    )
    descriptor_id = model.descriptor_id(descriptor)
    batches = Batches(model, data, recipe, templates, descriptor_id, seed)
    e_domain = model.word_embedding(descriptor_id)
    state = {"encoder": encoder, "offsets": offsets, "optimizer": optimizer}
    run = {
        "name": name,
        "descriptor": descriptor,
        "base": model.fingerprint,
        "data": data.fingerprint,
        "seed": seed,
        "templates": list(templates),
        "autocast": autocast,
        "detach_features": detach_features,
        "encoder": encoder.config.as_dict(),
        "recipe": {key: value for key, value in recipe.as_dict().items() if key != "steps"},
    }
    folder = Path(checkpoints) if checkpoints is not None else None
    history = Checkpoints(folder, run) if folder is not None else None
    done = history.restore(**state) if history is not None and resume else 0

    def snapshot() -> PretrainedDomain:
        return PretrainedDomain(
            name=name,
            descriptor=descriptor,
            base_name=model.base.name,
            base_fingerprint=model.fingerprint,
            encoder=copy.deepcopy(encoder).cpu(),
            offsets={key: (a.cpu(), b.cpu()) for key, (a, b) in offsets.factors().items()},
            tuning=tuning,
            pretraining=recipe,
            templates=tuple(templates),
            images=len(data),
            licence=licence,
            notes=notes,
        )

    offsets.attach_to(unet)
    recent: list[Tensor] = []
    for step in range(done, recipe.steps):
        with evaluated_once(unet), half_precision(model.device, autocast):
            losses = training_loss(
                model,
                unet,
                encoder,
                batches.of(step, encoder),
                e_domain=e_domain,
                scale=recipe.embedding_scale,
                detach_features=detach_features,
            )
        losses.total(recipe.embedding_penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
        diffusion, penalty = losses.diffusion.detach(), losses.penalty.detach()
        recent.append(torch.stack((diffusion.mean(), penalty.mean())))
        finished = step + 1
        saving = history is not None and (
            finished % checkpoint_every == 0 or finished == recipe.steps
        )
        if saving or finished % REPORT_EVERY == 0 or finished == recipe.steps:
            # Paper silent: no gradient clipping here, so a bad number shows in the loss.
            mean = torch.stack(recent).mean(dim=0).tolist()
            recent.clear()
            values = {
                "loss": mean[0] + recipe.embedding_penalty * mean[1],
                "diffusion": mean[0],
                "penalty": mean[1],
            }
            _check_finite(values["loss"], finished, "pre-training")
            if on_progress:
                on_progress(
                    Progress(stage="pretrain", done=finished, total=recipe.steps, values=values)
                )
        if saving and history is not None:
            history.write(finished, **state)
        if on_step:
            on_step(
                PretrainingStep(
                    step=finished,
                    encoder=encoder,
                    offsets=offsets,
                    diffusion=diffusion,
                    penalty=penalty,
                    snapshot=snapshot,
                )
            )
    return snapshot()


def _check_finite(loss: float, step: int, stage: str) -> None:
    """Stop a run whose numbers have left the range.

    Raises:
        DivergedError: the loss is infinite or not a number.
    """
    if not math.isfinite(loss):
        raise DivergedError(
            f"{stage} diverged at step {step}: the loss is {loss}; nothing was saved from it",
            hint="try a smaller learning rate",
        )
