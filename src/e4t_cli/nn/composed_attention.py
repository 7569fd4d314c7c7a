"""Attention from its definition, for devices without a fused kernel or with a slow one.

Five matrix multiplications and three other operations, forward and backward; torch's own composition of
`scaled_dot_product_attention` has over twenty, and keeps the attention matrix twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


class ComposedAttention(torch.autograd.Function):
    """softmax(q kᵀ / √D + mask) v.

    Args:
        mask: added to the scores, without a gradient, (1, L, T) or None.
        stacks: q, k, v, all (heads, L, D), stacked along a first dimension: (3, …), or (1, …) and (2, …), or three.

    Returns (heads, L, D).
    """

    @staticmethod
    def forward(context: Any, mask: Tensor | None, *stacks: Tensor) -> Tensor:
        q, k, v = _parts(stacks)
        context.scale = q.shape[-1] ** -0.5
        added, beta = (_empty(q), 0) if mask is None else (mask, 1)
        scores = torch.baddbmm(added, q, k.transpose(1, 2), beta=beta, alpha=context.scale)
        weights = scores.softmax(dim=-1)
        context.save_for_backward(weights, *stacks)
        return torch.bmm(weights, v)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weights, *stacks = context.saved_tensors
        q, k, v = _parts(stacks)
        found = [torch.empty_like(stack) for stack in stacks]
        d_q, d_k, d_v = _parts(found)
        torch.bmm(weights.transpose(1, 2), gradient, out=d_v)
        d_weights = torch.bmm(gradient, v.transpose(1, 2))
        d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        torch.baddbmm(_empty(q), d_scores, k, beta=0, alpha=context.scale, out=d_q)
        torch.baddbmm(_empty(q), d_scores.transpose(1, 2), q, beta=0, alpha=context.scale, out=d_k)
        return None, *found


def _parts(stacks: Sequence[Tensor]) -> list[Tensor]:
    return [stack[number] for stack in stacks for number in range(len(stack))]


def _empty(like: Tensor) -> Tensor:
    return torch.empty(1, 1, 1, dtype=like.dtype, device=like.device)


@lru_cache(maxsize=8)
def causal_mask(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what hides later tokens, (1, length, length)."""
    return torch.full((1, length, length), -torch.inf, dtype=dtype, device=device).triu(1)


def composed_attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """Return attention of (batch, heads, L, D)."""
    batch, heads, length, width = query.shape
    mask = causal_mask(length, query.dtype, query.device) if causal else None
    stacks = [one.reshape(1, batch * heads, -1, width) for one in (query, key, value)]
    output: Tensor = ComposedAttention.apply(mask, *stacks)
    return output.view(batch, heads, length, width)
