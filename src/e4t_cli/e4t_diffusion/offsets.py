"""The weight offsets of e4t-diffusion, as the two factors that `nn.weight_offsets` works with.

Its network has the same four linear layers as ours, under other names and in transposed order. With
p = linear1(v) (N), q = linear2(v) (M), C, c of linear_column and R, r of linear_row,

    X = p qᵀ (N × M);   X ← (Xᵀ Cᵀ + 1 cᵀ)ᵀ;   X ← X Rᵀ + 1 rᵀ;   ΔW = Xᵀ (M × N)

and as linear layers on an outer product act on its two vectors,

    ΔW = (R q)(C p)ᵀ + (R 1) cᵀ + r 1ᵀ  =  [R q, R 1, r] (M × 3) · [C p; c; 1ᵀ] (3 × N)

which is exact: the 573 MB of Stable Diffusion 1.4's 96 networks are 1.8 MB of factors in float32,
0.9 MB in float16.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from e4t_cli.errors import IntegrityError, printable
from e4t_cli.nn.weight_offsets import Factors

_KEY = re.compile(r"(.+\.attn[12])\.wo_([qkv])\.(.+)")
_LAYERS = ("linear1", "linear2", "linear_column", "linear_row")
_PARTS = ("v", *(f"{layer}.{part}" for layer in _LAYERS for part in ("weight", "bias")))


def split_networks(state: Mapping[str, Tensor], file: str) -> dict[str, dict[str, Tensor]]:
    """Return path of a projection -> its network's tensors, each with the shape it must have.

    Raises:
        IntegrityError: a key is of something else, a tensor is missing or of another shape.
    """
    networks: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        found = _KEY.fullmatch(key)
        if found is None or found[3] not in _PARTS:
            raise IntegrityError(f"{file} has an unexpected tensor {printable(key, limit=200)}")
        networks.setdefault(f"{found[1]}.to_{found[2]}", {})[found[3]] = value
    if not networks:
        raise IntegrityError(f"{file} holds no weight offsets")
    for path, network in networks.items():
        for part in _PARTS:
            if part not in network:
                raise IntegrityError(f"{file} lacks {part} of the offset of {printable(path)}")
        columns, rows = (network[f"linear{i}.bias"].numel() for i in (1, 2))
        width = network["v"].numel()  # of v, 1 in all known checkpoints
        shapes = {
            "v": (width,),
            **_linear("linear1", width, columns),
            **_linear("linear2", width, rows),
            **_linear("linear_column", columns, columns),
            **_linear("linear_row", rows, rows),
        }
        for part, shape in shapes.items():
            if tuple(network[part].shape) != shape:
                raise IntegrityError(
                    f"{file}: {part} of the offset of {printable(path)} has shape "
                    f"{tuple(network[part].shape)}, not {shape}"
                )
            if not network[part].isfinite().all():
                raise IntegrityError(
                    f"{file}: {part} of the offset of {printable(path)} "
                    "has numbers that are not finite"
                )
    return networks


def factor(network: Mapping[str, Tensor]) -> Factors:
    """Return left (M, 3) and right (3, N) of one network, in float64."""
    w = {key: value.double() for key, value in network.items()}
    p = w["linear1.weight"] @ w["v"] + w["linear1.bias"]  # (N,)
    q = w["linear2.weight"] @ w["v"] + w["linear2.bias"]  # (M,)
    over_rows, over_columns = w["linear_row.weight"], w["linear_column.weight"]
    left = torch.stack((over_rows @ q, over_rows.sum(dim=1), w["linear_row.bias"]), dim=1)
    column_bias = w["linear_column.bias"]
    right = torch.stack((over_columns @ p, column_bias, torch.ones_like(column_bias)))
    return left, right


def evaluate(network: Mapping[str, Tensor]) -> Tensor:
    """Return ΔW (M, N) layer by layer, as the network itself computes it, in float64."""
    w = {key: value.double() for key, value in network.items()}
    p = w["linear1.weight"] @ w["v"] + w["linear1.bias"]
    q = w["linear2.weight"] @ w["v"] + w["linear2.bias"]
    crossed = torch.outer(q, p)  # Xᵀ
    columns = crossed @ w["linear_column.weight"].T + w["linear_column.bias"]  # (M, N)
    rows = columns.T @ w["linear_row.weight"].T + w["linear_row.bias"]  # (N, M)
    return rows.T


def _linear(name: str, reads: int, writes: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (writes, reads), f"{name}.bias": (writes,)}
