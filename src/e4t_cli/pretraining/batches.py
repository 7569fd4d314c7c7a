"""One process or many: who this one is, and the few things that processes tell each other.

`accelerate launch` and torchrun start the same program several times and say so in the
environment. Every process then holds the whole model, takes its own positions of the global batch
and exchanges gradients, so that all of them hold the same weights after each step.

Which pictures, in which sentences, under which noise: a function of seed, step and position.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from e4t_cli.errors import UsageError
from e4t_cli.models.prompt_embedding import Tokens
from e4t_cli.models.text_to_image import Posterior, TextToImageModel
from e4t_cli.nn.precision import PrecisionPolicy, full_precision, half_precision
from e4t_cli.nn.randomness import Draws, draw, sent
from e4t_cli.nn.word_embedding_encoder import WordEmbeddingEncoder
from e4t_cli.pretraining.encoded_images import TrainingData
from e4t_cli.prompts import training_prompts
from e4t_cli.registry.config import PretrainingConfig
from e4t_cli.training.loss import Losses, TrainingBatch, training_loss


@dataclass(frozen=True, kw_only=True)
class DistributedContext:
    """This process among all that train together; by default it is alone.

    Args:
        rank: which one it is, 0 … count - 1. The first one reports and saves.
        count: how many there are.
        device: what this one works on; None leaves the choice to whoever loads the model.
    """

    rank: int = 0
    count: int = 1
    device: torch.device | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def positions(self, batch_size: int) -> range:
        """Return this process's places in the global batch of `count * batch_size` samples."""
        return range(self.rank * batch_size, (self.rank + 1) * batch_size)

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return a module whose backward pass averages gradients over all processes."""
        if self.count == 1:
            return module
        cuda = self.device is not None and self.device.type == "cuda"
        return DistributedDataParallel(
            module, device_ids=[self.device] if cuda else None, broadcast_buffers=False
        )

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over all processes."""
        if self.count > 1:
            distributed.all_reduce(values)
            values = values / self.count
        return values

    def any(self, flag: bool) -> bool:
        """Whether it holds in any process; all of them have to ask."""
        if self.count == 1:
            return flag
        found = torch.tensor(float(flag), device=self.device)
        distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
        return bool(found.item())

    def check_same(self, number: int, what: str) -> None:
        """Make sure that all processes hold the same number.

        Raises:
            UsageError: they do not.
        """
        if self.count == 1:
            return
        ends = torch.tensor([number, -number], device=self.device)
        distributed.all_reduce(ends, op=distributed.ReduceOp.MAX)
        if ends[0] != -ends[1]:
            raise UsageError(
                f"the processes differ in {what}: {-int(ends[1])} and {int(ends[0])}",
                hint="give all of them the same folder, on a disk that they share",
            )


def is_launched() -> bool:
    """Whether a launcher has started this program as one of several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def init_distributed(device: str = "auto") -> Iterator[DistributedContext]:
    """Meet the other processes that a launcher has started, if it has.

    Args:
        device: "cpu" for the CPU, anything else for the graphics card of this process where the
            machine has them. Processes meet through NCCL on cards and gloo on CPUs.
    """
    if not is_launched():
        yield DistributedContext()
        return
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    try:
        yield DistributedContext(
            rank=state.process_index, count=state.num_processes, device=torch.device(state.device)
        )
    finally:
        state.destroy_process_group()


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
        config: PretrainingConfig,
        templates: Sequence[str],
        descriptor_id: int,
        seed: int,
        batch_size: int | None = None,
    ) -> None:
        self.model, self.data, self.config, self.seed = model, data, config, seed
        self.batch_size = batch_size or config.batch_size
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
        if self.config.mask and rows.masks is not None:
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
        precision: the dtypes of the run.
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
        precision: PrecisionPolicy,
        detach_features: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.offsets = encoder, offsets
        self._frozen = (model, unet, e_domain)  # a tuple hides modules from nn.Module
        self.scale, self.precision, self.detach_features = scale, precision, detach_features

    def forward(self, samples: Samples) -> Losses:
        model, unet, e_domain = self._frozen
        with full_precision(model.device):
            encoded_image = self.encoder.encode_image(samples.image_features)
        batch = TrainingBatch(
            z_0=samples.z_0,
            timesteps=samples.timesteps,
            epsilon=samples.epsilon,
            encoded_image=encoded_image,
            tokens=samples.tokens,
            mask=samples.mask,
        )
        half = self.precision.half
        cast = unet.dtype != half
        with self.offsets.cached(), half_precision(model.device, half, cast=cast):
            return training_loss(
                model,
                unet,
                self.encoder,
                batch,
                e_domain=e_domain,
                scale=self.scale,
                detach_features=self.detach_features,
            )
