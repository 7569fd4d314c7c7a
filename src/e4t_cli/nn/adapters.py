"""Low-rank adapters, and copies of a U-Net that share the weights they do not change.

With `--tuning lora` a concept's change of a weight has few parameters:

    W = (diag(1 + a) · W₀ + up · down) · diag(1 + b)        up (M × r), down (r × N)

W₀ stays frozen, without a gradient or an optimizer's state. `a` and `b` are there on the projections that carry an
offset (eq. 3): they scale the rows and columns of 1 + ΔW, all of ΔW that can be trained without the gradient of the
full matrix, and keep its rank. On Stable Diffusion 1.x with r = 8 that is 1.7 M parameters in place of 860 M.

Departure: section 3.4 tunes every weight of the U-Net. docs/mini.md has the difference.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from e4t_cli.nn.weight_offsets import Factors

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

UNet = TypeVar("UNet", bound=nn.Module)
Encoder = TypeVar("Encoder", bound=nn.Module)


class LoraLayer(nn.Module):
    """The change of one linear layer.

    Args:
        rows, columns: M and N, the shape of its weight.
        rank: r; at most M and N.
        scales: whether `a` and `b` are there.
        source: of the random start of `down`; the others start at zero, so that a fresh adapter changes nothing.
    """

    row_scale: nn.Parameter | None
    column_scale: nn.Parameter | None

    def __init__(self, rows: int, columns: int, rank: int, *, scales: bool, source: torch.Generator) -> None:
        super().__init__()
        rank = min(rank, rows, columns)
        down = torch.randn(rank, columns, generator=source, device="cpu") / columns**0.5
        self.down = nn.Parameter(down)  # down · x is of the size of one element of x
        self.up = nn.Parameter(torch.zeros(rows, rank))
        self.row_scale = nn.Parameter(torch.zeros(rows)) if scales else None
        self.column_scale = nn.Parameter(torch.zeros(columns)) if scales else None
        self.converted: dict[str, Tensor] = {}

    def _as(self, name: str, dtype: torch.dtype) -> Tensor:
        parameter: Tensor = getattr(self, name)
        return self.converted[name] if name in self.converted else parameter.to(dtype)

    def before(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Scale the input of the layer: a forward pre-hook."""
        if self.column_scale is None:
            return None
        x = inputs[0]
        # Not (1 + b)·x: half precision would round 1 + b to 1. Not `addcmul`: its gradient multiplies all of x by 1.
        return (x + x * self._as("column_scale", x.dtype), *inputs[1:])

    def after(self, layer: nn.Linear, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Add the change to the output of the layer: a forward hook."""
        x = inputs[0]
        small = functional.linear(x, self._as("down", x.dtype))
        change = functional.linear(small, self._as("up", small.dtype))
        if self.row_scale is not None:
            plain = output if layer.bias is None else output - layer.bias.to(output.dtype)
            change = change + plain * self._as("row_scale", output.dtype)
        return output + change

    def merged(self, weight: Tensor) -> Tensor:
        """Return W for a W₀, (rows, columns), in float32."""
        changed = weight.float()
        if self.row_scale is not None:
            changed = torch.addcmul(changed, changed, self.row_scale[:, None])
        changed = changed + self.up @ self.down
        return changed if self.column_scale is None else torch.addcmul(changed, changed, self.column_scale)


_STORED = {"row_scale": "row_gains", "column_scale": "column_gains"}  # parameters with another name in files


class LoraAdapters(nn.Module):
    """Adapters of many layers of one module, by the paths of the layers."""

    def __init__(self, adapters: Mapping[str, LoraLayer]) -> None:
        super().__init__()
        self.paths = tuple(adapters)
        self.adapters = nn.ModuleList(adapters.values())
        self._hooks: list[RemovableHandle] = []

    @classmethod
    def for_layers(
        cls, layers: Mapping[str, nn.Linear], rank: int, *, scaled: Collection[str] = (), source: torch.Generator
    ) -> Self:
        """Return fresh adapters of path -> layer; the paths in `scaled` get row and column scales."""
        shapes = {path: (layer.out_features, layer.in_features) for path, layer in sorted(layers.items())}
        made = {path: LoraLayer(*shapes[path], rank, scales=path in scaled, source=source) for path in shapes}
        return cls(made)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Rebuild adapters from `tensors()`.

        Raises:
            ValueError: a part of an adapter is missing, unknown, or of another shape.
        """
        names = {stored: name for name, stored in _STORED.items()}
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            path, _, stored = key.rpartition(".")
            parts.setdefault(path, {})[names.get(stored, stored)] = value.float()
        adapters = {}
        for path, part in sorted(parts.items()):
            try:
                (rows, rank), columns = part["up"].shape, part["down"].shape[1]
                adapters[path] = LoraLayer(rows, columns, rank, scales="row_scale" in part, source=torch.Generator())
                adapters[path].load_state_dict(part)
            except (KeyError, IndexError, ValueError, RuntimeError) as error:
                raise ValueError(f"the adapter of {path} is damaged: {error}") from error
        return cls(adapters)

    def tensors(self) -> dict[str, Tensor]:
        """Return path.name -> tensor, in float16: what is stored."""
        return {
            f"{path}.{_STORED.get(name, name)}": value.detach().half().cpu()
            for path, adapter in self._items()
            for name, value in adapter.state_dict().items()
        }

    def param_groups(self, scales: float, others: float) -> list[tuple[list[nn.Parameter], float]]:
        """Return the parameters in two groups, each with its learning rate."""
        groups: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
        for name, value in self.named_parameters():
            groups[not name.endswith("_scale")].append(value)
        return list(zip(groups, (scales, others), strict=True))

    def attach_to(self, root: nn.Module) -> None:
        """Make every adapted layer of `root` behave as if it had the changed weight."""
        for path, adapter in self._items():
            layer = root.get_submodule(path)
            self._hooks += layer.register_forward_pre_hook(adapter.before), layer.register_forward_hook(adapter.after)

    def detach(self) -> None:
        """Remove the adapters from the layers."""
        while self._hooks:
            self._hooks.pop().remove()

    @contextmanager
    def converted(self, dtype: torch.dtype) -> Iterator[None]:
        """Convert all parameters at once inside a `with` block: singly each is a kernel launch in every pass."""
        parameters = list(self.parameters())
        flat = torch.cat([parameter.flatten() for parameter in parameters]).to(dtype)
        pieces = iter(torch.split(flat, [parameter.numel() for parameter in parameters]))
        for _, adapter in self._items():
            adapter.converted = {name: next(pieces).view_as(value) for name, value in adapter.named_parameters()}
        try:
            yield
        finally:
            for _, adapter in self._items():
                adapter.converted = {}

    @torch.no_grad()
    def merge_into(self, root: nn.Module) -> None:
        """Write the changed weights into the layers of `root`, computed in float32.

        Raises:
            ValueError: `root` has no such layer, or one of another shape.
        """
        for path, adapter in self._items():
            try:
                weight = cast(nn.Linear, root.get_submodule(path)).weight
                weight.copy_(adapter.merged(weight))
            except (AttributeError, RuntimeError) as error:
                raise ValueError(f"the adapter of {path} does not fit: {error}") from error

    def _items(self) -> Iterable[tuple[str, LoraLayer]]:
        return zip(self.paths, cast(Iterable[LoraLayer], self.adapters), strict=True)


ADAPTED = (".to_q", ".to_k", ".to_v", ".to_out.0")  # the ends of the paths of an attention block's adapted layers


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Return path -> layer of every linear layer."""
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, nn.Linear)}


def attention_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    """Return path -> layer of W_q, W_k, W_v and W_o in every attention block."""
    return {path: layer for path, layer in linear_layers(unet).items() if path.endswith(ADAPTED)}


def lora_target_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    """Return the attention layers except the first block's W_q, W_k, W_v of self-attention.

    The gradient of those three would have to cross the largest attention matrix of all, which
    nothing else needs: 2 % of a step for 3 of 128 layers. They keep their offsets.
    """
    layers = attention_layers(unet)
    first = next(iter(layers), "").rpartition(".")[0]
    skipped = {first + end for end in ADAPTED[:3]} if first.endswith(".attn1") else set()
    return {path: layer for path, layer in layers.items() if path not in skipped}


@torch.no_grad()
def copy_sharing_weights(unet: UNet, offsets: Mapping[str, Factors], *, dtype: torch.dtype | None = None) -> UNet:
    """Return a copy of `unet`, which must not change: it shares all weights but those of its attention layers.

    Args:
        offsets: path -> factors of ΔW, merged into the copy's own weights in float32.
        dtype: of those; that of the original by default.
    """
    own = {id(layer.weight) for layer in attention_layers(unet).values()}
    tensors = [*unet.parameters(), *unet.buffers()]
    # deepcopy takes the entries of its memo for copies it has made.
    copied = copy.deepcopy(unet, {id(value): value for value in tensors if id(value) not in own})
    for path, layer in attention_layers(copied).items():
        weight = layer.weight.float()
        if path in offsets:
            left, right = (factor.to(weight.device).float() for factor in offsets[path])
            weight = weight * (1 + left @ right)
        layer.weight = nn.Parameter(weight.to(dtype or layer.weight.dtype), requires_grad=False)
    return copied


@torch.no_grad()
def frozen_copy(unet: UNet, offsets: Mapping[str, Factors], half: torch.dtype | None) -> UNet:
    """Return a copy sharing weights to train something on, its own weights frozen.

    In the base's dtype where matrix multiplications are in half precision anyway, which casts
    nothing twice; else in float32, since unscaled gradients in float16 vanish.

    Args:
        half: dtype of the matrix multiplications, None for float32.
    """
    copied = copy_sharing_weights(unet, offsets)
    return copied if half else _convert(copied, torch.float32)


@torch.no_grad()
def merge_lora(
    unet: UNet, offsets: Mapping[str, Factors], encoder: Encoder, tensors: Mapping[str, Tensor],
    *, dtype: torch.dtype | None = None,
) -> tuple[UNet, Encoder]:  # fmt: skip
    """Return a U-Net and a copy of an encoder with stored adapters merged, in float32 before any rounding.

    Args:
        unet: the base's; the result shares what was neither adapted nor is of another dtype.
        offsets: path -> factors of ΔW.
        tensors: "unet." and "encoder." before the keys of `LoraAdapters.tensors`.
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
    first = next(unet.parameters())
    merged = copy_sharing_weights(unet, offsets, dtype=torch.float32)
    LoraAdapters.from_tensors(parts["unet"]).to(first.device).merge_into(merged)
    encoder = copy.deepcopy(encoder).to(first.device)
    LoraAdapters.from_tensors(parts["encoder"]).to(first.device).merge_into(encoder)
    return _convert(merged, dtype or first.dtype), encoder.requires_grad_(False)


def _convert(module: UNet, dtype: torch.dtype) -> UNet:
    """Convert a module's weights, replacing those of another dtype: other modules share them."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            if weight.dtype != dtype:
                setattr(part, name, nn.Parameter(weight.to(dtype), requires_grad=False))
    return module
