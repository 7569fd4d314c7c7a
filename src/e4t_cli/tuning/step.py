"""One step of tuning: its samples, its gradient, and what to do when that takes too much memory."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from e4t_cli.base_model import TextToImageModel
from e4t_cli.devices import free_memory, trim_heap
from e4t_cli.domain import PreparedImage
from e4t_cli.errors import DivergedError
from e4t_cli.memory import HOST_BYTES, Plan, host_has_room
from e4t_cli.nn.precision import chosen_format, half_precision
from e4t_cli.pretrained import PretrainedDomain
from e4t_cli.recipes import TuningRecipe
from e4t_cli.recording import Recording
from e4t_cli.training_loss import evaluated_once, training_loss
from e4t_cli.tuned_model import TunedModel

from .adamw import FusedAdamW, HostAdamW
from .loss_scale import LossScale
from .optimizers import make_optimizer
from .parts import METHODS
from .samples import Samples


class Tuning:
    """The parts in training, the picture they are trained on, and one step of them."""

    def __init__(
        self,
        model: TextToImageModel,
        pretrained: PretrainedDomain,
        prepared: PreparedImage,
        recipe: TuningRecipe,
        seed: int,
        image_features: Tensor | None = None,
        autocast: bool | None = None,
        plan: Plan | None = None,
        consume: bool = False,
    ) -> None:
        self.model, self.recipe, self.seed = model, recipe, seed
        self.half = chosen_format(model.device, autocast, scaled=True)
        self.loss_scale = LossScale(self.half)
        self.plan = plan or Plan(micro_batch=recipe.batch_size)
        rates = (recipe.encoder_rate, recipe.offsets_rate, recipe.unet_rate)
        self.steps = recipe.steps if max(rates) > 0 else 0
        self.immediate = model.device.type == "cpu"
        # What looks at the picture comes first: it may leave before the weights in training come.
        self.samples = Samples(model, pretrained, prepared, recipe, seed, image_features)
        self.note = self.samples.note
        if self.plan.park:
            model.vae.to("cpu")
        self.parts = METHODS[recipe.method](model, pretrained, recipe, seed, consume=consume)
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
        while not self.loss_scale.divide_out(self.optimizer.gradients):
            if self.loss_scale.exhausted or not losses.isfinite().all():
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

    def _recording(self) -> Recording:
        """Return the work of a step, to be recorded where it is the same at every step."""
        same = (
            self.plan.optimizer != "host"  # gradients leave the device on the way
            and not self.unet.is_gradient_checkpointing  # torch looks at the device's randomness
            and self.half != torch.float16  # the factor of the loss changes
        )
        return Recording(
            self._accumulated, self.model.device,
            calls=self.steps if same else 0, on_trouble=partial(setattr, self, "note"),
        )  # fmt: skip

    def _accumulated(self, *samples: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        total = torch.zeros(2, device=self.model.device)
        size = self.plan.micro_batch
        for first in range(0, self.recipe.batch_size, size):
            some = [one[first : first + size] for one in samples]
            batch = self.samples.batch(some, self.encoder)
            kept, half = not self.unet.is_gradient_checkpointing, self.half
            with (
                evaluated_once(self.unet),
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
            share = len(batch.timesteps) / self.recipe.batch_size
            whole = losses.total(self.recipe.embedding_penalty) * share
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

    def retreat(self) -> str:
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
            encoder=encoder.requires_grad_(False).settled(),
            folded=encoder.fold(self.samples.image_features),
            e_domain=self.e_domain,
            descriptor_id=self.descriptor_id,
            scale=self.scale,
            adapters=kept,
        )
