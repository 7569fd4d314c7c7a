"""The change that tuning made to a U-Net, as a LoRA file with kohya-ss's names.

    W ≈ W₀ + up · down                     up (M × r), down (r × N)

W is a weight of the tuned U-Net, offsets merged. ΔW of eq. 3 multiplies W₀ element by element and tuning moves every
weight, so W - W₀ has full rank: a file of rank r holds its truncated singular value decomposition, and loses the rest.
Biases, normalization layers and the four matrices outside the U-Net's blocks (conv_in, conv_out and the time
embedding) stay the base's: kohya-ss's programs and stable-diffusion.cpp leave out those four. The diffusers folder and
the single file lose nothing.

Every layer has the same rank, padded with zeros where it has fewer directions, and the same alpha, the rank, so that
the product is not scaled: diffusers 0.42.1 scales some layers of files with several alphas wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from e4t_cli.errors import UsageError
from e4t_cli.formats.export_files import embedding_path
from e4t_cli.formats.textual_inversion import write_with_embedding
from e4t_cli.models.denoiser import TunedModel
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.randomness import generator
from e4t_cli.progress import Progress, ProgressCallback

MAX_RANK = 1024
BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")  # what every reader of LoRAs knows of a U-Net
STABLE_DIFFUSION_CHANNELS = (320, 640, 1280, 1280)  # of versions 1 and 2
# What kohya-ss's names of layers begin with. transformers 4 has text_model in its paths, 5 not.
KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
OVERSAMPLING, POWER_ITERATIONS = 16, 4  # of the randomized singular value decomposition (Halko et al., 2011)


def kohya_name(part: str, path: str) -> str:
    """Return what kohya-ss's files call the layer at a path of the "unet" or the "text_encoder"."""
    return KOHYA_PREFIXES[part] + path.removeprefix("text_model.").replace(".", "_")


class Lora(NamedTuple):
    """The change of a U-Net at low rank."""

    weights: dict[str, Tensor]  # by kohya-ss's names
    rank: int  # of every layer; less than requested where no layer has so many directions
    retained_energy: float  # share of the squared Frobenius norm of all W - W₀, 0 to 1


def check_rank(rank: int) -> None:
    """Raise UsageError unless a rank is 1 to `MAX_RANK`."""
    if not 1 <= rank <= MAX_RANK:
        raise UsageError(f"the rank of a LoRA must be 1 to {MAX_RANK}, not {rank}", hint="for example --lora 64")


def write_lora(
    model: TextToImageModel,
    tuned: TunedModel,
    embedding: Tensor,
    path: Path,
    *,
    rank: int,
    dtype: torch.dtype = torch.float16,
    on_progress: ProgressCallback | None = None,
) -> float:
    """Write the change as one file and the concept's embedding beside it: both, or none; returns the retained energy.

    Args:
        model: the base that `tuned` was made from, its U-Net unchanged.
        rank: r; a layer that has fewer directions keeps them all.
        on_progress: called after each layer: Stable Diffusion has 282, and takes a minute on a CPU.

    The other arguments and errors are those of `write_with_embedding` and `check_rank`.
    """
    check_rank(rank)
    found = lora_of(model.unet, tuned.unet, rank, on_progress)
    schedule: Any = model.noise_schedule  # a scheduler's `config` is not in diffusers' types
    v_prediction = schedule.config.prediction_type == "v_prediction"
    metadata = lora_metadata(
        model.unet.config, path, rank=found.rank, base_name=model.base.name, v_prediction=v_prediction
    )
    write_with_embedding(path, found.weights, embedding, dtype=dtype, metadata=metadata)
    return found.retained_energy


def lora_metadata(
    unet_config: Mapping[str, Any], path: Path, *, rank: int, base_name: str, v_prediction: bool
) -> dict[str, str]:
    """Return what programs show of a LoRA and choose it by, under kohya-ss's and the model specification's names.

    Args:
        unet_config: of the base; only Stable Diffusion's two architectures have names.
        path, rank: of the LoRA; the stem of its word's file is the one tag.
    """
    second = bool(unet_config["use_linear_projection"])
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_output_name": path.stem,
        "ss_sd_model_name": base_name,
        "ss_v2": str(second),
        "ss_tag_frequency": json.dumps({f"1_{path.stem}": {embedding_path(path).stem: 1}}),
        "modelspec.title": path.stem,
    }
    if tuple(unet_config["block_out_channels"]) != STABLE_DIFFUSION_CHANNELS:
        return metadata
    kind, version = "v1", "sd_v1"
    if second:
        kind, version = ("v2-768-v", "sd_v2_v") if v_prediction else ("v2-512", "sd_v2")
    return metadata | {
        "modelspec.architecture": f"stable-diffusion-{kind}/lora", "ss_base_model_version": version,
    }  # fmt: skip


@torch.no_grad()
def lora_of(base: nn.Module, tuned: nn.Module, rank: int, on_progress: ProgressCallback | None = None) -> Lora:
    """Return the best approximation of `tuned` - `base`, both without offsets, in `rank` directions a layer."""
    weights, total, lost = {}, 0.0, 0.0
    layers, before = _matrices(tuned), _matrices(base)
    rank = min(rank, max(min(weight.flatten(1).shape) for path, weight in layers.items() if path.startswith(BLOCKS)))
    for done, (path, weight) in enumerate(layers.items(), start=1):
        # The decomposition runs in float32, on a CUDA device or the CPU.
        device = weight.device if weight.device.type == "cuda" else torch.device("cpu")
        change = weight.to(device, torch.float32) - before[path].to(device, torch.float32)
        if on_progress:
            on_progress(Progress(stage="export", done=done, total=len(layers)))
        if not change.any():
            continue
        flat = change.flatten(1)  # (M, N), a convolution's N with its kernel
        total += flat.square().sum().item()
        if not path.startswith(BLOCKS):
            lost += flat.square().sum().item()
            continue
        up, down = _factors(flat, rank)  # (M, r), (r, N)
        lost += (flat - up @ down).square().sum().item()
        # Not diffusers' convert_state_dict_to_kohya: in 0.42.1 it writes alpha as int64 whatever
        # the weights' dtype, raises on a U-Net without changes, and replaces these three lines.
        name = kohya_name("unet", path)
        weights[f"{name}.lora_up.weight"] = up.view(*up.shape, *[1] * (change.dim() - 2)).cpu()
        weights[f"{name}.lora_down.weight"] = down.reshape(-1, *change.shape[1:]).cpu()
        weights[f"{name}.alpha"] = torch.tensor(float(rank))
    return Lora(weights=weights, rank=rank, retained_energy=1 - lost / total if total else 1.0)


def _matrices(unet: nn.Module) -> dict[str, Tensor]:
    return {path: layer.weight for path, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}


def _factors(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return up (M, r) and down (r, N), whose product is the closest of rank r to `change`."""
    if rank + OVERSAMPLING >= min(change.shape):
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[] if change.device.type == "cpu" else None):
            torch.manual_seed(generator(0, "lora").initial_seed())
            u, s, v = torch.svd_lowrank(change, q=rank + OVERSAMPLING, niter=POWER_ITERATIONS)
        vh = v.T
    root = s[:rank].sqrt()  # in both factors, so that neither is too small for half precision
    missing = rank - len(root)
    up, down = u[:, :rank] * root, root[:, None] * vh[:rank]
    return functional.pad(up, (0, missing)), functional.pad(down, (0, 0, 0, missing))
