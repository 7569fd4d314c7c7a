"""Weights and attention of one training step in few operations: stacked, cast and summed together.

A step reads each weight of a U-Net's down blocks twice (the feature pass, the main pass), in half precision, and the
projections of attention through their offsets. One by one that is a cast, a sum of two gradients and eq. 3 for each of
hundreds of tensors. Here each is one operation for many:

    joint_weights   W₀ · (1 + ΔW) of all projections of one shape, (n, M, N)
    shared_weights  copies of many weights for two uses, whose gradients are summed and cast together
    attention       heads of q, k, v that came out of one matrix multiplication
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from e4t_cli.nn.composed_attention import ComposedAttention
from e4t_cli.nn.precision import full_precision
from e4t_cli.nn.weight_offsets import Modulation


def joint_weights(layers: Sequence[nn.Linear]) -> Tensor:
    """Return the weights of layers of one shape, modulated by their offsets where they have one, (n, M, N).

    As `Modulation.forward`, in float32 or wider until the multiplication is done.
    """
    if not parametrize.is_parametrized(layers[0], "weight"):
        return torch.stack([layer.weight for layer in layers])
    parametrized = [cast(Any, layer).parametrizations.weight for layer in layers]
    factors = [cast(Modulation, one[0]).factors() for one in parametrized]
    original = torch.stack([one.original for one in parametrized])
    with full_precision(original.device):
        left, right = (torch.stack(side) for side in zip(*factors, strict=True))  # (n, M, 3), (n, 3, N)
        wide = torch.float64 if original.dtype == torch.float64 else torch.float32
        return (original.to(wide) * (1 + torch.bmm(left, right))).to(original.dtype)


class _SharedWeights(torch.autograd.Function):
    """Weights in other dtypes, once for each use."""

    @staticmethod
    def forward(context: Any, uses: int, dtypes: Sequence[torch.dtype], *weights: Tensor) -> tuple[Tensor, ...]:
        context.set_materialize_grads(False)
        context.dtypes = [weight.dtype for weight in weights]
        found = _converted([weight.detach() for weight in weights], dtypes)
        return tuple(one.detach() for _ in range(uses) for one in found)

    @staticmethod
    def backward(context: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        count = len(context.dtypes)
        total = list(gradients[:count])
        for first in range(count, len(gradients), count):
            more = gradients[first : first + count]
            both = [number for number in range(count) if total[number] is not None and more[number] is not None]
            total = [one if two is None else two for one, two in zip(total, more, strict=True)]
            if both:
                pairs = [gradients[number] for number in both], [more[number] for number in both]
                sums = torch._foreach_add(cast(Any, pairs[0]), cast(Any, pairs[1]))
                for number, value in zip(both, sums, strict=True):
                    total[number] = value
        known = [number for number, value in enumerate(total) if value is not None]
        converted = _converted([cast(Tensor, total[one]) for one in known], [context.dtypes[one] for one in known])
        for number, value in zip(known, converted, strict=True):
            total[number] = value
        return None, None, *total


def _converted(values: list[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Return tensors in other dtypes, converted together."""
    other = [number for number, dtype in enumerate(dtypes) if values[number].dtype != dtype]
    made = {number: torch.empty_like(values[number], dtype=dtypes[number]) for number in other}
    if other:
        torch._foreach_copy_(list(made.values()), [values[number] for number in other])
    return [made.get(number, value) for number, value in enumerate(values)]


def shared_weights(weights: Sequence[Tensor], dtypes: Sequence[torch.dtype], uses: int) -> list[list[Tensor]]:
    """Return for each of `uses` passes what it uses in place of these weights.

    The gradients of all uses are summed in `dtypes`, as autograd sums those of a converted weight.
    """
    made = list(weights)
    if uses > 1 or any(weight.dtype != dtype for weight, dtype in zip(weights, dtypes, strict=True)):
        made = list(_SharedWeights.apply(uses, dtypes, *weights))
    return [made[use * len(weights) : (use + 1) * len(weights)] for use in range(uses)]


def attention(*projected: Tensor, heads: int, composed: bool) -> Tensor:
    """Return the output of multi-head attention, (batch, L, width).

    Args:
        projected: q, k, v side by side (batch, L, 3 · width), or q alone (batch, L, width) and k, v (batch, T,
            2 · width); a batch of 1 is used for all.
        heads: their number.
        composed: compute it from its definition, not with the device's fused kernel. See `half_precision`.
    """
    batch, length = projected[0].shape[:2]
    head = (projected[0].shape[-1] // (3 if len(projected) == 1 else 1)) // heads
    stacks = [
        one.view(len(one), one.shape[1], -1, heads, head).permute(2, 0, 3, 1, 4).expand(-1, batch, -1, -1, -1)
        for one in projected
    ]  # each (1 to 3, batch, heads, length, head)
    if composed:
        flat = [stack.reshape(len(stack), batch * heads, -1, head) for stack in stacks]
        with full_precision(projected[0].device):
            output = ComposedAttention.apply(None, *flat).view(batch, heads, length, head)
    else:
        q, k, v = (part for stack in stacks for part in stack.unbind(0))
        output = functional.scaled_dot_product_attention(q, k, v)
    merged: Tensor = output.transpose(1, 2).reshape(batch, length, heads * head)
    return merged
