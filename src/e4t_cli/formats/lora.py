"""What tuning changed, as a LoRA: a small file that other programs add to the base they have.

    W ≈ W₀ + up · down                     up (M × r), down (r × N)

W is what the tuned U-Net has become, offsets merged. It loses something: ΔW of eq. 3 multiplies W₀
element by element and tuning moves every weight, so W - W₀ has every direction a matrix can have,
and a file of rank r keeps the r that matter most (its truncated singular value decomposition).
Biases and normalisations stay the base's. The folder and the single file lose nothing.

The names are those of kohya-ss, which every program reads; a convolution's `down` has its kernel.
Every layer has the same rank, with zeros where it has fewer directions, and alpha says so: programs
disagree about files of several ranks (diffusers 0.42 scales some layers of them wrongly).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from e4t_cli.errors import UsageError
from e4t_cli.formats.textual_inversion import write_pair
from e4t_cli.models.denoiser import TunedModel
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.randomness import generator
from e4t_cli.progress import Progress, ProgressCallback

MAX_RANK = 1024
SPARE_DIRECTIONS, ROUNDS = 16, 4
"""Of the search for the largest singular values (Halko et al., 2011), which finds them closely."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Lora:
    """The change of a U-Net in few numbers.

    Args:
        weights: by kohya-ss's names.
        rank: of every layer; less than was asked for where no layer has so many directions.
        kept: share of the change that they hold, of the sum of its squares.
    """

    weights: dict[str, Tensor]
    rank: int
    kept: float


def check_rank(rank: int) -> None:
    """Refuse a rank that means nothing.

    Raises:
        UsageError: it is none.
    """
    if not 1 <= rank <= MAX_RANK:
        raise UsageError(
            f"the rank of a LoRA must be 1 to {MAX_RANK}, not {rank}",
            hint="for example --lora 64",
        )


def write_lora(
    model: TextToImageModel,
    tuned: TunedModel,
    word: Tensor,
    path: Path,
    *,
    rank: int,
    dtype: torch.dtype = torch.float16,
    on_progress: ProgressCallback | None = None,
) -> float:
    """Write the change as one file, and the word beside it; both, or none.

    Args:
        model: the base that `tuned` was made from, its U-Net as it was.
        word: the embedding of the concept (embedding_width,).
        path: must not exist, nor what `pair.word_path` says.
        rank: r; a layer that has fewer directions keeps them all.
        dtype: of the stored weights.
        on_progress: called after each layer: Stable Diffusion has 280, and takes a minute on a CPU.

    Returns:
        The share of the change that the file holds.

    Raises:
        UsageError: a file exists, or the rank is none.
        ResourceError: the disk has no room, or cannot be written to.
    """
    check_rank(rank)
    found = lora_of(model.unet, tuned.unet, rank, on_progress)
    second = bool(model.unet.config.use_linear_projection)
    about = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(found.rank),
        "ss_network_alpha": str(found.rank),
        "ss_v2": str(second),  # what programs tell Stable Diffusion 2 by
        "ss_sd_model_name": model.base.name,
    }
    write_pair(path, found.weights, word, dtype=dtype, about=about)
    return found.kept


@torch.no_grad()
def lora_of(
    base: nn.Module,
    tuned: nn.Module,
    rank: int,
    on_progress: ProgressCallback | None = None,
) -> Lora:
    """Return what made one U-Net of the other, in so many directions a layer.

    Args:
        base, tuned: of the same layers; neither has offsets attached.
    """
    weights, whole, missing = {}, 0.0, 0.0
    layers, before = _matrices(tuned), _matrices(base)
    rank = min(rank, max(min(weight.flatten(1).shape) for weight in layers.values()))
    for done, (path, weight) in enumerate(layers.items(), start=1):
        change = _change(before[path], weight)
        if on_progress:
            on_progress(Progress(stage="export", done=done, total=len(layers)))
        if not change.any():
            continue
        flat = change.flatten(1)  # (M, N), a convolution's N with its kernel
        up, down = _factors(flat, rank)  # (M, r), (r, N)
        whole += flat.square().sum().item()
        missing += (flat - up @ down).square().sum().item()
        name = "lora_unet_" + path.replace(".", "_")
        kernel = change.shape[2:]
        weights[f"{name}.lora_up.weight"] = up.reshape(*up.shape, *(1 for _ in kernel)).cpu()
        weights[f"{name}.lora_down.weight"] = down.reshape(-1, *change.shape[1:]).cpu()
        weights[f"{name}.alpha"] = torch.tensor(float(rank))  # so that readers scale by 1
    return Lora(weights=weights, rank=rank, kept=1 - missing / whole if whole else 1.0)


def _change(before: Tensor, weight: Tensor) -> Tensor:
    """Return W - W₀ in float32, where singular values are found."""
    where = weight.device if weight.device.type == "cuda" else torch.device("cpu")
    return weight.to(where, torch.float32) - before.to(where, torch.float32)


def _matrices(unet: nn.Module) -> dict[str, Tensor]:
    return {
        path: layer.weight
        for path, layer in unet.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def _factors(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return up (M, r) and down (r, N), the closest to a matrix that r directions can be."""
    least = min(change.shape)
    if rank + SPARE_DIRECTIONS >= least:
        u, sizes, v = torch.linalg.svd(change, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[] if change.device.type == "cpu" else None):
            torch.manual_seed(generator(0, "lora").initial_seed())
            count = rank + SPARE_DIRECTIONS
            u, sizes, v = torch.svd_lowrank(change, q=count, niter=ROUNDS)
        v = v.T
    root = sizes[:rank].sqrt()  # to both, so that neither is too small for half precision
    up, down = u[:, :rank] * root, root[:, None] * v[:rank]
    fewer = rank - len(root)
    return functional.pad(up, (0, fewer)), functional.pad(down, (0, 0, 0, fewer))
