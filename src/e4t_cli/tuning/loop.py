"""The steps of tuning: eq. 5 on one picture, under 16 noise levels and sentences at once.

"A large batch ensures that our model observes the concept across multiple time scales": a step
sees 16 different ones however many micro-batches it is split into, and the gradient is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from e4t_cli.base_model import TextToImageModel
from e4t_cli.devices import memory_ran_out
from e4t_cli.domain import PreparedImage
from e4t_cli.errors import DivergedError, ResourceError
from e4t_cli.memory import Plan
from e4t_cli.pretrained import PretrainedDomain
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.recipes import TuningRecipe
from e4t_cli.tuned_model import TunedModel

from .step import Tuning

LOOK_EVERY = 5
"""Steps between two looks at the losses on an accelerator, which has to stop for each."""


def tune(
    model: TextToImageModel,
    pretrained: PretrainedDomain,
    prepared: PreparedImage,
    recipe: TuningRecipe | None = None,
    *,
    seed: int = 0,
    image_features: Tensor | None = None,
    micro_batch: int | None = None,
    plan: Plan | None = None,
    consume: bool = False,
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
        recipe: the pack's by default; with 0 steps the encoder's guess is used as it is, a rate
            of 0 freezes its group of weights, and `method` says what is trained.
        seed: of every draw.
        image_features: the picture's, (layers, width), if they were computed before.
        micro_batch: samples per backward pass, in place of the plan's; the gradient is that of
            the whole batch, whatever it is.
        plan: how to fit into memory; None takes the whole batch. Where memory runs out all the
            same, micro-batches are halved, then gradient checkpointing and then an optimiser in
            the host's memory come to help, each with a note.
        consume: the model is not needed any more: its U-Net becomes the tuned one, which saves
            a copy. Only for whoever loaded it for this one concept.
        autocast: run the U-Net in half precision, with the trained weights in float32; None where
            the hardware is faster so.
        detach_features: see `training_loss`.
        on_progress: called after each step with its losses; on an accelerator, which would have
            to wait for that, every few steps.

    Raises:
        DivergedError: a loss or a gradient is not finite.
        ResourceError: not even one sample at a time fits into memory.
    """
    recipe = recipe or pretrained.tuning
    plan = plan or Plan(micro_batch=recipe.batch_size)
    if micro_batch is not None:
        plan = plan.replace(micro_batch=micro_batch)
    plan = plan.replace(micro_batch=min(plan.micro_batch, recipe.batch_size))
    run = Tuning(model, pretrained, prepared, recipe, seed, image_features, autocast, plan, consume)
    run.detach_features |= detach_features

    def tell(done: int, note: str = "", **values: float) -> None:
        if on_progress:
            on_progress(
                Progress(stage="tune", done=done, total=recipe.steps, note=note, values=values)
            )

    def tell_note(done: int) -> None:
        if run.note:
            tell(done, run.note)
            run.note = ""

    tell_note(0)
    waiting: list[Tensor] = []
    for step in range(run.steps):
        losses = None
        while losses is None:
            try:
                losses = run.gradients(step)
            except (MemoryError, RuntimeError) as error:
                if not memory_ran_out(error):
                    raise
            # Only here: as long as there is the error, it keeps all that the step has computed.
            if losses is None:
                note = run.retreat()
                if not note:
                    raise ResourceError(
                        "tuning does not fit into memory, even one sample at a time",
                        hint="try --tune adapters, a smaller base, or another device",
                    )
                tell(step, note)
        tell_note(step)
        norm = run.optimizer.step(recipe.gradient_clip)
        waiting.append(torch.cat((losses, norm.to(losses.device, losses.dtype).view(1))))
        if run.immediate or len(waiting) == LOOK_EVERY or step == run.steps - 1:
            found = torch.stack(waiting).tolist()
            first = step + 1 - len(waiting)
            for number, (diffusion, penalty, size) in enumerate(found, start=first + 1):
                _check_finite(number, diffusion, penalty, size)
                loss = diffusion + recipe.embedding_penalty * penalty
                tell(number, loss=loss, diffusion=diffusion, penalty=penalty)
            waiting.clear()
    return run.finish()


def _check_finite(step: int, *numbers: float) -> None:
    if any(number != number or abs(number) == float("inf") for number in numbers):
        raise DivergedError(
            f"tuning diverged at step {step}: a loss or a gradient is not finite",
            hint="try a smaller learning rate",
        )
