"""The optimisers that a plan can name: on the device, there in 8 bits, in the host's memory."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from e4t_cli.errors import UsageError
from e4t_cli.training_loss import BETAS, WEIGHT_DECAY

from .adamw import EPSILON, FusedAdamW, Group, HostAdamW


class Optimizer(Protocol):
    """What the loop asks for."""

    weights: list[nn.Parameter]

    @property
    def gradients(self) -> list[Tensor]:
        """What was accumulated since `zero_grad`, in float32, to be changed in place."""
        ...

    def zero_grad(self) -> None: ...

    def step(self, largest_norm: float) -> Tensor:
        """Clip over all groups as one gradient, step, and return the norm before clipping."""
        ...

    def release(self) -> None:
        """Leave the weights in full precision and forget everything else."""
        ...


class EightBitAdamW:
    """AdamW whose state takes a byte a number (the extra `e4t[8bit]`, on CUDA)."""

    def __init__(self, groups: Sequence[Group]) -> None:
        try:
            import bitsandbytes
        except ImportError as error:
            raise UsageError(
                "the 8-bit optimiser is not installed", hint="pip install 'e4t[8bit]'"
            ) from error
        kept = [(list(weights), rate) for weights, rate in groups if rate > 0 and weights]
        self.weights = [weight for weights, _ in kept for weight in weights]
        self.inner = bitsandbytes.optim.AdamW8bit(
            [{"params": weights, "lr": rate} for weights, rate in kept],
            betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY,
        )  # fmt: skip

    @property
    def gradients(self) -> list[Tensor]:
        return [weight.grad for weight in self.weights if weight.grad is not None]

    def zero_grad(self) -> None:
        self.inner.zero_grad(set_to_none=True)

    def step(self, largest_norm: float) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.weights, largest_norm)
        self.inner.step()
        return norm

    def release(self) -> None:
        self.zero_grad()
        self.inner.state.clear()


def make_optimizer(kind: str, groups: Sequence[Group], rounded: Sequence[nn.Parameter]) -> Any:
    """Return the optimiser that a plan names.

    Args:
        kind: "fused", "8bit" or "host".
        rounded: see `HostAdamW`.
    """
    if kind == "8bit":
        return EightBitAdamW(groups)
    return HostAdamW(groups, rounded) if kind == "host" else FusedAdamW(groups)


def has_eight_bit(device: torch.device) -> bool:
    """Tell whether the 8-bit optimiser can be had here."""
    return device.type == "cuda" and find_spec("bitsandbytes") is not None
