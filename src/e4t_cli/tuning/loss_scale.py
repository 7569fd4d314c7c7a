"""A scaled loss, for devices whose half precision is float16 (Micikevicius et al., 2018).

float16 ends at 6e-8, and much of the gradient of eq. 5 lies below. So the loss is multiplied before
the way back and the gradient divided after it, in float32. What overflows is made again with a
smaller factor: not left out, since of fifteen steps each counts, and not another step, since every
draw is a function of seed and number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

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
    def exhausted(self) -> bool:
        """Whether there is no smaller factor left to try."""
        return self.factor < 1

    def divide_out(self, gradients: Sequence[Tensor]) -> bool:
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
