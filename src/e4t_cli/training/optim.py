"""The optimizers of tuning: AdamW on the device, there with 8-bit state, or offloaded to the CPU.

All three are torch's interface under one that clips over all param groups as one gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from e4t_cli.errors import UsageError

Group = tuple[Sequence[nn.Parameter], float]  # weights and their learning rate
BETAS, EPSILON, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 1e-2  # of AdamW, in both stages. Paper silent.
# The first factor of the loss, for a mean over 16 latents of 64 × 64, and its factor after an overflow.
INITIAL_SCALE, BACKOFF = 2.0**14, 2.0**-3


def adamw(*groups: Group) -> torch.optim.AdamW:
    """Return AdamW over the groups; a rate of zero freezes the group's weights."""
    # Fused: one pass over the weights, 40 % of a step on small models on the CPU. Its function `adamw` has the same
    # bits, and 9.2 ms in place of the class's 10.4 for 5.5 M weights in 660 tensors (2.14): 0.5 % of a step of `mini`.
    return torch.optim.AdamW(_param_groups(groups), betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY, fused=True)


def _param_groups(groups: Sequence[Group]) -> list[dict[str, Any]]:
    for weights, rate in groups:
        for weight in weights:
            weight.requires_grad_(rate > 0)
    return [{"params": [*weights], "lr": rate} for weights, rate in groups if rate and weights]


def _state(weight: Tensor, before: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return torch's AdamW state of a weight, fresh or moved to the weight's device."""
    if before is None:
        zeros = torch.zeros_like
        before = {"step": torch.zeros(()), "exp_avg": zeros(weight), "exp_avg_sq": zeros(weight)}
    return {name: value.to(weight.device) for name, value in before.items()}


class TuningOptimizer:
    """A torch optimizer whose step clips over all param groups as one gradient."""

    foreach: bool | None = None

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.params: list[nn.Parameter] = [one for group in inner.param_groups for one in group["params"]]
        self.weights = self.params

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients accumulated since `zero_grad`, in float32."""
        return [param.grad for param in self.params if param.grad is not None]

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    def step(self, max_norm: float) -> Tensor:
        """Clip, step, and return the norm before clipping. Paper silent: clipping."""
        norm = nn.utils.clip_grad_norm_(self.params, max_norm, foreach=self.foreach)
        self.inner.step()
        return norm

    def release(self) -> None:
        """Leave the weights in float32 on the device and free everything else."""
        self.inner.zero_grad()
        self.inner.state.clear()


def fused_adamw(groups: Sequence[Group]) -> TuningOptimizer:
    """Return AdamW in one pass over the weights, where they are."""
    optimizer = TuningOptimizer(adamw(*groups))
    # Allocated now: memory runs out before a weight has moved or not at all.
    optimizer.inner.state.update({weight: _state(weight) for weight in optimizer.params})
    return optimizer


class CPUOffloadedAdamW(TuningOptimizer):
    """AdamW whose float32 weights, gradients and state are in main memory.

    The device holds the weights in the dtype of its matrix multiplications, and each gradient only until it is
    transferred: 2 bytes a weight in place of 16. Micro-batches are added in float32.

    Args:
        groups: weights on the device.
        rounded: those of them that are in bfloat16 on the device from now on.
        after: a fused optimizer to continue from, in the middle of a tuning.
    """

    foreach = True

    def __init__(
        self, groups: Sequence[Group], rounded: Sequence[nn.Parameter] = (), *, after: TuningOptimizer | None = None
    ) -> None:
        lower, on_device = {id(weight) for weight in rounded}, _param_groups(groups)
        weights: list[nn.Parameter] = []
        states: dict[Tensor, dict[str, Tensor]] = {}
        copies: list[tuple[list[nn.Parameter], float]] = []
        for group in on_device:
            weights += group["params"]
            copies.append(([], group["lr"]))
            for weight in group["params"]:
                weight.grad = None
                master = nn.Parameter(weight.detach().to("cpu", torch.float32, copy=True))
                master.grad = torch.zeros_like(master)
                # One by one: each leaves the device before the next is copied.
                states[master] = _state(master, after.inner.state.pop(weight) if after else None)
                if id(weight) in lower:
                    weight.data = weight.data.bfloat16()
                copies[-1][0].append(master)
        super().__init__(adamw(*copies))
        self.inner.state.update(states)
        self.weights = weights
        self._hooks = [
            weight.register_post_accumulate_grad_hook(partial(_send, master))  # type: ignore[no-untyped-call]
            for weight, master in zip(weights, self.params, strict=True)
        ]

    def zero_grad(self) -> None:
        self.inner.zero_grad(set_to_none=False)  # the hooks add to them

    @torch.no_grad()
    def step(self, max_norm: float) -> Tensor:
        norm = super().step(max_norm)
        for weight, master in zip(self.weights, self.params, strict=True):
            weight.copy_(master)
        return norm

    @torch.no_grad()
    def release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for weight, master in zip(self.weights, self.params, strict=True):
            weight.data = master.data.to(weight.device)  # in float32: merging in half precision would lose a tuning
        super().release()
        self.params.clear()
        self.inner.param_groups.clear()


def _send(master: nn.Parameter, weight: Tensor) -> None:
    """Add the gradient of a weight to its master's and free it: a hook."""
    assert weight.grad is not None and master.grad is not None
    master.grad.add_(weight.grad.to("cpu"))  # as it is: converted to float32 first, twice the bytes would travel
    weight.grad = None


def eight_bit_adamw(groups: Sequence[Group]) -> TuningOptimizer:
    """Return AdamW whose state takes a byte a value (the extra `e4t[8bit]`, on CUDA)."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UsageError("the 8-bit optimizer is not installed", hint="pip install 'e4t[8bit]'") from error
    return TuningOptimizer(AdamW8bit(_param_groups(groups), betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY))


def make_optimizer(kind: str, groups: Sequence[Group], rounded: Sequence[nn.Parameter]) -> TuningOptimizer:
    """Return the optimizer that a plan names: "fused", "8bit" or "cpu"."""
    if kind == "cpu":
        return CPUOffloadedAdamW(groups, rounded)
    return eight_bit_adamw(groups) if kind == "8bit" else fused_adamw(groups)


def has_eight_bit(device: torch.device) -> bool:
    """Return whether the 8-bit optimizer is available."""
    return device.type == "cuda" and find_spec("bitsandbytes") is not None


def loss_scaler(device: torch.device, *, enabled: bool) -> torch.amp.GradScaler:
    """Return the scaler of the loss for float16 (Micikevicius et al., 2018), which never grows.

    float16 ends at 6e-8, and much of the gradient of eq. 5 lies below.
    """
    return torch.amp.GradScaler(
        device.type, init_scale=INITIAL_SCALE, backoff_factor=BACKOFF, growth_interval=2**31 - 1, enabled=enabled
    )


def unscale(scaler: torch.amp.GradScaler, optimizer: TuningOptimizer) -> bool:
    """Divide the gradients by the loss's factor, in place; returns whether they are finite.

    If not, the factor is smaller from now on; the caller repeats the step, since each counts.
    """
    if not scaler.is_enabled():
        return True  # without a look at the gradients, for which the device would have to wait
    before = scaler.get_scale()
    scaler.unscale_(optimizer.inner)
    scaler.update()
    return scaler.get_scale() == before
