"""Low-rank adapters: a concept's change of a weight in few numbers (`--tuning lora`).

    W = (diag(1 + a) · W₀ + up · down) · diag(1 + b)        up (M × r), down (r × N)

W₀ stays frozen, so neither its gradient nor an optimiser's memory of it exists. `a` and `b` are
there on the projections that carry an offset (eq. 3): they scale the rows and columns of
1 + ΔW, which is all of ΔW that can be moved without the gradient of the full matrix, and keep its
rank. On Stable Diffusion 1.x with r = 8 that is 1.7 M numbers in place of 860 M.

Departure: section 3.4 tunes every weight of the U-Net. docs/mini.md says what the difference is.

Copies of a U-Net that share what they do not change, and which layers adapters change.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from e4t_cli.nn.weight_offsets import Factors


class LoraLayer(nn.Module):
    """The change of one linear layer.

    Args:
        rows, columns: M and N, the shape of its weight.
        rank: r; not more than M or N.
        gains: whether `a` and `b` are there.
        source: of the random start of `down`; `up`, `a` and `b` start at zero, so that a fresh
            adapter changes nothing.
    """

    row_gains: nn.Parameter | None
    column_gains: nn.Parameter | None

    def __init__(
        self, rows: int, columns: int, rank: int, *, gains: bool, source: torch.Generator
    ) -> None:
        super().__init__()
        rank = min(rank, rows, columns)
        down = torch.randn(rank, columns, generator=source, device="cpu") / columns**0.5
        self.down = nn.Parameter(down)  # down · x is of the size of one number of x
        self.up = nn.Parameter(torch.zeros(rows, rank))
        self.row_gains = nn.Parameter(torch.zeros(rows)) if gains else None
        self.column_gains = nn.Parameter(torch.zeros(columns)) if gains else None
        self._converted: dict[str, Tensor] = {}

    def _at(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a weight in the format of what it meets."""
        found = self._converted.get(name)
        return getattr(self, name).to(dtype) if found is None else found

    def before(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Scale what the layer reads: a hook before its forward."""
        if self.column_gains is None:
            return None
        x = inputs[0]
        # As x + b·x, not (1 + b)·x: half precision would round 1 + b to 1. Not in one function:
        # the gradient of `addcmul` multiplies both factors by 1 first, x whole.
        return (x + x * self._at("column_gains", x.dtype), *inputs[1:])

    def after(self, layer: nn.Linear, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Add the change to what the layer says: a hook behind its forward."""
        x = inputs[0]
        small = functional.linear(x, self._at("down", x.dtype))
        change = functional.linear(small, self._at("up", small.dtype))
        if self.row_gains is not None:
            plain = output if layer.bias is None else output - layer.bias.to(output.dtype)
            change = change + plain * self._at("row_gains", output.dtype)
        return output + change

    def merged(self, weight: Tensor) -> Tensor:
        """Return W for a W₀, (rows, columns), in float32."""
        changed = weight.float()
        if self.row_gains is not None:
            changed = torch.addcmul(changed, changed, self.row_gains[:, None])
        changed = changed + self.up @ self.down
        if self.column_gains is not None:
            changed = torch.addcmul(changed, changed, self.column_gains)
        return changed


class LoraAdapters(nn.Module):
    """Adapters of many layers of one module, by the paths of the layers."""

    def __init__(self, adapters: Mapping[str, LoraLayer]) -> None:
        super().__init__()
        self.paths = tuple(adapters)
        self.adapters = nn.ModuleList(adapters.values())
        self._hooks: list[Any] = []

    @classmethod
    def for_layers(
        cls,
        layers: Mapping[str, nn.Linear],
        rank: int,
        *,
        gains: Collection[str] = (),
        source: torch.Generator,
    ) -> Self:
        """Return fresh adapters.

        Args:
            layers: path -> layer.
            gains: the paths that get row and column gains.
        """
        return cls(
            {
                path: LoraLayer(*layer.weight.shape, rank, gains=path in gains, source=source)
                for path, layer in sorted(layers.items())
            }
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Rebuild adapters from `tensors()`.

        Raises:
            ValueError: a part of an adapter is missing, unknown, or of another shape.
        """
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            path, _, name = key.rpartition(".")
            parts.setdefault(path, {})[name] = value.float()
        adapters = {}
        for path, part in sorted(parts.items()):
            try:
                up, down = part["up"], part["down"]
                adapter = LoraLayer(
                    up.shape[0], down.shape[1], up.shape[1], gains="row_gains" in part,
                    source=torch.Generator(),
                )  # fmt: skip
                adapter.load_state_dict(part)
            except (KeyError, IndexError, RuntimeError) as error:
                raise ValueError(f"the adapter of {path} is damaged: {error}") from error
            adapters[path] = adapter
        return cls(adapters)

    def tensors(self) -> dict[str, Tensor]:
        """Return path.name -> tensor, in float16: what is stored."""
        return {
            f"{path}.{name}": value.detach().half().cpu()
            for path, adapter in zip(self.paths, self.adapters, strict=True)
            for name, value in adapter.state_dict().items()
        }

    def rates(self, gains: float, others: float) -> list[tuple[list[nn.Parameter], float]]:
        """Return the weights in two groups with a learning rate each."""
        named = list(self.named_parameters())
        return [
            ([weight for name, weight in named if name.endswith("_gains")], gains),
            ([weight for name, weight in named if not name.endswith("_gains")], others),
        ]

    def attach_to(self, root: nn.Module) -> None:
        """Make every adapted layer of `root` behave as if it had the changed weight."""
        for path, adapter in zip(self.paths, self.adapters, strict=True):
            layer = root.get_submodule(path)
            self._hooks.append(layer.register_forward_pre_hook(adapter.before))
            self._hooks.append(layer.register_forward_hook(adapter.after))

    def detach(self) -> None:
        """Take the adapters off; nothing stays behind."""
        while self._hooks:
            self._hooks.pop().remove()

    @contextmanager
    def attached_to(self, root: nn.Module) -> Iterator[Self]:
        """Attach for the length of a `with` block."""
        self.attach_to(root)
        try:
            yield self
        finally:
            self.detach()

    @contextmanager
    def converted(self, dtype: torch.dtype) -> Iterator[None]:
        """Bring all weights into one format at once, for every pass inside a `with` block.

        One by one that is an operation for each weight and pass, and another on the way back,
        each of which a card has to be told.
        """
        weights = list(self.parameters())
        flat = torch.cat([weight.flatten() for weight in weights]).to(dtype)
        pieces = iter(flat.split([weight.numel() for weight in weights]))
        for adapter in self.adapters:
            adapter._converted = {
                name: next(pieces).view_as(weight) for name, weight in adapter.named_parameters()
            }
        try:
            yield
        finally:
            for adapter in self.adapters:
                adapter._converted = {}

    @torch.no_grad()
    def merge_into(self, root: nn.Module) -> None:
        """Write the changed weights into the layers of `root`, computed in float32.

        Raises:
            ValueError: `root` has no such layer, or one of another shape.
        """
        for path, adapter in zip(self.paths, self.adapters, strict=True):
            try:
                weight = root.get_submodule(path).weight
                weight.copy_(adapter.merged(weight))
            except (AttributeError, RuntimeError) as error:
                raise ValueError(f"the adapter of {path} does not fit: {error}") from error


ADAPTED = (".to_q", ".to_k", ".to_v", ".to_out.0")
"""The adapted layers of an attention block, as the ends of their paths."""


def attention_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    """Return path -> layer of W_q, W_k, W_v and W_o in every attention block."""
    return {
        path: layer
        for path, layer in unet.named_modules()
        if isinstance(layer, nn.Linear) and path.endswith(ADAPTED)
    }


def lora_target_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    """Return the attention layers but the very first W_q, W_k, W_v on the way down.

    The gradient of those three would have to cross the largest attention matrix of all, which
    nothing else needs: 2 % of a step for 3 of 128 layers. They keep their offsets.
    """
    layers = attention_layers(unet)
    first = next(iter(layers), "").rpartition(".")[0]
    if not first.endswith(".attn1"):
        return layers
    return {
        path: layer
        for path, layer in layers.items()
        if path not in (f"{first}.to_q", f"{first}.to_k", f"{first}.to_v")
    }


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Return path -> layer of every linear layer."""
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, nn.Linear)}


@torch.no_grad()
def copy_sharing_weights(
    unet: nn.Module, offsets: Mapping[str, Factors], *, dtype: torch.dtype | None = None
) -> nn.Module:
    """Return a copy of `unet` that shares all of its weights but those of its attention layers.

    Args:
        unet: stays as it is, and must: its weights are the copy's too.
        offsets: path -> factors of ΔW, merged into the copy's own weights in float32.
        dtype: of the own weights; that of the original by default.
    """
    own = {id(layer.weight) for layer in attention_layers(unet).values()}
    tensors = [*unet.parameters(), *unet.buffers()]
    # What deepcopy is told it has copied already, it takes as the copy.
    twin = copy.deepcopy(unet, {id(value): value for value in tensors if id(value) not in own})
    for path, layer in attention_layers(twin).items():
        weight = layer.weight.float()
        if path in offsets:
            left, right = (factor.to(weight.device).float() for factor in offsets[path])
            weight = weight * (1 + left @ right)
        layer.weight = nn.Parameter(weight.to(dtype or layer.weight.dtype), requires_grad=False)
    return twin


@torch.no_grad()
def frozen_copy(
    unet: nn.Module, offsets: Mapping[str, Factors], half: torch.dtype | None
) -> nn.Module:
    """Return a `branch` to train something on, its own weights staying as they are.

    In the base's own precision where products are made in half precision anyway, which casts
    nothing twice; else in float32, since unscaled gradients in float16 vanish.

    Args:
        half: the format of the products, None for float32.
    """
    twin = copy_sharing_weights(unet, offsets)
    if half is None:
        _convert(twin, torch.float32)
    return twin


@torch.no_grad()
def merge_lora(
    unet: nn.Module,
    offsets: Mapping[str, Factors],
    encoder: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
) -> tuple[nn.Module, nn.Module]:
    """Return a U-Net and an encoder with stored adapters merged, in float32 before any rounding.

    Args:
        unet: the base's; the result shares what was neither adapted nor is of another dtype.
        offsets: path -> factors of ΔW.
        encoder: of the pack; it is copied.
        tensors: "unet." and "encoder." before the keys of `LowRankAdapters.tensors`.
        dtype: of the U-Net; that of `unet` by default.

    Raises:
        ValueError: an adapter does not fit.
    """
    parts: dict[str, dict[str, Tensor]] = {"unet": {}, "encoder": {}}
    for key, value in tensors.items():
        name, _, rest = key.partition(".")
        if name not in parts:
            raise ValueError(f"{name!r} has no adapters")
        parts[name][rest] = value
    device = next(unet.parameters()).device
    twin = copy_sharing_weights(unet, offsets, dtype=torch.float32)
    LoraAdapters.from_tensors(parts["unet"]).to(device).merge_into(twin)
    _convert(twin, dtype or next(unet.parameters()).dtype)
    encoder = copy.deepcopy(encoder).to(device)
    LoraAdapters.from_tensors(parts["encoder"]).to(device).merge_into(encoder)
    return twin, encoder.requires_grad_(False)


def _convert(module: nn.Module, dtype: torch.dtype) -> None:
    """Make every weight one of `dtype`, replacing those that are not: others share them."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            if weight.dtype != dtype:
                setattr(part, name, nn.Parameter(weight.to(dtype), requires_grad=False))
