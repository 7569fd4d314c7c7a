"""The optimizers of tuning: AdamW on the device, there with 8-bit state, or offloaded to the CPU.

All three are torch's interface under one that clips over all param groups as one gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from e4t_cli.errors import UsageError

Group = tuple[Sequence[nn.Parameter], float]
"""Weights and their learning rate."""

BETAS, EPSILON, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 1e-2
"""Of AdamW, in both stages. Paper silent."""


def adamw(*groups: Group) -> torch.optim.AdamW:
    """Return AdamW over the groups; a rate of zero freezes the group's weights."""
    # Fused: one pass over the weights, 40 % of a step on small models on the CPU.
    return torch.optim.AdamW(
        _param_groups(groups), betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY, fused=True
    )


def _param_groups(groups: Sequence[Group]) -> list[dict[str, object]]:
    for weights, rate in groups:
        for weight in weights:
            weight.requires_grad_(rate > 0)
    return [{"params": list(weights), "lr": rate} for weights, rate in groups if rate and weights]


class TuningOptimizer:
    """A torch optimizer whose step clips over all param groups as one gradient.

    Args:
        inner: the optimizer.
    """

    foreach: bool | None = None

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.weights: list[nn.Parameter] = self._params()

    def _params(self) -> list[nn.Parameter]:
        return [param for group in self.inner.param_groups for param in group["params"]]

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients accumulated since `zero_grad`, in float32, changeable in place."""
        return [param.grad for param in self._params() if param.grad is not None]

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    def step(self, max_norm: float) -> Tensor:
        """Clip, step, and return the norm before clipping. Paper silent: clipping."""
        norm = nn.utils.clip_grad_norm_(self._params(), max_norm, foreach=self.foreach)
        self.inner.step()
        return norm

    def release(self) -> None:
        """Leave the weights in float32 on the device and free everything else."""
        self.inner.zero_grad()
        self.inner.state.clear()


class FusedAdamW(TuningOptimizer):
    """AdamW in one pass over the weights, where they are.

    torch's own (2.14) does as well as its function `adamw` on state of ours: FIGURE. Its state is
    allocated here and not in the first step, so that memory runs out before a weight has moved or
    not at all.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        super().__init__(adamw(*groups))
        for weight in self.weights:
            self.inner.state[weight] = {
                "step": torch.zeros((), device=weight.device),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }


class CPUOffloadedAdamW(TuningOptimizer):
    """AdamW whose float32 weights, gradients and state are in main memory.

    The device holds the weights in the dtype of its matrix multiplications, and each gradient only
    until it is transferred: 2 bytes a weight in place of 16. Micro-batches are added in float32.

    Args:
        groups: weights on the device.
        rounded: those of them that are in bfloat16 on the device from now on.
        after: an optimizer to continue from, in the middle of a tuning.
    """

    foreach = True

    def __init__(
        self,
        groups: Sequence[Group],
        rounded: Sequence[nn.Parameter] = (),
        *,
        after: TuningOptimizer | None = None,
    ) -> None:
        lower = {id(weight) for weight in rounded}
        masters: dict[nn.Parameter, nn.Parameter] = {}
        states: list[dict[str, Tensor]] = []
        for weight in (weight for weights, rate in groups if rate for weight in weights):
            weight.grad = None
            master = nn.Parameter(weight.detach().to("cpu", torch.float32, copy=True))
            # One by one, so that each leaves the device before the next is copied.
            state = after.inner.state.pop(weight) if after else {}
            for name in ("step", "exp_avg", "exp_avg_sq"):
                empty = torch.zeros(()) if name == "step" else torch.zeros_like(master.data)
                state[name] = state[name].to("cpu") if after else empty
            states.append(state)
            if id(weight) in lower:
                weight.data = weight.data.bfloat16()
            masters[weight] = master
        kept = [([masters[weight] for weight in weights], rate) for weights, rate in groups if rate]
        super().__init__(adamw(*kept))
        self.inner.state.update(zip(masters.values(), states, strict=True))
        self.weights = list(masters)
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        self._hooks = [
            weight.register_post_accumulate_grad_hook(_sender(master))  # type: ignore[no-untyped-call]
            for weight, master in masters.items()
        ]

    def zero_grad(self) -> None:
        self.inner.zero_grad(set_to_none=False)  # the hooks add to them

    @torch.no_grad()
    def step(self, max_norm: float) -> Tensor:
        norm = super().step(max_norm)
        for weight, master in zip(self.weights, self._params(), strict=True):
            weight.copy_(master)
        return norm

    @torch.no_grad()
    def release(self) -> None:
        # Merging comes next, and in half precision it would round a tuning away.
        for hook in self._hooks:
            hook.remove()
        for weight, master in zip(self.weights, self._params(), strict=True):
            weight.data = master.data.to(weight.device)
        super().release()
        self.inner.param_groups.clear()


def _sender(master: nn.Parameter) -> Callable[[Tensor], None]:
    def send(weight: Tensor) -> None:
        assert weight.grad is not None and master.grad is not None
        # Added as it is: converted to float32 first, twice the bytes would travel.
        master.grad.add_(weight.grad.to("cpu"))
        weight.grad = None

    return send


def eight_bit_adamw(groups: Sequence[Group]) -> TuningOptimizer:
    """Return AdamW whose state takes a byte a value (the extra `e4t[8bit]`, on CUDA)."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UsageError(
            "the 8-bit optimizer is not installed", hint="pip install 'e4t[8bit]'"
        ) from error
    return TuningOptimizer(
        AdamW8bit(_param_groups(groups), betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY)
    )


def make_optimizer(
    kind: str, groups: Sequence[Group], rounded: Sequence[nn.Parameter]
) -> TuningOptimizer:
    """Return the optimizer that a plan names.

    Args:
        kind: "fused", "8bit" or "cpu".
        rounded: see `CPUOffloadedAdamW`.
    """
    if kind == "8bit":
        return eight_bit_adamw(groups)
    return CPUOffloadedAdamW(groups, rounded) if kind == "cpu" else FusedAdamW(groups)


def has_eight_bit(device: torch.device) -> bool:
    """Return whether the 8-bit optimizer is available."""
    return device.type == "cuda" and find_spec("bitsandbytes") is not None


INITIAL_SCALE, BACKOFF = 2.0**14, 2.0**-3
"""The first factor, for a mean over 16 latents of 64 × 64, and the factor after an overflow."""


def loss_scaler(device: torch.device, *, enabled: bool) -> torch.amp.GradScaler:
    """Return the scaler of the loss for float16 (Micikevicius et al., 2018), which never grows.

    float16 ends at 6e-8, and much of the gradient of eq. 5 lies below.
    """
    return torch.amp.GradScaler(
        device.type, init_scale=INITIAL_SCALE, backoff_factor=BACKOFF, growth_interval=2**31 - 1,
        enabled=enabled,
    )  # fmt: skip


def unscale(scaler: torch.amp.GradScaler, optimizer: TuningOptimizer) -> bool:
    """Divide the gradients by the loss's factor, in place.

    Returns:
        Whether they are finite. If not, the factor is smaller from now on, and the caller repeats
        the step: every one of fifteen counts, and its samples are a function of seed and number.
    """
    if not scaler.is_enabled():
        return True  # without a look at the gradients, for which the device would have to wait
    before = scaler.get_scale()
    scaler.unscale_(optimizer.inner)
    scaler.update()
    return scaler.get_scale() == before
