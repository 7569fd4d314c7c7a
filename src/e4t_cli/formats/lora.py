"""The change that tuning made to a U-Net, as a LoRA file with kohya-ss's names.

    W ≈ W₀ + up · down                     up (M × r), down (r × N)

W is a weight of the tuned U-Net, offsets merged. ΔW of eq. 3 multiplies W₀ element by element and tuning moves every
weight, so W - W₀ has full rank: a file of rank r holds its truncated singular value decomposition, and loses the rest.
Biases and normalization layers stay the base's. The diffusers folder and the single file lose nothing.

Every layer has the same rank, padded with zeros where it has fewer directions, and alpha = rank: diffusers 0.42 scales
some layers of files with several ranks wrongly.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from e4t_cli.errors import UsageError
from e4t_cli.formats.textual_inversion import write_with_embedding
from e4t_cli.models.denoiser import TunedModel
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.randomness import generator
from e4t_cli.progress import Progress, ProgressCallback

MAX_RANK = 1024
OVERSAMPLING, POWER_ITERATIONS = 16, 4  # of the randomized singular value decomposition (Halko et al., 2011)


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
        on_progress: called after each layer: Stable Diffusion has 280, and takes a minute on a CPU.

    The other arguments and errors are those of `write_with_embedding` and `check_rank`.
    """
    check_rank(rank)
    found = lora_of(model.unet, tuned.unet, rank, on_progress)
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(found.rank),
        "ss_network_alpha": str(found.rank),
        # By this, programs know Stable Diffusion 2.
        "ss_v2": str(bool(model.unet.config["use_linear_projection"])),
        "ss_sd_model_name": model.base.name,
    }
    write_with_embedding(path, found.weights, embedding, dtype=dtype, metadata=metadata)
    return found.retained_energy


@torch.no_grad()
def lora_of(base: nn.Module, tuned: nn.Module, rank: int, on_progress: ProgressCallback | None = None) -> Lora:
    """Return the best approximation of `tuned` - `base`, both without offsets, in `rank` directions a layer."""
    weights, total, lost = {}, 0.0, 0.0
    layers, before = _matrices(tuned), _matrices(base)
    rank = min(rank, max(min(weight.flatten(1).shape) for weight in layers.values()))
    for done, (path, weight) in enumerate(layers.items(), start=1):
        # The decomposition runs in float32, on a CUDA device or the CPU.
        device = weight.device if weight.device.type == "cuda" else torch.device("cpu")
        change = weight.to(device, torch.float32) - before[path].to(device, torch.float32)
        if on_progress:
            on_progress(Progress(stage="export", done=done, total=len(layers)))
        if not change.any():
            continue
        flat = change.flatten(1)  # (M, N), a convolution's N with its kernel
        up, down = _factors(flat, rank)  # (M, r), (r, N)
        total += flat.square().sum().item()
        lost += (flat - up @ down).square().sum().item()
        # Not diffusers' convert_state_dict_to_kohya: in 0.42.1 it writes alpha as int64 whatever
        # the weights' dtype, raises on a U-Net without changes, and replaces these three lines.
        name = "lora_unet_" + path.replace(".", "_")
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
