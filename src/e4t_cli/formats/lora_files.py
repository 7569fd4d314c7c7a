"""Reads LoRAs that other programs wrote, and merges them into the weights of a base.

    W ← W + Σ scale · alpha / rank · up · down

kohya-ss's names are those of `formats.lora`, which writes them: the path of a layer with "_" for ".". diffusers and
PEFT name layers by their paths; a file of theirs has its alphas in its description, or none, which means the rank.
Own arithmetic, in float32: diffusers 0.42.1 scales files with several alphas wrongly, and PEFT's merge does nothing
where a layer has parametrizations.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from e4t_cli.errors import IntegrityError, printable
from e4t_cli.formats.lora import KOHYA_PREFIXES, kohya_name
from e4t_cli.hub.addon_files import OPTIONS, LoraFile, read_header

# The layer, and which of its two matrices; ".processor.to_q_lora" is how diffusers named them first.
_MATRIX = re.compile(r"(.+?)[._](?:lora_|lora(?:_linear_layer)?\.)(down|up|A|B)(?:\.\w+)?\.weight")
_DOWN = {"down": True, "A": True, "up": False, "B": False}
_OLD_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out_0": "out_proj"}


@dataclass(kw_only=True)
class _Pair:
    """One layer of a file, by the keys of its tensors."""

    name: str  # the layer's, in the file
    down: str = ""
    up: str = ""
    alpha: str = ""


@dataclass(kw_only=True)
class LoraLayers:
    """What a LoRA changes of a base.

    Args:
        layers: by the layers' names in kohya-ss's files.
        unknown: keys or layers of the file that are in no layer of the base.
    """

    file: LoraFile
    layers: dict[str, _Pair]
    scales: dict[str, float]
    unknown: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """Return a phrase about it, with the number of its layers."""
        text = sum(name.startswith(KOHYA_PREFIXES["text_encoder"]) for name in self.layers)
        parts = [
            f"{count} {of}" for count, of in ((len(self.layers) - text, "U-Net"), (text, "text encoder")) if count
        ]
        return f"LoRA {printable(self.file.path.stem, limit=60)}:{self.file.scale:g}: layers: {', '.join(parts)}"


def base_layers(unet: nn.Module, text_encoder: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Return every layer that a LoRA can change, with its path, by its name in kohya-ss's files."""
    return {
        kohya_name(part, path): (path, layer)
        for part, whole in (("unet", unet), ("text_encoder", text_encoder))
        for path, layer in whole.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def read_lora(file: LoraFile, known: Mapping[str, tuple[str, nn.Module]], base: str) -> LoraLayers:
    """Return which layers a LoRA changes; its tensors are not read yet.

    Args:
        known: from `base_layers`.
        base: the name of the base.

    Raises:
        IntegrityError: it is damaged, or does not fit the base.
    """
    shapes, metadata = read_header(file.path, OPTIONS["lora"])
    shown = printable(str(file.path))
    pairs, unknown = _pairs(shapes)
    found = {name: pair for name, pair in pairs.items() if name in known}
    strange = [pair.name for name, pair in pairs.items() if name not in known]
    whole = len(pairs)
    if len(strange) > whole / 2 or not whole:
        message = (
            f"{len(strange)} of the {whole} layers of {shown} are not in {base}, as {printable(strange[0], limit=100)}"
        )
        raise IntegrityError(
            message, hint="it was trained on another architecture, or with names that e4t does not know"
        )
    for name, pair in found.items():
        _check_pair(pair, shapes, known[name][1], shown, base)
    alphas = _Alphas(file.path, metadata)
    scales = {name: alphas.rank_scale(pair, known[name][0], shapes[pair.down][0]) for name, pair in found.items()}
    return LoraLayers(file=file, layers=found, scales=scales, unknown=strange + unknown)


def _pairs(shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, _Pair], list[str]]:
    """Return the layers of a file by kohya-ss's names, and the keys that belong to none."""
    pairs: dict[str, _Pair] = {}
    others = []
    for key in shapes:
        match = _MATRIX.fullmatch(key)
        if match is None:
            others.append(key)
            continue
        pair = pairs.setdefault(_layer_name(match[1]), _Pair(name=match[1]))
        if _DOWN[match[2]]:
            pair.down = key
        else:
            pair.up = key
    unknown = []
    for key in others:
        owner = pairs.get(_layer_name(key.removesuffix(".alpha"))) if key.endswith(".alpha") else None
        if owner is None:
            unknown.append(key)
        else:
            owner.alpha = key
    return pairs, unknown


def _layer_name(name: str) -> str:
    """Return what kohya-ss's files call a layer that any program named."""
    for part, prefix in KOHYA_PREFIXES.items():
        if name.startswith(prefix):
            return name
        if name.startswith(f"{part}."):
            break
    else:
        part, name = "unet", f"unet.{name.removeprefix('base_model.model.')}"
    path = name.removeprefix(f"{part}.").replace(".processor.", ".")
    found = kohya_name(part, path)
    if found.endswith("_to_out"):
        found += "_0"
    if part == "text_encoder":
        for old, new in _OLD_TEXT_NAMES.items():
            if found.endswith(f"_{old}"):
                found = found.removesuffix(old) + new
    return found


def _check_pair(
    pair: _Pair, shapes: Mapping[str, tuple[int, ...]], layer: nn.Module, shown: str, base: str
) -> None:  # fmt: skip
    """Raise IntegrityError unless the two matrices fit each other and the layer."""
    name = printable(pair.name, limit=100)
    if not (pair.down and pair.up):
        half = "lora_up" if pair.down else "lora_down"
        raise IntegrityError(f"{shown} is damaged: its layer {name} has no {half}")
    down, up, weight = shapes[pair.down], shapes[pair.up], tuple(cast(Tensor, layer.weight).shape)
    inner = torch.Size(down[1:]).numel()
    fits = len(down) > 1 and len(up) > 1 and down[0] == up[1] and torch.Size(up[2:]).numel() == 1
    if not fits or down[0] == 0:
        raise IntegrityError(f"{shown} is damaged: the shapes of its layer {name} do not fit each other: {up}, {down}")
    if up[0] != weight[0] or inner != torch.Size(weight[1:]).numel():
        theirs, ours = f"{up[0]} × {inner}", f"{weight[0]} × {torch.Size(weight[1:]).numel()}"
        message = f"{shown} was not trained on a base as {base}: its layer {name} is {theirs}, and here it is {ours}"
        raise IntegrityError(message, hint="use a LoRA for this base, or the --base it was trained on")


class _Alphas:
    """By what the products of a file are divided, as PEFT and diffusers describe it.

    Raises:
        IntegrityError: the description cannot be read; it is used where it is, so that no scale is guessed.
    """

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self.path, self.configs = path, dict[str, dict[str, Any]]()
        beside = path.with_name("adapter_config.json")
        try:
            if "lora_adapter_metadata" in metadata:
                for key, value in json.loads(metadata["lora_adapter_metadata"]).items():
                    part, _, name = key.partition(".")
                    self.configs.setdefault(part, {})[name] = value
            elif path.name == "adapter_model.safetensors" and os.path.isfile(beside):
                self.configs["unet"] = dict(json.loads(beside.read_text(encoding="utf-8")))
            for config in self.configs.values():
                config["alpha_pattern"] = dict(config.get("alpha_pattern") or {})
                if config.get("use_dora") or config.get("use_rslora"):
                    raise ValueError("it is a DoRA or an rsLoRA")
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            message = f"the description of the LoRA {printable(str(path))} cannot be used: {printable(str(error))}"
            raise IntegrityError(message, hint="e4t merges plain LoRAs") from error

    def rank_scale(self, pair: _Pair, path: str, rank: int) -> float:
        """Return alpha / rank of a layer at a path of the base."""
        alpha: Any = None
        if pair.alpha:
            with safe_open(self.path, framework="pt") as opened:
                values = opened.get_tensor(pair.alpha).float()
            alpha = values.item() if values.numel() == 1 else None
        else:
            if pair.name.startswith("base_model.") and not self.configs:
                message = f"{printable(str(self.path))} does not say its alpha"
                raise IntegrityError(message, hint="PEFT writes it into adapter_config.json: keep that beside it")
            config = self.configs.get("text_encoder" if pair.name.startswith("text_encoder.") else "unet", {})
            alpha = config.get("lora_alpha", rank)
            for pattern, own in config.get("alpha_pattern", {}).items():
                if re.fullmatch(rf"(.*\.)?({re.escape(pattern)})", path):
                    alpha = own
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e6:  # nor NaN
            name = printable(pair.name, limit=100)
            raise IntegrityError(f"{printable(str(self.path))} is damaged: the alpha of its layer {name} is {alpha}")
        return alpha / rank


@torch.no_grad()
def merge_loras(loras: Sequence[LoraLayers], known: Mapping[str, tuple[str, nn.Module]]) -> None:
    """Add the changes of all LoRAs to the weights of a base, which nobody else may have.

    Args:
        known: the layers, from `base_layers`; none has parametrizations.

    Raises:
        IntegrityError: a file is damaged.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(one.file.path, framework="pt")) for one in loras]
        for name, (_, layer) in known.items():
            weight = cast(Tensor, layer.weight)
            changes = [
                _change(name, *one, weight.device) for one in zip(loras, files, strict=True) if name in one[0].layers
            ]
            if changes:
                total = weight.float()
                for change in changes:  # in float32, and rounded once
                    total = total + change.view_as(total)
                weight.copy_(total)


def _change(name: str, lora: LoraLayers, opened: Any, device: torch.device) -> Tensor:
    """Return what a LoRA adds to the weight of a layer, flattened to a matrix."""
    pair = lora.layers[name]
    up, down = (opened.get_tensor(key).to(device).float().flatten(1) for key in (pair.up, pair.down))
    change: Tensor = (lora.file.scale * lora.scales[name]) * (up @ down)
    if not change.isfinite().all():
        shown = printable(str(lora.file.path))
        raise IntegrityError(f"{shown} is damaged: its layer {printable(pair.name, limit=100)} is not finite")
    return change
