"""Tunes a model on the photo, or photos, of one subject (section 3.4): eq. 5 under many noise levels and prompts.

"A large batch ensures that our model observes the concept across multiple time scales": a step
samples 16 time steps, however many micro-batches it is split into, with the same gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor, nn

from e4t_cli.devices import captures_graphs, free_memory, trim_heap
from e4t_cli.errors import DivergedError, ResourceError
from e4t_cli.models.denoiser import TunedModel
from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.models.photos import Photos, as_sequence, encode_latents, mean_image_features, photo_of_samples
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.precision import PrecisionPolicy, half_precision
from e4t_cli.nn.randomness import draw, sent
from e4t_cli.nn.word_embedding_encoder import Encoder
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.prompts import training_prompts
from e4t_cli.registry.config import TuningConfig
from e4t_cli.system_memory import memory_ran_out
from e4t_cli.training.cuda_graphs import CudaGraphRunner
from e4t_cli.training.loss import MIN_MASK_AREA, TrainingBatch, latent_mask, training_loss
from e4t_cli.training.memory import Plan, can_offload
from e4t_cli.training.optim import CPUOffloadedAdamW, loss_scaler, make_optimizer, unscale
from e4t_cli.training.trainable import METHODS, TrainableParts


@dataclass(frozen=True, kw_only=True)
class TuningOptions:
    """How a tuning is computed; what it learns does not depend on it, up to rounding.

    Where memory runs out, micro-batches are halved, then come gradient checkpointing and a CPU-offloaded optimizer,
    each with a note.
    """

    plan: Plan | None = None  # how to fit into memory; None takes the whole batch at once
    autocast: bool | None = None  # see `PrecisionPolicy.resolve`
    consume: bool = False  # the model's U-Net becomes the tuned one, without a copy; not usable afterwards
    detach_features: bool = False  # see `training_loss`


class PhotoSamples:
    """The photos, each encoded once, and the samples of each step."""

    def __init__(
        self, model: TextToImageModel, pretrained: DomainWeights, prepared: Photos,
        config: TuningConfig, seed: int, image_features: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.model, self.config, self.seed, self.note = model, config, seed, ""
        photos = as_sequence(prepared)
        self.photos, self.posterior = len(photos), encode_latents(model, photos)
        if image_features is None:
            self.image_features = mean_image_features(model, pretrained, photos)
        else:
            self.image_features = image_features[None].to(model.device).float()
        self.mask: Tensor | None = None  # of each photo
        if config.mask and any(one.mask is not None for one in photos):
            all_of_it = Image.new("L", (model.resolution, model.resolution), 255)
            whole = model.masks([all_of_it if one.mask is None else one.mask for one in photos])
            self.mask = latent_mask(whole, model.latent_shape[1:])
            if any(float(one.mean()) < MIN_MASK_AREA for one in whole):
                which = "the mask" if len(photos) == 1 else "the mask of a photo"
                self.note = f"{which} is empty: tuning on the whole image"
        prompts = training_prompts(tuple(pretrained.templates))
        self.tokens = model.tokenize(prompts, model.descriptor_id(pretrained.descriptor))

    def of(self, step: int) -> tuple[Tensor, ...]:
        """Return what differs between steps, on the device and always in the same shapes."""
        model, size = self.model, self.config.batch_size
        steps, shape = model.train_timesteps, model.latent_shape
        samples = draw(self.seed, step, range(size), batch_size=size, train_timesteps=steps, shape=shape)
        samples = samples.to(model.device)
        which = sent(photo_of_samples(self.seed, step, photos=self.photos, batch_size=size), model.device)
        return samples.posterior, samples.epsilon, samples.timesteps, samples.sentences(len(self.tokens.ids)), which

    def batch(self, samples: Sequence[Tensor], encoder: Encoder) -> TrainingBatch:
        """Return what eq. 5 is evaluated on, from what `of` returned or the same rows of each."""
        posterior, epsilon, timesteps, prompts, which = samples
        return TrainingBatch(
            # Paper silent: one encoding of each photo, a sample of its posterior for each element.
            z_0=self.posterior[which].sample(posterior), timesteps=timesteps, epsilon=epsilon,
            encoded_image=encoder.encode_image(self.image_features).expand(len(timesteps), -1),
            tokens=self.tokens[prompts],
            mask=None if self.mask is None else self.mask[which],
        )  # fmt: skip


class Trainer:
    """The weights in training, the photos they are trained on, and one step of them."""

    def __init__(
        self, model: TextToImageModel, pretrained: DomainWeights, prepared: Photos, config: TuningConfig,
        seed: int = 0, image_features: Tensor | None = None, options: TuningOptions | None = None,
    ) -> None:  # fmt: skip
        options = options or TuningOptions()
        plan = options.plan or Plan(micro_batch=config.batch_size)
        self.plan = plan.replace(micro_batch=min(plan.micro_batch, config.batch_size))
        self.model, self.config = model, config
        self.precision = PrecisionPolicy.resolve(model.device, model.dtype, options.autocast)
        self.scaler = loss_scaler(model.device, enabled=self.precision.scales_loss)
        trains = max(config.encoder_rate, config.offsets_rate, config.unet_rate) > 0
        self.steps = config.steps if trains else 0
        # First: the VAE may leave before the weights in training come.
        self.samples = PhotoSamples(model, pretrained, prepared, config, seed, image_features)
        self.note = self.samples.note
        if self.plan.vae_on_cpu:
            nn.Module.to(model.vae, "cpu")
        self.parts: TrainableParts = METHODS[config.method](
            model, pretrained, config, seed, precision=self.precision, consume=options.consume
        )
        self.unet, self.encoder = self.parts.unet, self.parts.encoder
        self.detach_features = self.parts.detach_features or options.detach_features
        # Matrix multiplications round them on the device anyway.
        self.rounded = self.parts.rounded if self.precision.matmul == torch.bfloat16 else []
        if self.steps:
            self.optimizer = make_optimizer(self.plan.optimizer, self.parts.groups, self.rounded)
        if self.plan.checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.scale = pretrained.embedding_scale
        self.descriptor_id = model.descriptor_id(pretrained.descriptor)
        self.e_domain = model.word_embedding(self.descriptor_id)
        self.accumulate = self._captured()

    def gradients(self, step: int) -> Tensor:
        """Accumulate the gradient of one step; returns the means of eq. 4 and eq. 2, (2,)."""
        samples = self.samples.of(step)
        losses = self.accumulate(*samples)
        while not unscale(self.scaler, self.optimizer):
            if self.scaler.get_scale() < 1 or not losses.isfinite().all():
                self._leave_half_precision()
            losses = self.accumulate(*samples)
        return losses

    def _accumulate(self, *samples: Tensor) -> Tensor:
        """Sum the gradients of eq. 5 over the micro-batches of one step."""
        self.optimizer.zero_grad()
        device, size, half = self.model.device, self.plan.micro_batch, self.precision.half
        total = torch.zeros(2, device=device)
        keep_casts = not self.unet.is_gradient_checkpointing
        # On a CPU short of memory: the next sample would lack the fragments that one leaves behind.
        trims = device.type == "cpu" and not keep_casts
        for first in range(0, self.config.batch_size, size):
            batch = self.samples.batch([one[first : first + size] for one in samples], self.encoder)
            with (
                self.parts.cached(),
                # As there: what backward recomputes has to be what forward computed.
                self.parts.converted(half) if keep_casts and half else nullcontext(),
                half_precision(device, half, keep_casts=keep_casts, cast=self.unet.dtype != half),
            ):
                losses = training_loss(
                    self.model, self.unet, self.encoder, batch,
                    e_domain=self.e_domain, scale=self.scale, detach_features=self.detach_features,
                )  # fmt: skip
            share = len(batch.timesteps) / self.config.batch_size
            loss = losses.total(self.config.reg_weight) * share
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += share * torch.stack((losses.diffusion.mean(), losses.regularization.mean())).detach()
            if trims:
                trim_heap()
        return total

    def _leave_half_precision(self) -> None:
        """Multiply in float32 from now on, where float16 overflows whatever the loss's factor."""
        if any(weight.dtype == torch.float16 for weight in self.unet.parameters()):
            reason = f"the values of the base {self.model.base.name} are too large for float16"
            raise DivergedError(reason, hint="keep it in float32: --dtype fp32")
        self.note = "values too large for float16: float32 from now on, slower"
        self.precision = self.precision.without_half()
        self.scaler = loss_scaler(self.model.device, enabled=False)
        self.accumulate = self._captured()

    def _captured(self) -> Callable[..., Tensor]:
        """Return `_accumulate`, to be captured as a CUDA graph where every step's work is equal."""
        equal = (
            captures_graphs(self.model.device)
            and self.plan.optimizer != "cpu"  # gradients leave the device on the way
            and not self.unet.is_gradient_checkpointing  # torch reads the device's random state
            and not self.precision.scales_loss  # the factor of the loss changes
        )
        if not equal:
            return self._accumulate
        note = partial(setattr, self, "note")
        return CudaGraphRunner(self._accumulate, self.model.device, calls=self.steps, on_trouble=note)

    def _forget_graph(self) -> None:
        if isinstance(self.accumulate, CudaGraphRunner):
            self.accumulate.forget()

    def take_note(self) -> str:
        note, self.note = self.note, ""
        return note

    def reduce_memory(self) -> str:
        """Take less memory from now on; returns what was done, "" if nothing is left to do."""
        plan, device, note = self.plan, self.model.device, "memory ran out: "
        self._forget_graph()
        self.optimizer.zero_grad()
        if plan.micro_batch > 1:
            self.plan = plan.replace(micro_batch=(plan.micro_batch + 1) // 2)
            note += f"{self.plan.micro_batch} at a time from now on, with the same gradient"
        elif not self.unet.is_gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            self.plan = plan.replace(checkpointing=True)
            note += "gradient checkpointing from now on, a third more work"
        elif plan.optimizer == "fused" and can_offload(device, self.optimizer.weights):
            self.optimizer = CPUOffloadedAdamW(self.parts.groups, self.rounded, after=self.optimizer)
            self.plan = plan.replace(optimizer="cpu")
            note += "the optimizer moves to main memory"
        else:
            return ""
        free_memory(device)
        self.accumulate = self._captured()
        return note

    @torch.no_grad()
    def finish(self) -> TunedModel:
        """Merge in float32, and free everything that was for training."""
        self._forget_graph()
        if self.steps:
            self.optimizer.release()
            if self.model.device.type == "cpu" and self.unet.is_gradient_checkpointing:
                trim_heap()  # sampling needs the moments' 3 GB (of Stable Diffusion)
        self.unet.disable_gradient_checkpointing()
        kept = self.parts.finish()
        if self.plan.vae_on_cpu:
            nn.Module.to(self.model.vae, self.model.device)
        unet, encoder = self.parts.unet, self.parts.encoder
        return TunedModel(
            unet=unet.requires_grad_(False), encoder=encoder.requires_grad_(False).for_inference(),
            encoded_image=encoder.encode_image(self.samples.image_features),
            e_domain=self.e_domain, descriptor_id=self.descriptor_id, scale=self.scale, adapters=kept,
        )  # fmt: skip


LOG_EVERY = 5  # steps between two reads of the losses on an accelerator, which has to stop for each


def tune(
    model: TextToImageModel,
    pretrained: DomainWeights,
    prepared: Photos,
    config: TuningConfig | None = None,
    *,
    seed: int = 0,
    image_features: Tensor | None = None,
    options: TuningOptions | None = None,
    on_progress: ProgressCallback | None = None,
) -> TunedModel:
    """Learn one concept from one photo, or several of it; `model` and `pretrained` stay as they are.

    Args:
        pretrained: encoder, offsets and prompt templates of the domain. Baselines are other
            values of it: a `FixedEmbedding` for an encoder, no offsets, other templates.
        prepared: the photo, or the photos of one subject, and, if the config wants them, their masks.
        config: the domain's by default; with 0 steps the encoder's prediction is used as it is, a
            rate of 0 freezes its group of weights, and `method` selects what is trained.
        seed: of every random number.
        image_features: `mean_image_features` of the photos, (layers, width), if they were computed before.
        on_progress: called after each step with its losses, on an accelerator every few steps.

    Raises:
        DivergedError: a loss or a gradient is not finite.
        ResourceError: not even one sample at a time fits into memory.
    """
    config = config or pretrained.tuning
    run = Trainer(model, pretrained, prepared, config, seed, image_features, options)

    def report(done: int, note: str = "", **values: float) -> None:
        if on_progress and (note or values):
            on_progress(Progress(stage="tune", done=done, total=config.steps, note=note, values=values))

    report(0, run.take_note())
    waiting: list[Tensor] = []
    for step in range(run.steps):
        losses = None
        while losses is None:
            try:
                losses = run.gradients(step)
            except (MemoryError, RuntimeError) as error:
                if not memory_ran_out(error):
                    raise
            # Only here: as long as the error exists, it keeps all that the step has computed.
            if losses is None:
                if not (note := run.reduce_memory()):
                    reason = "tuning does not fit into memory, even one sample at a time"
                    raise ResourceError(reason, hint="try --tuning lora, a smaller base, or another device")
                report(step, note)
        report(step, run.take_note())
        norm = run.optimizer.step(config.gradient_clip)
        waiting.append(torch.cat((losses, norm.to(losses.device, losses.dtype).view(1))))
        if model.device.type == "cpu" or len(waiting) == LOG_EVERY or step == run.steps - 1:
            found = torch.stack(waiting).tolist()
            for number, values in enumerate(found, start=step + 2 - len(waiting)):
                if not all(map(math.isfinite, values)):
                    reason = f"tuning diverged at step {number}: a loss or a gradient is not finite"
                    raise DivergedError(reason, hint="try a smaller learning rate")
                diffusion, regularization, _ = values
                loss = diffusion + config.reg_weight * regularization
                report(number, loss=loss, diffusion=diffusion, penalty=regularization)
            waiting.clear()
    return run.finish()
