"""Exports a concept as plain Stable Diffusion weights for other programs.

The result is a folder in diffusers' layout, a single file (Stable Diffusion 1.x), or a LoRA; the
word's embedding lies beside a file.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from e4t_cli.api.options import RunKeywords, RunOptions
from e4t_cli.api.resolve import load_concept, load_concept_models
from e4t_cli.api.session import Session
from e4t_cli.errors import UsageError, printable
from e4t_cli.files import check_absent, holds_only, put_in_place, staging_directory, write_atomically, writing
from e4t_cli.hub.bases import Base
from e4t_cli.prompts import check_placeholder
from e4t_cli.temporary import leftovers

if TYPE_CHECKING:
    from e4t_cli.formats.concept import Concept


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A concept in a format of other programs."""

    path: Path  # a folder in diffusers' layout, or a single file
    token: str  # what prompts call the concept there; beside a file, the stem of the word's file
    variation: float  # share of the word that depends on the noise level, which is left out
    licence: str  # of the base; "" if its files do not state one
    retained_energy: float = 1.0  # share of what tuning changed that is in it: 1 but for a LoRA


def export(
    concept: Concept | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    lora: int | None = None,
    placeholder: str | None = None,
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
    if lora is not None and not alone:
        raise UsageError("a LoRA is one file", hint=f"call it {printable(target.name)}.safetensors")
    check_free(target, force=force)
    if placeholder is not None:
        check_placeholder(placeholder)
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
        elif alone:
            stable_diffusion.check_single_file(model)
        else:
            stable_diffusion.check_token(model, token)
        tuned = opened.tuned(model, pretrained) or session.tune(opened, keep_base=lora is not None)
        with session.stage("export", counted=lora is not None), staging_directory(target) as staging:
            import torch

            found = textual_inversion.mean_concept_embedding(model, tuned, opened.prepared, seed=opened.seed)
            stored, made = torch.float32 if asked.dtype == "fp32" else torch.float16, staging / target.name
            retained_energy = 1.0
            if alone:
                token = textual_inversion.embedding_path(target).stem
            if lora is not None:
                retained_energy = lora_file.write_lora(
                    model, tuned, found.embedding, made, rank=lora, dtype=stored, on_progress=session.report
                )
            elif alone:
                stable_diffusion.write_single_file(model, tuned, found.embedding, made, dtype=stored)
            else:
                readme = _readme(opened, token, model.base)
                stable_diffusion.write_folder(
                    model, tuned, found.embedding, made, token=token, readme=readme, dtype=stored
                )
            commit(made, target, force=force)
        licence, variation = model.base.licence, found.variation
        return Exported(
            path=target, token=token, variation=variation, licence=licence, retained_energy=retained_energy
        )


FOLDER = {
    *("model_index.json", "README.md", "learned_word.safetensors", "unet", "vae", "text_encoder", "tokenizer"),
    *("scheduler", "safety_checker", "feature_extractor"),
}


def is_export(path: Path) -> bool:
    """Whether an export wrote a file, or a folder and everything in it."""
    if os.path.isdir(path):
        files = ("model_index.json", "learned_word.safetensors")
        return holds_only(path, FOLDER) and all(os.path.isfile(path / name) for name in files)
    from safetensors import SafetensorError, safe_open

    from e4t_cli.formats.textual_inversion import WRITER

    try:
        with safe_open(path, framework="numpy") as file:
            return WRITER in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _outputs(target: Path) -> list[Path]:
    """Return what an export writes: a folder, or the file of the word and then the one that needs it."""
    from e4t_cli.formats.textual_inversion import embedding_path

    return [embedding_path(target), target] if target.suffix == ".safetensors" else [target]


def check_free(target: Path, *, force: bool) -> None:
    """Raise UsageError if what an export writes exists, or with `force`, if no export wrote it."""
    outputs = _outputs(target)
    # A run that was killed between its two files: the word is in its temporary folder, too.
    for left in leftovers(target.parent, target.name):
        copy = left / outputs[0].name
        with contextlib.suppress(OSError):
            if not os.path.lexists(target) and copy.read_bytes() == outputs[0].read_bytes():
                outputs[0].unlink()
    for path in outputs:
        check_absent(path, ours=is_export if force else None)


def commit(made: Path, target: Path, *, force: bool) -> None:
    """Give everything in the temporary folder its final name."""
    check_free(target, force=force)
    *word, last = _outputs(target)
    for path in word:
        copy = made.with_name(path.name).read_bytes()  # the file stays, see `check_free`
        with writing(path):
            write_atomically(path, copy, overwrite=force)
    try:
        put_in_place(made, last, ours=is_export if force else None)
    except BaseException:
        for path in word if not force else ():
            path.unlink(missing_ok=True)
        raise


def _readme(concept: Concept, token: str, base: Base) -> str:
    """Return the README of the folder, a model card of the hub."""
    stated = f"\nlicense: {base.licence.lower()}" if base.licence else ""
    return f"""---
base_model: {base.identity.partition("@")[0] or base.name}
library_name: diffusers
pipeline_tag: text-to-image{stated}
---

# {base.name} that knows one {concept.descriptor}: {token}

Made from one photo by e4t, on the base {base.name}, whose licence goes on for this folder.

    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained("FOLDER")
    pipeline("{token} on the beach").images[0].save("beach.png")

The word `{token}` has one embedding for all denoising steps (e4t itself predicts it anew at each).
It is also alone in learned_word.safetensors.

Whoever has this folder can draw what the photo showed. Share it as you would share the photo, a
person's only with that person's consent, and say of its pictures that they were generated.
"""
