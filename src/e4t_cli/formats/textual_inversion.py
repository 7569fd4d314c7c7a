"""One word embedding for all time steps, for programs that cannot predict it anew at each.

Departure: section 3.1 refines e_c at every step of drawing. Here it is the mean over the noise
levels that training sees, each of its own noisy view of the photo: what is left out is what the
refinement adds, and docs/mini.md has its size.

A file of weights with the concept's word beside it: both, or none.

Programs that read such files keep new words in a folder of their own and call them by the names of
their files, so the word is a second file that can go there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from e4t_cli.files import check_free, making, rename_to_free_name, sync_tree
from e4t_cli.models.denoiser import TunedModel
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.randomness import draw
from e4t_cli.nn.unet import down_and_mid, embed_latents, pooled_features
from e4t_cli.registry.domain import PreparedImage

LEVELS = 16
"""Noise levels looked at, each in its own range of time steps, as in a step of tuning."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ConceptEmbedding:
    """e_c without its time.

    Args:
        embedding: (embedding_width,), float32.
        variation: how far e_c strays from it over the noise levels, as a share of how far it is
            itself from the descriptor's embedding.
    """

    embedding: Tensor
    variation: float


@torch.no_grad()
def mean_concept_embedding(
    model: TextToImageModel, tuned: TunedModel, prepared: PreparedImage, *, seed: int = 0
) -> ConceptEmbedding:
    """Return the mean of e_c over noise levels of the photo.

    Args:
        model: the base that `tuned` was made from.
        prepared: the photo it was tuned on.
        seed: of the noise.
    """
    if not tuned.encoder.reads_unet:
        return ConceptEmbedding(embedding=tuned.embedding(None)[0], variation=0.0)
    draws = draw(
        seed, 0, range(LEVELS), batch_size=LEVELS, train_timesteps=model.train_timesteps,
        shape=model.latent_shape,
    ).to(model.device)  # fmt: skip
    z_0 = model.posterior(model.pixels([prepared.image])).sample(draws.posterior)
    z_t = model.add_noise(z_0, draws.epsilon, draws.timesteps).to(tuned.unet.dtype)
    nothing, seen = model.uncond_embeds.to(z_t.dtype), []
    for level in range(LEVELS):  # one by one: it is done once, and large pictures fill a card
        one = slice(level, level + 1)
        start = embed_latents(tuned.unet, z_t[one], draws.timesteps[one])
        seen.append(pooled_features(down_and_mid(tuned.unet, start, nothing)).float())
    e_c = tuned.embedding(torch.cat(seen))
    mean = e_c.mean(dim=0)
    strayed = (e_c - mean).norm(dim=1).mean() / (mean - tuned.e_domain).norm().clamp(min=1e-12)
    return ConceptEmbedding(embedding=mean, variation=float(strayed))


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
