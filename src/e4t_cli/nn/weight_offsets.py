"""Weight offsets: a domain's constant modulation of the attention projections (section 3.2, eq. 3).

    W = W₀ · (1 + ΔW)          element-wise, for W_q, W_k, W_v of every attention layer

ΔW (M × N) depends on no input. It is the output of a small network that serves as a prior:

    v₀ ─ linear ─> v_y (M)  ┐
                            ├─ v_y v_xᵀ ─ linear over the rows ─ linear over the columns ─> ΔW
    v₀ ─ linear ─> v_x (N)  ┘

Linear layers on an outer product act on its two vectors, so ΔW never has to be built layer by
layer. With L, c the weight and bias of the linear over the rows and R, d those over the columns,

    ΔW = (L v_y)(R v_x)ᵀ + c (R 1)ᵀ + 1 dᵀ  =  left (M × 3) · right (3 × N)

which is exact, has rank 3 at most, and costs a few matrix-vector products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from e4t_cli.nn.precision import full_precision

Factors = tuple[Tensor, Tensor]
"""left (M, 3) and right (3, N), whose product is ΔW."""

PROJECTIONS = ("to_q", "to_k", "to_v")
"""The modulated projections of an attention layer; W_o is left alone (section 3.2, table 1)."""

RANK = 3


class Modulation(nn.Module):
    """Eq. 3 as a parametrization of one weight; children say where `factors()` come from."""

    def factors(self) -> Factors:
        raise NotImplementedError

    def delta(self) -> Tensor:
        """Return ΔW, (M, N)."""
        left, right = self.factors()
        return left @ right

    def forward(self, original: Tensor) -> Tensor:
        """Return W₀ · (1 + ΔW) in the precision of W₀, computed in float32 or better.

        A few tuning steps change W₀ by less than one spacing of bfloat16 numbers, and 1 + ΔW is
        rounded just as hard, so half precision may only come after the product.
        """
        with full_precision(original.device):
            precision = torch.promote_types(original.dtype, torch.float32)
            return (original.to(precision) * (1 + self.delta())).to(original.dtype)


class WeightOffset(Modulation):
    """ΔW of one M × N projection in the paper's network form (section 3.2).

    Args:
        rows, columns: M and N, the shape of the projection's weight.
        seed_width: length of v₀. Paper silent: 1, so that v₀ is a learned scale.
    """

    def __init__(self, rows: int, columns: int, *, seed_width: int = 1) -> None:
        super().__init__()
        self.initial = nn.Parameter(torch.ones(seed_width))  # v₀
        # Paper silent: biases in all four, as nn.Linear has them; without them ΔW has rank 1.
        self.to_rows = nn.Linear(seed_width, rows)  # v₀ -> v_y
        self.to_columns = nn.Linear(seed_width, columns)  # v₀ -> v_x
        self.over_rows = nn.Linear(rows, rows)  # L, c
        self.over_columns = nn.Linear(columns, columns)  # R, d
        # Paper silent: the last layer starts at zero, so ΔW = 0 and a fresh offset changes nothing.
        nn.init.zeros_(self.over_columns.weight)
        nn.init.zeros_(self.over_columns.bias)

    def factors(self) -> Factors:
        v_y, v_x = self.to_rows(self.initial), self.to_columns(self.initial)  # (M,), (N,)
        mixing, shift = self.over_columns.weight, self.over_columns.bias  # R (N, N), d (N,)
        column_bias = self.over_rows.bias  # c (M,)
        left = torch.stack(
            (self.over_rows.weight @ v_y, column_bias, torch.ones_like(column_bias)), dim=1
        )
        right = torch.stack((mixing @ v_x, mixing.sum(dim=1), shift))
        return left, right


class FactoredWeightOffset(Modulation):
    """The same ΔW held as its two factors: what a pack ships and what tuning moves.

    Departure: section 3.4 tunes the offset network; its product starts here at the same ΔW, keeps
    the same rank, and has 0.45 M numbers on Stable Diffusion 1.x in place of 143 M.
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.left = nn.Parameter(left)  # (M, 3)
        self.right = nn.Parameter(right)  # (3, N)

    def factors(self) -> Factors:
        return self.left, self.right


class WeightOffsets(nn.Module):
    """Every offset of a U-Net, by the path of the projection it modulates.

    >>> offsets = WeightOffsets.attach(unet)        # fresh: the U-Net's output is unchanged
    >>> offsets.bake()                              # or detach(): a plain U-Net again

    While attached, the U-Net's state dict has other keys (`...parametrizations.weight.original`),
    which `from_pretrained` would answer with random weights: never save an attached U-Net.
    """

    def __init__(self, modulations: Mapping[str, Modulation]) -> None:
        super().__init__()
        self.paths = tuple(modulations)
        self.modulations = nn.ModuleList(modulations.values())
        # In a list, so that torch does not adopt the U-Net as a part of its own offsets.
        self._attached: list[nn.Module] = []

    @classmethod
    def for_unet(
        cls, unet: nn.Module, make: Callable[[int, int], Modulation] = WeightOffset
    ) -> Self:
        """Return fresh offsets for every attention projection of `unet`, not yet attached."""
        shapes = {path: projection.weight.shape for path, projection in _projections(unet)}
        return cls({path: make(*shape) for path, shape in shapes.items()})

    @classmethod
    def attach(cls, unet: nn.Module) -> Self:
        """Put fresh offsets on `unet`, with ΔW = 0."""
        offsets = cls.for_unet(unet).to(next(unet.parameters()).device)
        offsets.attach_to(unet)
        return offsets

    @classmethod
    def from_factors(cls, factors: Mapping[str, Factors]) -> Self:
        """Rebuild trainable, unattached offsets from `factors()`; the tensors are copied."""
        # Sorted, so that sums over all of them do not depend on where the factors came from.
        return cls(
            {
                path: FactoredWeightOffset(left.detach().clone(), right.detach().clone())
                for path, (left, right) in sorted(factors.items())
            }
        )

    @torch.no_grad()
    def factors(self) -> dict[str, Factors]:
        """Return path -> (left, right), detached copies in float32."""
        found = {}
        for path, modulation in zip(self.paths, self.modulations, strict=True):
            left, right = modulation.factors()
            found[path] = left.float().clone(), right.float().clone()
        return found

    def attach_to(self, unet: nn.Module) -> None:
        """Make every modulated weight of `unet` read as W₀ · (1 + ΔW).

        Raises:
            ValueError: the offsets are attached already, or were made for another U-Net.
        """
        if self._attached:
            raise ValueError("these offsets are attached to a U-Net already")
        projections = dict(_projections(unet))
        if projections.keys() != set(self.paths):
            raise ValueError(
                f"these offsets modulate {len(self.paths)} projections, "
                f"this U-Net has {len(projections)}, or they have other names"
            )
        for path, modulation in zip(self.paths, self.modulations, strict=True):
            parametrize.register_parametrization(projections[path], "weight", modulation)
        self._attached.append(unet)

    def detach(self) -> None:
        """Take the offsets off and leave W₀ behind, as if they had never been there."""
        self._remove(merge=False)

    def merge(self) -> None:
        """Take the offsets off and leave W₀ · (1 + ΔW) behind, in a plain U-Net."""
        self._remove(merge=True)

    @contextmanager
    def attached_to(self, unet: nn.Module) -> Iterator[Self]:
        """Attach for the length of a `with` block."""
        self.attach_to(unet)
        try:
            yield self
        finally:
            self.detach()

    def _remove(self, *, merge: bool) -> None:
        if not self._attached:
            raise ValueError("these offsets are not attached to a U-Net")
        unet = self._attached.pop()
        for path in self.paths:
            projection = unet.get_submodule(path)
            parametrize.remove_parametrizations(projection, "weight", leave_parametrized=merge)
            # torch puts the weight back last; the order of the keys is part of "nothing behind".
            projection._parameters["bias"] = projection._parameters.pop("bias")


def projection_shapes(unet: nn.Module) -> dict[str, tuple[int, int]]:
    """Return path -> (M, N) of every weight that offsets modulate."""
    return {path: tuple(projection.weight.shape) for path, projection in _projections(unet)}


def _projections(unet: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield path and layer of every W_q, W_k, W_v, in the U-Net's own order.

    Raises:
        ValueError: projections were fused, which would bypass the offsets in silence.
    """
    for path, module in unet.named_modules():
        name = path.rpartition(".")[2]
        if name in ("to_qkv", "to_kv"):
            raise ValueError("the U-Net's projections are fused: call unfuse_qkv_projections()")
        if name in PROJECTIONS and isinstance(module, nn.Linear):
            yield path, module
