"""AdamW on the device, and with weights, gradients and state in the host's memory.

On the function under torch's own class, for two reasons: the state is allocated before the first
step, so that memory runs out before a weight has moved or not at all; and it can be sent to the
host in the middle of a tuning.

The optimisers that a plan can name: on the device, there in 8 bits, in the host's memory.

A scaled loss, for devices whose half precision is float16 (Micikevicius et al., 2018).

float16 ends at 6e-8, and much of the gradient of eq. 5 lies below. So the loss is multiplied before
the way back and the gradient divided after it, in float32. What overflows is made again with a
smaller factor: not left out, since of fifteen steps each counts, and not another step, since every
draw is a function of seed and number.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from e4t_cli.errors import UsageError
from e4t_cli.training.loss import BETAS, WEIGHT_DECAY

Group = tuple[Sequence[nn.Parameter], float]
"""Weights and their learning rate."""

EPSILON = 1e-8


class FusedAdamW:
    """AdamW in one pass over the weights, where they are."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = [(list(weights), rate) for weights, rate in groups if rate > 0 and weights]
        self.weights = [weight for weights, _ in self.groups for weight in weights]
        self.means = [torch.zeros_like(weight) for weight in self.weights]
        self.squares = [torch.zeros_like(weight) for weight in self.weights]
        self.steps = [torch.zeros((), device=weight.device) for weight in self.weights]

    @property
    def gradients(self) -> list[Tensor]:
        return [weight.grad for weight in self.weights if weight.grad is not None]

    def zero_grad(self) -> None:
        for weight in self.weights:
            weight.grad = None

    def step(self, largest_norm: float) -> Tensor:
        # Paper silent: clipping. Over all three groups at once, as one gradient.
        norm = nn.utils.clip_grad_norm_(self.weights, largest_norm)
        self._apply(self.weights, [weight.grad for weight in self.weights])
        return norm

    @torch.no_grad()
    def _apply(self, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        first = 0
        for group, rate in self.groups:
            some = slice(first, first := first + len(group))
            _update(
                weights[some], gradients[some], self.means[some], self.squares[some],
                self.steps[some], rate,
            )  # fmt: skip

    def release(self) -> None:
        self.zero_grad()
        self.means, self.squares, self.steps = [], [], []


class HostAdamW(FusedAdamW):
    """AdamW whose float32 weights, gradients and state are in the host's memory.

    The device holds the weights in the precision it computes in, and no gradient for longer than
    it takes to send it away: 2 bytes a weight in place of 16. Micro-batches add up in float32.

    Args:
        groups: weights on the device.
        rounded: those of them that are in bfloat16 on the device from now on.
        after: an optimiser to go on from, in the middle of a tuning.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        rounded: Sequence[nn.Parameter] = (),
        *,
        after: FusedAdamW | None = None,
    ) -> None:
        self.groups = [(list(weights), rate) for weights, rate in groups if rate > 0 and weights]
        self.weights = [weight for weights, _ in self.groups for weight in weights]
        self.masters, self.means, self.squares, self.steps = [], [], [], []
        lower = {id(weight) for weight in rounded}
        for index, weight in enumerate(self.weights):
            weight.grad = None
            master = weight.detach().to("cpu", torch.float32, copy=True)
            self.masters.append(master)
            for name in ("means", "squares", "steps"):
                if after is None:
                    value = torch.zeros(()) if name == "steps" else torch.zeros_like(master)
                else:
                    value = getattr(after, name)[index].to("cpu")
                    getattr(after, name)[index] = None  # one at a time leaves the device
                getattr(self, name).append(value)
            if id(weight) in lower:
                weight.data = weight.data.bfloat16()
        self.sums = [torch.zeros_like(master) for master in self.masters]
        self.hooks = [
            weight.register_post_accumulate_grad_hook(self._sender(gradient))
            for weight, gradient in zip(self.weights, self.sums, strict=True)
        ]

    @property
    def gradients(self) -> list[Tensor]:
        return self.sums

    @staticmethod
    def _sender(gradient: Tensor) -> Any:
        def send(weight: Tensor) -> None:
            assert weight.grad is not None
            # As it is: made float32 on the way, twice the bytes would travel.
            gradient.add_(weight.grad.to("cpu"))
            weight.grad = None

        return send

    def zero_grad(self) -> None:
        for gradient in self.sums:
            gradient.zero_()

    @torch.no_grad()
    def step(self, largest_norm: float) -> Tensor:
        norm = nn.utils.get_total_norm(self.sums, foreach=True)
        share = torch.clamp(largest_norm / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(self.sums, share)
        self._apply(self.masters, self.sums)
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.copy_(master)
        return norm

    @torch.no_grad()
    def release(self) -> None:
        # Merging comes next, and in half precision it would round a tuning away.
        for hook in self.hooks:
            hook.remove()
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.data = master.to(weight.device)
        self.masters, self.sums = [], []
        super().release()


def _update(
    weights: Any, gradients: Any, means: Any, squares: Any, steps: Any, rate: float
) -> None:
    used = [index for index, gradient in enumerate(gradients) if gradient is not None]
    weights, gradients, means, squares, steps = (
        [values[index] for index in used] for values in (weights, gradients, means, squares, steps)
    )
    if weights:
        adamw(
            weights, gradients, means, squares, [], steps, fused=True, amsgrad=False,
            beta1=BETAS[0], beta2=BETAS[1], lr=rate, weight_decay=WEIGHT_DECAY, eps=EPSILON,
            maximize=False,
        )  # fmt: skip


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


FIRST, BACK = 2.0**14, 2.0**-3
"""The first factor, for a mean over 16 latents of 64 × 64, and what an overflow makes of it."""


class LossScale:
    """The factor before the loss; 1, and without any cost, in formats that need none.

    Args:
        half: the format of the products.
    """

    def __init__(self, half: torch.dtype | None) -> None:
        self.factor = FIRST if half == torch.float16 else 1.0

    @property
    def at_minimum(self) -> bool:
        """Whether there is no smaller factor left to try."""
        return self.factor < 1

    def unscale_(self, gradients: Sequence[Tensor]) -> bool:
        """Bring gradients back to their own size, in place.

        Returns:
            Whether they are finite; if not, the factor is a smaller one from now on.
        """
        if self.factor == 1:
            return True  # nobody has looked, and no device had to wait
        torch._foreach_mul_(gradients, 1 / self.factor)
        if nn.utils.get_total_norm(gradients).isfinite():
            return True
        self.factor *= BACK
        return False
