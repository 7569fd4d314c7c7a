"""What a step of tuning is made of: one picture, under 16 noise levels and in 16 sentences.

One step of tuning: its samples, its gradient, and what to do when that takes too much memory.

The steps of tuning: eq. 5 on one picture, under 16 noise levels and sentences at once.

"A large batch ensures that our model observes the concept across multiple time scales": a step
sees 16 different ones however many micro-batches it is split into, and the gradient is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from e4t_cli.devices import free_memory, memory_ran_out, trim_heap
from e4t_cli.errors import DivergedError, ResourceError
from e4t_cli.models.denoiser import TunedModel
from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.precision import chosen_format, half_precision
from e4t_cli.nn.randomness import draw
from e4t_cli.nn.word_embedding_encoder import Encoder
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.prompts import training_prompts
from e4t_cli.registry.config import TuningConfig
from e4t_cli.registry.domain import PreparedImage
from e4t_cli.training.cuda_graphs import CudaGraphRunner
from e4t_cli.training.loss import (
    MIN_MASK_AREA,
    TrainingBatch,
    latent_mask,
    training_loss,
)
from e4t_cli.training.memory import HOST_BYTES, Plan, host_has_room
from e4t_cli.training.optim import FusedAdamW, HostAdamW, LossScale, make_optimizer
from e4t_cli.training.trainable import METHODS


class Samples:
    """The picture, looked at once, and the samples of each step.

    Args:
        image_features: the picture's, (vectors, width), if they were computed before.
    """

    def __init__(
        self,
        model: TextToImageModel,
        pretrained: DomainWeights,
        prepared: PreparedImage,
        config: TuningConfig,
        seed: int,
        image_features: Tensor | None = None,
    ) -> None:
        self.model, self.config, self.seed, self.note = model, config, seed, ""
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
        if not self.config.mask or prepared.mask is None:
            return None
        whole = self.model.masks([prepared.mask])
        if float(whole.mean()) < MIN_MASK_AREA:
            self.note = "the mask is empty: tuning on the whole picture"
        return latent_mask(whole, self.model.latent_shape[1:])

    def of(self, step: int) -> tuple[Tensor, ...]:
        """Return what is different in each step, on the device and always in the same shapes."""
        size = self.config.batch_size
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
            encoded_image=encoder.encode_image(self.image_features).expand(count, -1),
            tokens=self.tokens[sentences],
            mask=None if self.mask is None else self.mask.expand(count, -1, -1),
        )


class Trainer:
    """The parts in training, the picture they are trained on, and one step of them."""

    def __init__(
        self,
        model: TextToImageModel,
        pretrained: DomainWeights,
        prepared: PreparedImage,
        config: TuningConfig,
        seed: int,
        image_features: Tensor | None = None,
        autocast: bool | None = None,
        plan: Plan | None = None,
        consume: bool = False,
    ) -> None:
        self.model, self.config, self.seed = model, config, seed
        self.half = chosen_format(model.device, autocast, scaled=True)
        self.loss_scale = LossScale(self.half)
        self.plan = plan or Plan(micro_batch=config.batch_size)
        rates = (config.encoder_rate, config.offsets_rate, config.unet_rate)
        self.steps = config.steps if max(rates) > 0 else 0
        self.immediate = model.device.type == "cpu"
        # What looks at the picture comes first: it may leave before the weights in training come.
        self.samples = Samples(model, pretrained, prepared, config, seed, image_features)
        self.note = self.samples.note
        if self.plan.park:
            model.vae.to("cpu")
        self.parts = METHODS[config.method](model, pretrained, config, seed, consume=consume)
        self.unet, self.encoder = self.parts.unet, self.parts.encoder
        self.detach_features = self.parts.detach_features
        if self.steps:
            groups = self.parts.groups()
            for weights, rate in groups:
                for weight in weights:
                    weight.requires_grad_(rate > 0)
            self.optimizer = make_optimizer(self.plan.optimizer, groups, self._rounded())
            self._groups = groups
        if self.plan.checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.scale = pretrained.embedding_scale
        self.descriptor_id = model.descriptor_id(pretrained.descriptor)
        self.e_domain = model.word_embedding(self.descriptor_id)
        self.accumulate = self._recording()

    def gradients(self, step: int) -> Tensor:
        """Accumulate the gradient of one step; returns the means of eq. 4 and eq. 2, (2,).

        Raises:
            DivergedError: float16 is too small for this base, and it is kept in nothing else.
        """
        samples = self.samples.of(step)
        losses = self.accumulate(*samples)
        while not self.loss_scale.unscale_(self.optimizer.gradients):
            if self.loss_scale.at_minimum or not losses.isfinite().all():
                self._leave_half_precision()
            losses = self.accumulate(*samples)
        return losses

    def _leave_half_precision(self) -> None:
        """Make products in float32 from now on, where float16 overflows whatever the loss is."""
        if any(weight.dtype == torch.float16 for weight in self.unet.parameters()):
            raise DivergedError(
                f"the numbers of the base {self.model.base.name} are too large for float16",
                hint="keep it in float32: --dtype fp32",
            )
        self.half, self.note = None, "numbers too large for float16: float32 from now on, slower"
        self.loss_scale = LossScale(None)
        self.accumulate = self._recording()

    def _recording(self) -> CudaGraphRunner:
        """Return the work of a step, to be recorded where it is the same at every step."""
        same = (
            self.plan.optimizer != "host"  # gradients leave the device on the way
            and not self.unet.is_gradient_checkpointing  # torch looks at the device's randomness
            and self.half != torch.float16  # the factor of the loss changes
        )
        return CudaGraphRunner(
            self._accumulated, self.model.device,
            calls=self.steps if same else 0, on_trouble=partial(setattr, self, "note"),
        )  # fmt: skip

    def _accumulated(self, *samples: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        total = torch.zeros(2, device=self.model.device)
        size = self.plan.micro_batch
        for first in range(0, self.config.batch_size, size):
            some = [one[first : first + size] for one in samples]
            batch = self.samples.batch(some, self.encoder)
            kept, half = not self.unet.is_gradient_checkpointing, self.half
            with (
                self.parts.cached(),
                # As above: what backward computes again has to be what forward computed.
                self.parts.converted(half) if kept and half else nullcontext(),
                half_precision(
                    self.model.device, half, keep_casts=kept, cast=self.unet.dtype != half
                ),
            ):
                losses = training_loss(
                    self.model,
                    self.unet,
                    self.encoder,
                    batch,
                    e_domain=self.e_domain,
                    scale=self.scale,
                    detach_features=self.detach_features,
                )
            share = len(batch.timesteps) / self.config.batch_size
            whole = losses.total(self.config.reg_weight) * share
            (whole * self.loss_scale.factor).backward()
            parts = torch.stack((losses.diffusion.mean(), losses.penalty.mean()))
            total += share * parts.detach()
            self._trim()
        return total

    def _trim(self) -> None:
        # On a CPU that is short of memory, what one sample leaves behind in pieces would be missing
        # for the next, and the moments' 3 GB (of Stable Diffusion) for the drawing.
        if self.immediate and self.unet.is_gradient_checkpointing:
            trim_heap()

    def reduce_memory(self) -> str:
        """Ask for less memory from now on; returns what was done, "" if nothing is left to do."""
        plan, device = self.plan, self.model.device
        self.accumulate.forget()
        self.optimizer.zero_grad()
        if plan.micro_batch > 1:
            size = (plan.micro_batch + 1) // 2
            self.plan = plan.replace(micro_batch=size)
            note = f"memory ran out: {size} at a time from now on, with the same gradient"
        elif not self.unet.is_gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            self.plan = plan.replace(checkpointing=True)
            note = "memory ran out: gradient checkpointing from now on, a third more work"
        elif type(self.optimizer) is FusedAdamW and self._has_room_elsewhere():
            before = self.optimizer
            self.optimizer = HostAdamW(self._groups, self._rounded(), after=before)
            self.plan = plan.replace(optimizer="host")
            note = "memory ran out: the optimiser goes to the host's memory"
        else:
            return ""
        free_memory(device)
        self.accumulate = self._recording()
        return note

    def _has_room_elsewhere(self) -> bool:
        """Whether the host has memory of its own, and enough of it for the optimiser."""
        device = self.model.device
        needed = HOST_BYTES * sum(weight.numel() for weight in self.optimizer.weights)
        return device.type not in ("cpu", "mps") and host_has_room(device, needed)

    def _rounded(self) -> list[nn.Parameter]:
        """Return the weights whose precision on the device is that of the products anyway."""
        return self.parts.rounded if self.half == torch.bfloat16 else []

    @torch.no_grad()
    def finish(self) -> TunedModel:
        """Merge in float32, and let go of everything that was for training."""
        self.accumulate.forget()
        if self.steps:
            self.optimizer.release()
            self._trim()
        self.unet.disable_gradient_checkpointing()
        kept = self.parts.finish()
        if self.plan.park:
            self.model.vae.to(self.model.device)
        unet, encoder = self.parts.unet, self.parts.encoder
        return TunedModel(
            unet=unet.requires_grad_(False),
            encoder=encoder.requires_grad_(False).for_inference(),
            encoded_image=encoder.encode_image(self.samples.image_features),
            e_domain=self.e_domain,
            descriptor_id=self.descriptor_id,
            scale=self.scale,
            adapters=kept,
        )


LOG_EVERY = 5
"""Steps between two looks at the losses on an accelerator, which has to stop for each."""


def tune(
    model: TextToImageModel,
    pretrained: DomainWeights,
    prepared: PreparedImage,
    config: TuningConfig | None = None,
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
    config = config or pretrained.tuning
    plan = plan or Plan(micro_batch=config.batch_size)
    if micro_batch is not None:
        plan = plan.replace(micro_batch=micro_batch)
    plan = plan.replace(micro_batch=min(plan.micro_batch, config.batch_size))
    run = Trainer(
        model, pretrained, prepared, config, seed, image_features, autocast, plan, consume
    )
    run.detach_features |= detach_features

    def tell(done: int, note: str = "", **values: float) -> None:
        if on_progress:
            on_progress(
                Progress(stage="tune", done=done, total=config.steps, note=note, values=values)
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
                note = run.reduce_memory()
                if not note:
                    raise ResourceError(
                        "tuning does not fit into memory, even one sample at a time",
                        hint="try --tuning lora, a smaller base, or another device",
                    )
                tell(step, note)
        tell_note(step)
        norm = run.optimizer.step(config.gradient_clip)
        waiting.append(torch.cat((losses, norm.to(losses.device, losses.dtype).view(1))))
        if run.immediate or len(waiting) == LOG_EVERY or step == run.steps - 1:
            found = torch.stack(waiting).tolist()
            first = step + 1 - len(waiting)
            for number, (diffusion, penalty, size) in enumerate(found, start=first + 1):
                _check_finite(number, diffusion, penalty, size)
                loss = diffusion + config.reg_weight * penalty
                tell(number, loss=loss, diffusion=diffusion, penalty=penalty)
            waiting.clear()
    return run.finish()


def _check_finite(step: int, *numbers: float) -> None:
    if any(number != number or abs(number) == float("inf") for number in numbers):
        raise DivergedError(
            f"tuning diverged at step {step}: a loss or a gradient is not finite",
            hint="try a smaller learning rate",
        )
