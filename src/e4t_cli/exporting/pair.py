"""A file of weights with the concept's word beside it: both, or none.

Programs that read such files keep new words in a folder of their own and call them by the names of
their files, so the word is a second file that can go there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from e4t_cli.files import rename_to_free_name, sync_tree

from .making import check_free, making


def word_path(path: Path) -> Path:
    """Return where the word of a file of weights is: its name there is what prompts call it."""
    return path.with_name(f"{path.stem}-word{path.suffix}")


def check_pair(path: Path) -> None:
    """Refuse names that are taken.

    Raises:
        UsageError: one of the two files exists.
    """
    check_free(path)
    check_free(word_path(path))


def write_pair(
    path: Path,
    weights: Mapping[str, Tensor],
    word: Tensor,
    *,
    dtype: torch.dtype,
    about: Mapping[str, str] | None = None,
) -> None:
    """Write weights and, beside them, the word.

    Args:
        path: must not exist, nor what `word_path` says.
        weights: on any device.
        word: the embedding of the concept (embedding_width,).
        dtype: of the stored weights.
        about: what the file says of itself, to programs that ask.

    Raises:
        UsageError: a file exists.
        ResourceError: the disk has no room, or cannot be written to.
    """
    check_pair(path)
    with making(path, sum(value.numel() for value in weights.values()) * dtype.itemsize) as place:
        whole = {name: _stored(value, dtype) for name, value in weights.items()}
        save_file(whole, place / "weights", {"format": "pt", **(about or {})})
        save_file({"emb_params": word.detach().cpu().float()[None]}, place / "word")
        for name in ("weights", "word"):
            (place / name).chmod(place.stat().st_mode & 0o666)  # it writes for the owner alone
        sync_tree(place)
        rename_to_free_name(place / "word", word_path(path))
        try:
            rename_to_free_name(place / "weights", path)
        except BaseException:
            word_path(path).unlink()  # alone it is nothing
            raise


def _stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    kind = dtype if value.is_floating_point() else value.dtype
    return value.detach().to("cpu", kind).contiguous()
