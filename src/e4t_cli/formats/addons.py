"""Adds LoRAs, textual inversions and another VAE to a base that was just loaded.

Before everything else: tuning, offsets and exports then sit on top, and no weight has parametrizations yet.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from e4t_cli.errors import IntegrityError, printable
from e4t_cli.formats.lora_files import base_layers, merge_loras, read_lora
from e4t_cli.formats.stable_diffusion import vae_name
from e4t_cli.hub.addon_files import EmbeddingFile, vae_file, word_of
from e4t_cli.hub.addons import BaseAddons
from e4t_cli.models.loading import canonical_key, load_part
from e4t_cli.models.prompt_embedding import NO_WORDS, AddedWords
from e4t_cli.models.text_to_image import TextToImageModel

LISTED = 3  # layers in one note


def apply_addons(
    model: TextToImageModel,
    addons: BaseAddons,
    note: Callable[[str], None] | None = None,
    remark: Callable[[str], None] | None = None,
) -> None:
    """Change a base that nobody else has yet.

    Args:
        note, remark: called with what is doubtful, and with what was done.

    Raises:
        E4TError: a file is missing, damaged, of another kind, or made for another base.
    """
    if model.addons:
        raise ValueError("a base takes add-ons once, all together")
    model.addons = addons.check()
    known, base = base_layers(model.unet, model.text_encoder), model.base.name
    loras = [read_lora(file, known, base) for file in addons.sorted_loras()]
    for lora in loras:
        if remark:
            remark(lora.summary)
        if note and lora.unknown:
            some = ", ".join(printable(name, limit=80) for name in lora.unknown[:LISTED])
            more = " …" if len(lora.unknown) > LISTED else ""
            note(f"{printable(lora.file.path.name)}: left out what {base} has no layer for: {some}{more}")
    merge_loras(loras, known)
    vectors = {word_of(one): read_vectors(one, model) for one in addons.embeddings}
    first = model.text_encoder.get_input_embeddings().num_embeddings
    model.words = AddedWords(vectors, first) if vectors else NO_WORDS
    if addons.vae is not None:
        _replace_vae(model, addons.vae, printable(addons.vae_source or str(addons.vae)))


def read_vectors(file: EmbeddingFile, model: TextToImageModel) -> Tensor:
    """Return the embeddings of a textual inversion, (tokens, embedding_width), float32.

    Raises:
        IntegrityError: it is damaged, or was made for another base.
    """
    shown = printable(str(file.path))
    with safe_open(file.path, framework="pt") as opened:
        (key,) = opened.keys()
        vectors: Tensor = opened.get_tensor(key).float()
    vectors = vectors[None] if vectors.dim() == 1 else vectors
    ours, theirs = model.embedding_width, vectors.shape[-1]
    if theirs != ours:
        message = f"{shown} has embeddings of {theirs} values, and the words of {model.base.name} have {ours}"
        raise IntegrityError(message, hint="use one for this base, or the --base it was made for")
    if not len(vectors) or not vectors.isfinite().all():
        raise IntegrityError(f"{shown} is damaged: it has no embedding, or values that are not finite")
    return vectors.to(model.device)


def _replace_vae(model: TextToImageModel, given: Path, shown: str) -> None:
    path = vae_file(given)
    if os.path.isdir(given):
        vae = load_part(AutoencoderKL, path.parent, model.device, model.dtype)
        ours, theirs = model.vae.config, vae.config
        if len(ours["block_out_channels"]) != len(theirs["block_out_channels"]) or (
            theirs["latent_channels"] != model.unet.config["in_channels"]
        ):
            raise IntegrityError(
                f"the VAE in {shown} has other latents than {model.base.name}", hint="leave --vae out"
            )
        if model.device.type == "cuda" and model.dtype.itemsize == 2:
            vae = vae.to(memory_format=torch.channels_last)  # as `TextToImageModel.load`
        model.vae = vae.requires_grad_(False)
        return
    stored = {key.removeprefix("first_stage_model."): value for key, value in load_file(path).items()}
    stored = {canonical_key(key): value for key, value in stored.items()}
    blocks, tensors = len(model.vae.config["block_out_channels"]), {}
    for key, own in model.vae.state_dict().items():
        value = stored.get(key, stored.get(vae_name(key, blocks)))
        if value is None or value.numel() != own.numel() or value.shape[: own.dim()] != own.shape:
            found = "lacks" if value is None else "has another shape of"
            raise IntegrityError(
                f"{shown} is no VAE as that of {model.base.name}: it {found} {key}", hint="leave --vae out"
            )
        if not value.isfinite().all():
            raise IntegrityError(f"{shown} is damaged: {key} is not finite")
        tensors[key] = value.view(own.shape)  # attention is made of convolutions of one pixel in older files
    model.vae.load_state_dict(tensors)
