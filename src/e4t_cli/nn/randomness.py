"""Counter-based randomness: every sample is a function of a seed and of its purpose.

Nothing depends on the global generator, on earlier samples, or on the split of a batch. So a
resumed run repeats an uninterrupted one exactly, and micro-batches have the whole batch's noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def generator(seed: int, *counters: int | str) -> torch.Generator:
    """Return a generator for one purpose, on the CPU so that a seed is the same on every device."""
    label = "/".join(map(str, (seed, *counters)))
    digest = hashlib.blake2b(label.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)  # it takes a signed integer


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """Return the order in which `count` samples are visited in one epoch, (count,)."""
    return torch.randperm(count, generator=generator(seed, "order", epoch))


def uniforms(seed: int, step: int, batch_size: int) -> Tensor:
    """Return three values in 0 … 1 for each sample of a step's whole batch, (batch, 3).

    The first is its noise level within its range; the others are `Draws.uniform`, without the cost of sampling noise.
    """
    return torch.rand(batch_size, 3, generator=generator(seed, "draw", step), dtype=torch.float64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Draws:
    """Everything random about some samples of one optimizer step."""

    timesteps: Tensor  # (batch,), int64
    epsilon: Tensor  # the noise to predict (batch, *shape)
    posterior: Tensor  # the noise that samples the VAE's posterior (batch, *shape)
    uniform: Tensor  # values in 0 … 1 for discrete choices (batch, 2), float64, always on the CPU

    def to(self, device: torch.device) -> Draws:
        """Move all but `uniform`."""
        moved = {name: sent(getattr(self, name), device) for name in ("timesteps", "epsilon", "posterior")}
        return replace(self, **moved)

    def sentences(self, count: int) -> Tensor:
        """Choose one of `count` prompt templates for each sample: (batch,), on epsilon's device."""
        return sent(choose(self.uniform[:, 0], count), self.epsilon.device)

    def __getitem__(self, positions: range) -> Draws:
        some = slice(positions.start, positions.stop, positions.step)
        return Draws(**{name: value[some] for name, value in vars(self).items()})


def sent(value: Tensor, device: torch.device) -> Tensor:
    """Move a tensor from the CPU to a device, asynchronously on CUDA."""
    if device.type == "cuda":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def draw(
    seed: int, step: int, positions: range, *, batch_size: int, train_timesteps: int, shape: Sequence[int]
) -> Draws:
    """Sample for the `positions` of a step's batch: a micro-batch, or all of it.

    The whole batch is sampled each time, so that its split changes no value.

    Paper silent: how the noise levels are sampled. Section 3.4 calls it crucial that each element
    of a batch has a different one, so element k of n has one from the k-th of n equal ranges of
    time steps: each level is equally likely, and no batch omits a range.
    """
    source = generator(seed, "draw", step)
    values = torch.rand(batch_size, 3, generator=source, dtype=torch.float64)
    level = (torch.arange(batch_size) + values[:, 0]) / batch_size
    noise = torch.randn(2, batch_size, *shape, generator=source)
    timesteps = choose(level, train_timesteps)
    return Draws(timesteps=timesteps, epsilon=noise[0], posterior=noise[1], uniform=values[:, 1:])[positions]


def choose(uniform: Tensor, count: int) -> Tensor:
    """Convert values in 0 … 1 to indices below `count`."""
    return (uniform * count).long().clamp_(max=count - 1)
