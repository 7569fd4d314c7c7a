"""Weight offsets: a domain's constant modulation of the attention projections (section 3.2, eq. 3).

    W = W₀ · (1 + ΔW)          element-wise, for W_q, W_k, W_v of every attention layer

ΔW (M × N) depends on no input. It is the output of a small network, which acts as a prior:

    v₀ ─ linear ─> v_y (M)  ┐
                            ├─ v_y v_xᵀ ─ linear over the rows ─ linear over the columns ─> ΔW
    v₀ ─ linear ─> v_x (N)  ┘

Linear layers on an outer product act on its two vectors, so ΔW never has to be built layer by
layer. With L, c the weight and bias of the linear over the rows and R, d those over the columns,

    ΔW = (L v_y)(R v_x)ᵀ + c (R 1)ᵀ + 1 dᵀ  =  left (M × 3) · right (3 × N)

which is exact, has rank 3 at most, and costs a few matrix-vector products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from e4t_cli.nn.precision import full_precision

Factors = tuple[Tensor, Tensor]  # left (M, 3) and right (3, N), whose product is ΔW
PROJECTIONS = ("to_q", "to_k", "to_v")  # modulated; W_o is not (section 3.2, table 1)
RANK = 3


class Modulation(nn.Module):
    """Eq. 3 as a parametrization of one weight; subclasses define `factors()`."""

    def factors(self) -> Factors:
        raise NotImplementedError

    def delta(self) -> Tensor:
        """Return ΔW, (M, N)."""
        return torch.matmul(*self.factors())

    def forward(self, original: Tensor) -> Tensor:
        """Return W₀ · (1 + ΔW) in the dtype of W₀, computed in float32 or wider.

        A few tuning steps change W₀ by less than one spacing of bfloat16, and 1 + ΔW is rounded
        as coarsely, so the result is rounded to half precision only after the multiplication.
        """
        cache = _CACHE.get({})
        if (found := cache.get(self)) is not None:
            return found
        with full_precision(original.device):
            dtype = torch.promote_types(original.dtype, torch.float32)
            weight = (original.to(dtype) * (1 + self.delta())).to(original.dtype)
        if self in cache:
            cache[self] = weight
        return weight


# W of each modulation inside a `WeightOffsets.cached()` block of the current thread, None until it
# is known. `torch.nn.utils.parametrize.cached()` would be one cache for all threads and models.
_CACHE: ContextVar[dict[Modulation, Tensor | None]] = ContextVar("modulated weights")


class WeightOffset(Modulation):
    """ΔW of one M × N projection in the paper's network form (section 3.2).

    Departure: in the shipped weights these layers learned at 1/100 of the encoder's rate
    (`PretrainingConfig.offsets_rate`, set in mini_world/domains.py); the paper has one rate.

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
        columns = (self.over_rows.weight @ v_y, column_bias, torch.ones_like(column_bias))
        rows = (mixing @ v_x, mixing.sum(dim=1), shift)
        return torch.stack(columns, dim=1), torch.stack(rows)


class FactoredWeightOffset(Modulation):
    """The same ΔW as its two factors: the form that domain weights store and tuning trains.

    Departure: section 3.4 tunes the offset network. Its factors start at the same ΔW, keep its
    rank, and have 0.45 M parameters on Stable Diffusion 1.x instead of 143 M.
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.left = nn.Parameter(left)  # (M, 3)
        self.right = nn.Parameter(right)  # (3, N)

    def factors(self) -> Factors:
        return self.left, self.right


class WeightOffsets(nn.Module):
    """Every offset of a U-Net, by the path of the projection it modulates.

    >>> offsets = WeightOffsets.for_unet(unet)      # fresh: ΔW = 0
    >>> offsets.attach_to(unet)
    >>> offsets.merge()                             # or detach(): a plain U-Net again

    While attached, the U-Net's state dict has other keys (`...parametrizations.weight.original`),
    for which `from_pretrained` would initialize random weights: never save an attached U-Net.
    """

    def __init__(self, modulations: Mapping[str, Modulation]) -> None:
        super().__init__()
        self.paths = tuple(modulations)
        self.modulations = nn.ModuleList(modulations.values())
        # In a list, so that torch does not register the U-Net as a submodule of its offsets.
        self._attached: list[nn.Module] = []

    @classmethod
    def for_unet(cls, unet: nn.Module, make: Callable[[int, int], Modulation] = WeightOffset) -> Self:
        """Return fresh offsets for every attention projection of `unet`, not yet attached."""
        return cls({path: make(*shape) for path, shape in projection_shapes(unet).items()})

    @classmethod
    def from_factors(cls, factors: Mapping[str, Factors]) -> Self:
        """Rebuild trainable, unattached offsets from `factors()`; the tensors are copied."""
        # Sorted, so that sums over all of them do not depend on where the factors came from.
        ordered = sorted(factors.items())
        return cls({path: FactoredWeightOffset(*(one.detach().clone() for one in pair)) for path, pair in ordered})

    @torch.no_grad()
    def factors(self) -> dict[str, Factors]:
        """Return path -> (left, right), detached copies in float32."""
        pairs = {path: modulation.factors() for path, modulation in self._items()}
        return {path: (left.float().clone(), right.float().clone()) for path, (left, right) in pairs.items()}

    def attach_to(self, unet: nn.Module) -> None:
        """Make every modulated weight of `unet` read as W₀ · (1 + ΔW).

        Raises:
            ValueError: the offsets are attached already, or were made for another U-Net.
        """
        if self._attached:
            raise ValueError("these offsets are attached to a U-Net already")
        projections = dict(_projections(unet))
        if projections.keys() != set(self.paths):
            raise ValueError("these offsets modulate other projections than this U-Net has")
        for path, modulation in self._items():
            parametrize.register_parametrization(projections[path], "weight", modulation)
        self._attached.append(unet)

    def detach(self, *, merge: bool = False) -> None:
        """Remove the offsets; the U-Net's weights are W₀ again, or W₀ · (1 + ΔW) with `merge`."""
        if not self._attached:
            raise ValueError("these offsets are not attached to a U-Net")
        unet = self._attached.pop()
        for path in self.paths:
            projection = unet.get_submodule(path)
            parametrize.remove_parametrizations(projection, "weight", leave_parametrized=merge)
            # torch puts the weight back last; the state dict has the bias after it.
            projection._parameters["bias"] = projection._parameters.pop("bias")

    def merge(self) -> None:
        """Remove the offsets; the U-Net's weights become W₀ · (1 + ΔW)."""
        self.detach(merge=True)

    @contextmanager
    def attached_to(self, unet: nn.Module) -> Iterator[Self]:
        """Attach inside a `with` block."""
        self.attach_to(unet)
        try:
            yield self
        finally:
            self.detach()

    @contextmanager
    def cached(self) -> Iterator[None]:
        """Evaluate each W once for the feature pass and the main pass, inside a `with` block.

        The cache belongs to these offsets, this block and this thread; weights must not change inside. Nothing is
        cached under gradient checkpointing, where the backward pass has to recompute what the forward pass computed.
        """
        if any(getattr(unet, "is_gradient_checkpointing", False) for unet in self._attached):
            yield
            return
        token = _CACHE.set({**_CACHE.get({}), **{part: None for _, part in self._items()}})
        try:
            yield
        finally:
            _CACHE.reset(token)

    def _items(self) -> Iterable[tuple[str, Modulation]]:
        return zip(self.paths, cast(Iterable[Modulation], self.modulations), strict=True)


def projection_shapes(unet: nn.Module) -> dict[str, tuple[int, int]]:
    """Return path -> (M, N) of every weight that offsets modulate."""
    return {path: (layer.out_features, layer.in_features) for path, layer in _projections(unet)}


def _projections(unet: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield path and layer of every W_q, W_k, W_v, in the U-Net's own order.

    Raises:
        ValueError: projections were fused, which would silently bypass the offsets.
    """
    for path, module in unet.named_modules():
        name = path.rpartition(".")[2]
        if name in ("to_qkv", "to_kv"):
            raise ValueError("the U-Net's projections are fused: call unfuse_qkv_projections()")
        if name in PROJECTIONS and isinstance(module, nn.Linear):
            yield path, module
