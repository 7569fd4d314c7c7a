"""A concept's word embedding, averaged over noise levels, in the file format of textual inversion.

Departure: section 3.1 predicts e_c anew at every denoising step, which other programs cannot do. Here it is the mean
over the noise levels of training, each of its own noisy latent of a photo; docs/mini.md: what the refinement adds.

Programs that read single-file weights keep word embeddings in another folder and use their file names as tokens, so
the embedding is a second file beside the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from e4t_cli.files import check_absent, rename_to_free_name, staging_directory, sync_tree
from e4t_cli.formats.export_files import WRITER, embedding_path
from e4t_cli.models.denoiser import TunedModel
from e4t_cli.models.photos import Photos, as_sequence, encode_latents, photo_of_samples
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.randomness import draw
from e4t_cli.nn.unet import down_and_mid, embed_latents, pooled_features

NOISE_LEVELS = 16  # each in its own range of time steps, as in a step of tuning


class ConceptEmbedding(NamedTuple):
    """The mean of e_c over noise levels, and how much e_c varies."""

    embedding: Tensor  # the mean (embedding_width,), in float32
    variation: float  # mean distance of e_c from the mean, relative to the mean's distance from e_domain


@torch.no_grad()
def mean_concept_embedding(
    model: TextToImageModel, tuned: TunedModel, prepared: Photos, *, seed: int = 0
) -> ConceptEmbedding:
    """Return the mean of e_c over noise levels of the photo, or photos, that `tuned` was tuned on."""
    if not tuned.encoder.reads_unet:
        return ConceptEmbedding(embedding=tuned.embedding(None)[0], variation=0.0)
    unet = tuned.unet
    assert isinstance(unet, UNet2DConditionModel)
    levels, steps = range(NOISE_LEVELS), model.train_timesteps
    draws = draw(seed, 0, levels, batch_size=NOISE_LEVELS, train_timesteps=steps, shape=model.latent_shape)
    draws = draws.to(model.device)
    photos = as_sequence(prepared)
    which = photo_of_samples(seed, 0, photos=len(photos), batch_size=NOISE_LEVELS).to(model.device)
    z_0 = encode_latents(model, photos)[which].sample(draws.posterior)
    z_t = model.add_noise(z_0, draws.epsilon, draws.timesteps).to(unet.dtype)
    empty_prompt = model.uncond_embeds.to(z_t.dtype)
    features = []
    for level in levels:  # not as one batch: large images would fill a GPU's memory
        one = slice(level, level + 1)
        start = embed_latents(unet, z_t[one], draws.timesteps[one])
        features.append(pooled_features(down_and_mid(unet, start, empty_prompt)).float())
    e_c = tuned.embedding(torch.cat(features))
    mean = e_c.mean(dim=0)
    distance = (e_c - mean).norm(dim=1).mean() / (mean - tuned.e_domain).norm().clamp(min=1e-12)
    return ConceptEmbedding(embedding=mean, variation=float(distance))


def check_both_absent(path: Path) -> None:
    """Raise UsageError if the file of weights or that of its embedding exists."""
    check_absent(path)
    check_absent(embedding_path(path))


def write_with_embedding(
    path: Path,
    weights: Mapping[str, Tensor],
    embedding: Tensor,
    *,
    dtype: torch.dtype,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file of weights and the concept's embedding beside it: both, or none.

    Args:
        path: must not exist, nor its `embedding_path`.
        weights: on any device.
        embedding: of the concept (embedding_width,).
        dtype, metadata: of the file of weights.

    Raises:
        UsageError: a file exists.
        ResourceError: the disk has no room, or cannot be written to.
    """
    check_both_absent(path)
    size = sum(value.numel() for value in weights.values()) * dtype.itemsize
    with staging_directory(path, size) as staging:
        stored = {
            name: value.detach().to("cpu", dtype if value.is_floating_point() else None).contiguous()
            for name, value in weights.items()
        }
        save_file(stored, staging / "weights", {"format": "pt", WRITER: "e4t", **(metadata or {})})
        save_file({"emb_params": embedding.detach().cpu().float()[None]}, staging / "embedding", {WRITER: "e4t"})
        for name in ("weights", "embedding"):
            # safetensors makes files that only their owner may read.
            (staging / name).chmod(staging.stat().st_mode & 0o666)
        sync_tree(staging)
        rename_to_free_name(staging / "embedding", embedding_path(path))
        try:
            rename_to_free_name(staging / "weights", path)
        except BaseException:
            embedding_path(path).unlink()
            raise
