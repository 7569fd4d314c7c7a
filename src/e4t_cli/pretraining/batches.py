"""Samples and loss of a pre-training step, in one process or several (torchrun, accelerate).

Images, prompts and noise of a step are functions of seed, step and position in the global batch,
so two processes with batches of 8 take the steps of one with a batch of 16.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import TypeVar

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from e4t_cli.errors import UsageError
from e4t_cli.models.prompt_embedding import Tokens
from e4t_cli.models.text_to_image import Posterior, TextToImageModel
from e4t_cli.nn.precision import full_precision, half_precision
from e4t_cli.nn.randomness import Draws, draw, sent
from e4t_cli.nn.weight_offsets import WeightOffsets
from e4t_cli.nn.word_embedding_encoder import WordEmbeddingEncoder
from e4t_cli.pretraining.encoded_images import TrainingData
from e4t_cli.prompts import training_prompts
from e4t_cli.registry.config import PretrainingConfig
from e4t_cli.training.loss import Losses, TrainingBatch, training_loss

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DistributedContext:
    """This process among those that train together, from `init_distributed`; alone by default.

    Every process holds the whole model, takes its positions of the global batch, and averages gradients with the
    others after each step.
    """

    rank: int = 0  # 0 … count - 1; rank 0 reports and saves
    count: int = 1  # processes
    device: torch.device | None = None  # of this process; None: chosen when the model is loaded

    @property
    def first(self) -> bool:
        return self.rank == 0

    def positions(self, batch_size: int) -> range:
        """Return this process's positions in the global batch of `count * batch_size` samples."""
        return range(self.rank * batch_size, (self.rank + 1) * batch_size)

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return a module whose backward pass averages gradients over all processes."""
        if self.count == 1:
            return module
        # Not `Accelerator.prepare` (accelerate 1.15.0): on GPUs it follows a launcher's FSDP or DeepSpeed settings,
        # which shard the parameters that checkpoints hold as a whole.
        devices = [self.device] if self.device is not None and self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over all processes."""
        if self.count > 1:
            from accelerate.utils import reduce

            values = reduce(values, "mean")
        return values

    def any(self, flag: bool) -> bool:
        """Return whether it holds in any process; all of them have to call this."""
        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def of_first(self, values: list[T]) -> list[T]:
        """Return the list of the first process; all of them have to call this, with lists of any length."""
        if self.count > 1:
            from accelerate.utils import broadcast_object_list

            values = broadcast_object_list([values])[0]
        return values

    def of_all(self, values: list[T]) -> list[T]:
        """Return the lists of all processes as one, in the order of the processes; all of them have to call this."""
        if self.count > 1:
            from accelerate.utils import gather_object

            values = gather_object(values)
        return values

    def check_same(self, value: int, what: str) -> None:
        """Raise UsageError if the processes hold different values."""
        values = [value]
        if self.count > 1:
            from accelerate.utils import gather

            values = gather(torch.tensor([value], device=self.device)).tolist()
        if min(values) != max(values):
            message = f"the processes differ in {what}: {min(values)} and {max(values)}"
            raise UsageError(message, hint="give all of them the same folder, on a disk that they share")


@contextlib.contextmanager
def init_distributed(device: str = "auto", *, timeout: timedelta | None = None) -> Iterator[DistributedContext]:
    """Join the other processes that torchrun or `accelerate launch` has started, if any.

    Args:
        device: "cpu" for the CPU (gloo), anything else for the GPU of this process where there are some (NCCL).
        timeout: how long a process waits for the others in a collective; None is torch's default.

    Raises:
        UsageError: the launcher started several processes, and they do not find each other.
    """
    if (wanted := int(os.environ.get("WORLD_SIZE", "1"))) < 2:
        yield DistributedContext()
        return
    from accelerate import PartialState

    # Without `cpu=True`, accelerate 1.15.0 finds no other process on a machine without GPUs.
    options = {} if timeout is None else {"timeout": timeout}
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), **options)
    try:
        if state.num_processes != wanted:
            message = f"the launcher started {wanted} processes, and this one knows of {state.num_processes}"
            raise UsageError(message, hint="torchrun --nproc-per-node N -m e4t_cli …; on CPUs with --device cpu")
        yield DistributedContext(rank=state.process_index, count=state.num_processes, device=state.device)
    finally:
        state.destroy_process_group()


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleBatch:
    """The input of one forward pass, on the model's device."""

    z_0: Tensor  # latents (batch, channels, height, width)
    timesteps: Tensor  # (batch,)
    epsilon: Tensor  # the noise, shaped like z_0
    image_features: Tensor  # input of the encoder (batch, layers, width)
    tokens: Tokens  # a training prompt for each sample
    mask: Tensor | None = None  # weights of the diffusion loss (batch, height, width)


class Batches:
    """The samples of each step, or those at some positions of its batch."""

    def __init__(
        self,
        model: TextToImageModel,
        data: TrainingData,
        config: PretrainingConfig,
        templates: Sequence[str],
        descriptor_id: int,
        seed: int,
        batch_size: int | None = None,  # of all processes and micro-batches together
    ) -> None:
        self.model, self.data, self.config, self.seed = model, data, config, seed
        self.batch_size = batch_size or config.batch_size
        self.tokens: Tokens = model.tokenize(training_prompts(tuple(templates)), descriptor_id)
        self._draws = lru_cache(maxsize=1)(self._draw)  # sampled once for all micro-batches of a step

    def of(self, step: int, positions: range | None = None) -> SampleBatch:
        """Return the samples at `positions` of a step's batch; None is all of it."""
        positions = range(self.batch_size) if positions is None else positions
        device = self.model.device
        draws = self._draws(step)[positions].to(device)
        rows = self.data.rows(seed=self.seed, step=step, positions=positions, batch_size=self.batch_size)
        posterior = Posterior(mean=sent(rows.means, device).float(), logvar=sent(rows.logvars, device).float())
        return SampleBatch(
            z_0=posterior.sample(draws.posterior),
            timesteps=draws.timesteps,
            epsilon=draws.epsilon,
            image_features=sent(rows.image_features, device).float(),
            tokens=self.tokens[draws.sentences(len(self.tokens.ids))],
            mask=sent(rows.masks, device).float() if self.config.mask and rows.masks is not None else None,
        )

    def _draw(self, step: int) -> Draws:
        size, shape, timesteps = self.batch_size, self.model.latent_shape, self.model.train_timesteps
        return draw(self.seed, step, range(size), batch_size=size, train_timesteps=timesteps, shape=shape)


class PretrainingLoss(nn.Module):
    """Eq. 5 as a module with one forward pass, whose parameters are those in training.

    Both passes through the U-Net are inside, so that DistributedDataParallel sees each parameter used once a step. The
    frozen base is not registered as a submodule: it is neither sent to the other processes nor given gradients.
    """

    def __init__(
        self,
        model: TextToImageModel,
        unet: UNet2DConditionModel,
        encoder: WordEmbeddingEncoder,
        offsets: WeightOffsets,
        *,
        e_domain: Tensor,
        scale: float,
        autocast_dtype: torch.dtype | None = None,  # of matrix multiplications; None for the weights' dtype
        detach_features: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.offsets = encoder, offsets
        self._frozen = (model, unet, e_domain)  # nn.Module registers no modules in a tuple
        self.scale, self.detach_features, self.autocast_dtype = scale, detach_features, autocast_dtype

    def forward(self, samples: SampleBatch) -> Losses:
        (model, unet, e_domain), encoder = self._frozen, self.encoder
        with full_precision(model.device):
            encoded_image = encoder.encode_image(samples.image_features)
        batch = TrainingBatch(
            z_0=samples.z_0, timesteps=samples.timesteps, epsilon=samples.epsilon,
            encoded_image=encoded_image, tokens=samples.tokens, mask=samples.mask,
        )  # fmt: skip
        cast = unet.dtype != self.autocast_dtype
        with self.offsets.cached(), half_precision(model.device, self.autocast_dtype, cast=cast):
            return training_loss(
                model, unet, encoder, batch, e_domain=e_domain, scale=self.scale, detach_features=self.detach_features
            )
