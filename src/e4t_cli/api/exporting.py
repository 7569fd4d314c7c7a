"""Exports a concept as plain Stable Diffusion weights for other programs.

The result is a folder in diffusers' layout, a single file (Stable Diffusion 1.x), or a LoRA; the
word's embedding lies beside a file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from e4t_cli.api.options import RunKeywords, RunOptions
from e4t_cli.api.resolve import load_concept, load_concept_models
from e4t_cli.api.session import Session
from e4t_cli.errors import UsageError, printable
from e4t_cli.files import staging_directory
from e4t_cli.formats.export_files import check_free, commit, embedding_path
from e4t_cli.hub.bases import Base
from e4t_cli.prompts import check_placeholder

if TYPE_CHECKING:
    from e4t_cli.formats.concept import Concept


WORDS = ("included", "separate")
# Of files: a folder of such a name is a slip.
OTHER_FILES = {".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".onnx", ".zip", ".e4t", ".png", ".jpg"}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A concept in a format of other programs."""

    path: Path  # a folder in diffusers' layout, or a single file
    token: str  # what prompts call the concept there; the stem of the word's file if the word is in one
    variation: float  # share of the word that depends on the noise level, which is left out
    licence: str  # of the base; "" if its files do not state one
    retained_energy: float = 1.0  # share of what tuning changed that is in it: 1 but for a LoRA


def export(
    concept: Concept | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    lora: int | None = None,
    placeholder: str | None = None,
    word: str = "included",
    vram: str = "auto",
    force: bool = False,
    **options: Unpack[RunKeywords],
) -> Exported:
    """Write a concept as a model that other programs read.

    The U-Net is the tuned one; the word is one new token with a fixed embedding, where this program predicts it anew
    at every step (`textual_inversion.mean_concept_embedding`).

    Args:
        concept: from `personalize`, or the file it was saved to.
        path: must not exist; it appears whole, or not at all. A folder that `StableDiffusionPipeline.from_pretrained`
            reads, or, if it ends in .safetensors, a single file with the word beside it.
        lora: write only the change of the base, as a LoRA of this rank, into such a file. It is small and an
            approximation: `Exported.retained_energy` is the share that it holds.
        placeholder: a folder's token; the concept's own by default.
        word: "included" in a folder's tokenizer and text encoder, or "separate": only in a file in the folder, for
            programs whose vocabulary has a fixed size. Beside a single file or a LoRA it always is in a file.
        vram: gigabytes that may be used, as "8", or "auto" for what is free.
        force: replace what an earlier export wrote there.
        options: keywords, the fields of `RunOptions`. dtype "fp32" writes float32; anything else float16, half as
            large.

    Raises:
        UsageError: the path exists, the base has the token in its vocabulary, or is not of the kind that a single file
            can hold; or a LoRA is to be a folder.
        ResourceError: the disk has no room.
        E4TError: another of its children.
    """
    asked = RunOptions(**options)
    target = Path(path)
    alone = target.suffix == ".safetensors"
    if not alone and target.suffix.lower() in OTHER_FILES:
        hint = f"call it {printable(target.stem)}.safetensors, or {printable(target.stem)} for a folder"
        raise UsageError(f"an export is a folder or a file that ends in .safetensors, not {target.suffix}", hint=hint)
    if lora is not None and not alone:
        raise UsageError("a LoRA is one file", hint=f"call it {printable(target.name)}.safetensors")
    if word not in WORDS:
        raise UsageError(f"the word is {' or '.join(WORDS)}, not {printable(word)!r}")
    if placeholder is not None:
        check_placeholder(placeholder)
    in_file = alone or word == "separate"
    if in_file and placeholder is not None:
        raise UsageError(
            "the file of the word is its name: there is no token to choose", hint="leave out --placeholder"
        )
    check_free(target, force=force)
    session = Session(asked, vram=vram)
    with session.running():
        opened = load_concept(concept)
        token = placeholder or opened.placeholder
        load_concept_models(opened, session)
        model, pretrained = session.model, session.pretrained
        from e4t_cli.formats import lora as lora_file
        from e4t_cli.formats import stable_diffusion, textual_inversion

        # Everything that can be refused is checked before the tuning.
        if lora is not None:
            lora_file.check_rank(lora)
            if some := [str(one) for one in model.addons if one.kind == "lora"]:
                session.note(
                    "export", f"the file is what tuning added to the base with {' and '.join(some)}: use both"
                )
        elif alone:
            stable_diffusion.check_single_file(model)
        elif not in_file:
            stable_diffusion.check_token(model, token)
        tuned = opened.tuned(model, pretrained) or session.tune(opened, keep_base=lora is not None)
        with session.stage("export", counted=lora is not None), staging_directory(target) as staging:
            import torch

            found = textual_inversion.mean_concept_embedding(model, tuned, opened.photos, seed=opened.seed)
            stored, made = torch.float32 if asked.dtype == "fp32" else torch.float16, staging / target.name
            retained_energy = 1.0
            if in_file:
                token = embedding_path(target).stem
            if lora is not None:
                retained_energy = lora_file.write_lora(
                    model, tuned, found.embedding, made, rank=lora, dtype=stored, on_progress=session.report
                )
            elif alone:
                stable_diffusion.write_single_file(model, tuned, found.embedding, made, dtype=stored)
            else:
                readme = _readme(opened, token, model.base, in_file=in_file)
                known = None if in_file else token
                stable_diffusion.write_folder(
                    model, tuned, found.embedding, made, token=known, readme=readme, dtype=stored
                )
            commit(made, target, force=force)
        licence, variation = model.base.licence, found.variation
        return Exported(
            path=target, token=token, variation=variation, licence=licence, retained_energy=retained_energy
        )


def _readme(concept: Concept, token: str, base: Base, *, in_file: bool) -> str:
    """Return the README of the folder, a model card of the hub."""
    word = "It is also alone in learned_word.safetensors."
    if in_file:
        word = f"""It is in {token}.safetensors, a textual inversion. Programs with a folder of embeddings know it by
that name once it is there, ComfyUI as `embedding:{token}`."""
    count = len(concept.photos)
    photos, them = ("one photo", "the photo") if count == 1 else (f"{count} photos", "the photos")
    load = f'\n    pipeline.load_textual_inversion("FOLDER/{token}.safetensors", token="{token}")' if in_file else ""
    stated = f"\nlicense: {base.licence.lower()}" if base.licence else ""
    return f"""---
base_model: {base.identity.partition("@")[0] or base.name}
library_name: diffusers
pipeline_tag: text-to-image{stated}
---

# {base.name} that knows one {concept.descriptor}: {token}

Made from {photos} by e4t, on the base {base.name}, whose licence goes on for this folder.

    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained("FOLDER"){load}
    pipeline("{token} on the beach").images[0].save("beach.png")

The word `{token}` has one embedding for all denoising steps (e4t itself predicts it anew at each).
{word}

Whoever has this folder can draw what {them} showed. Share it as you would share {them}, a
person's only with that person's consent, and say of its pictures that they were generated.
"""
