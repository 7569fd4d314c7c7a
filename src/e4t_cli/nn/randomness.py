"""Counter-based randomness: every draw is a function of a seed and of where it is used.

Nothing depends on how many numbers were drawn before, on the global generator, or on how a batch
was split. So a resumed run repeats an uninterrupted one exactly, micro-batches see the noise that
the whole batch would have seen, and a picture is the same alone and in company.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def generator(seed: int, *counters: int | str) -> torch.Generator:
    """Return a CPU generator for one purpose, e.g. `generator(seed, "draw", step)`.

    On the CPU whatever the device, so that a seed means the same everywhere.
    """
    label = "/".join(str(counter) for counter in (seed, *counters))
    digest = hashlib.blake2b(label.encode(), digest_size=8).digest()
    # manual_seed reads 64 bits; the highest is left out because it takes a signed number.
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """Return the order in which `count` samples are visited in one epoch, (count,)."""
    return torch.randperm(count, generator=generator(seed, "order", epoch))


def uniforms(seed: int, step: int, batch_size: int) -> Tensor:
    """Return three numbers in 0 … 1 for each sample of a step's whole batch, (batch, 3).

    The first decides its noise level within its range; the others are `Draws.uniform`, without
    the cost of drawing noise.
    """
    source = generator(seed, "draw", step)
    return torch.rand(batch_size, 3, generator=source, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Draws:
    """Everything random about some samples of one optimiser step.

    Args:
        timesteps: (batch,), whole numbers.
        epsilon: the noise to predict (batch, *shape).
        posterior: the noise that samples the VAE's posterior (batch, *shape).
        uniform: numbers in 0 … 1 for discrete choices (batch, 2). Always on the CPU: they are
            float64, which not every device has, and choose from what is there before it moves.
    """

    timesteps: Tensor
    epsilon: Tensor
    posterior: Tensor
    uniform: Tensor

    def to(self, device: torch.device) -> Draws:
        """Move what a device computes with."""
        return replace(
            self,
            timesteps=sent(self.timesteps, device),
            epsilon=sent(self.epsilon, device),
            posterior=sent(self.posterior, device),
        )

    def sentences(self, count: int) -> Tensor:
        """Choose one of `count` sentences for each sample: (batch,), where the noise is."""
        return sent(choose(self.uniform[:, 0], count), self.epsilon.device)

    def __getitem__(self, positions: range) -> Draws:
        some = slice(positions.start, positions.stop, positions.step)
        return Draws(**{name: value[some] for name, value in vars(self).items()})


def sent(value: Tensor, device: torch.device) -> Tensor:
    """Move a tensor from the CPU to a device, without waiting for it where that can be had."""
    if device.type == "cuda":
        # From pinned memory the copy waits for nothing, and nothing waits for the copy.
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def draw(
    seed: int,
    step: int,
    positions: range,
    *,
    batch_size: int,
    train_timesteps: int,
    shape: Sequence[int],
) -> Draws:
    """Draw for the samples at `positions` of the batch of a step: a micro-batch, or all of it.

    The whole batch is drawn each time, so that no split of it changes a number.

    Paper silent: how the noise levels are drawn. Section 3.4 calls it crucial that each element
    of a batch has a different one, so position k of n draws from the k-th of n equal ranges of
    time steps: each level is as likely as any other, and no batch leaves a range out.
    """
    source = generator(seed, "draw", step)
    numbers = torch.rand(batch_size, 3, generator=source, dtype=torch.float64)
    level = (torch.arange(batch_size) + numbers[:, 0]) / batch_size
    noise = torch.randn(2, batch_size, *shape, generator=source)
    whole = Draws(
        timesteps=choose(level, train_timesteps),
        epsilon=noise[0],
        posterior=noise[1],
        uniform=numbers[:, 1:],
    )
    return whole[positions]


def choose(uniform: Tensor, count: int) -> Tensor:
    """Turn numbers in 0 … 1 into indices below `count`."""
    return (uniform * count).long().clamp_(max=count - 1)
