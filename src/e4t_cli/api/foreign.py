"""A folder of e4t-diffusion made a domain of the user's."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from e4t_cli.bases import read_base
from e4t_cli.domain import Domain
from e4t_cli.e4t_diffusion import Checkpoint, Wish, convert, read_checkpoint
from e4t_cli.e4t_diffusion.towers import tower_sizes
from e4t_cli.errors import UsageError, printable
from e4t_cli.hub.addresses import address_of
from e4t_cli.names import check_name
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.prompts import training_templates
from e4t_cli.recipes import PretrainingRecipe, TuningRecipe
from e4t_cli.registry import installed_domains, user_domains_folder

_GONE = {
    "runwayml/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-2-1-base": "sd21-base",
    "stabilityai/stable-diffusion-2-1": "sd21",
}
"""Repositories that checkpoints name and that exist no more -> the mirror's name here."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A checkpoint that is now a domain's pack.

    Args:
        name: of the domain.
        base: that it is for.
        folder: of the pack.
        checkpoint: what was read.
        summary: what the conversion found, one sentence.
    """

    name: str
    base: str
    folder: Path
    checkpoint: Checkpoint
    summary: str


def import_checkpoint(
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    base: str | os.PathLike[str] | None = None,
    licence: str = "",
    normalised_patches: bool = False,
    keep_unet: bool = False,
    on_progress: ProgressCallback | None = None,
) -> Imported:
    """Convert a checkpoint folder of e4t-diffusion into a domain of the user's.

    Args:
        folder: with config.json, encoder.pt, and weight_offsets.pt or, tuned, unet.pt.
        name: of the domain; by default the installed one with its descriptor, or the descriptor.
        base: the model it was trained on, as `--base` takes it; by default what it says itself.
        licence: of the weights, for the pack's card.
        normalised_patches: see `PatchTower`; for an open_clip from 2024 on.
        keep_unet: keep the merged weights of a tuned U-Net beside the pack, for a concept.
        on_progress: called as it goes.

    Raises:
        UsageError: no such folder, a name that cannot be used, or a base that nobody knows.
        IntegrityError: it is no such checkpoint, or hostile.
        ResourceError: the disk has no room.
    """
    checkpoint = read_checkpoint(Path(folder))
    alike = _domain_alike(checkpoint, name)
    chosen = name or (alike.name if alike else _slug(checkpoint.descriptor))
    try:
        check_name(chosen)
    except ValueError as error:
        raise UsageError(str(error), hint="choose one with --name") from error
    target = user_domains_folder() / chosen
    if target.exists():
        raise UsageError(
            f"there is a domain in {printable(str(target))} already",
            hint="choose another name with --name",
        )
    wish = replace(
        wish_for(checkpoint, alike, chosen, _base_name(checkpoint, base), normalised_patches),
        licence=licence or "as the checkpoint's, which does not state one",
        keep_unet=keep_unet,
    )
    if on_progress and checkpoint.tuned and not keep_unet:
        note = "this checkpoint was tuned on one picture: it knows one subject better than others"
        on_progress(Progress(stage="convert", note=note))
    report = convert(wish, target, on_progress)
    return Imported(
        name=chosen,
        base=wish.base,
        folder=target,
        checkpoint=checkpoint,
        summary=report.sentence(),
    )


def wish_for(
    checkpoint: Checkpoint,
    domain: Domain | None,
    name: str,
    base: str,
    normalised_patches: bool = False,
) -> Wish:
    # The paper's numbers for cats, its unmasked domain of things (section 3.5).
    usual = TuningRecipe(steps=5, base_learning_rate=3e-6, embedding_penalty=1e-4)
    pretraining = domain.pretraining if domain else None
    plain = Domain(name="x", descriptor=checkpoint.descriptor, tuning=usual)
    return Wish(
        folder=str(checkpoint.folder.resolve()),
        weights=checkpoint.weights,
        tower=tower_sizes(checkpoint.tower, normalised_patches=normalised_patches),
        name=name,
        descriptor=checkpoint.descriptor,
        base=base,
        tuning=domain.tuning if domain else usual,
        pretraining=(pretraining or PretrainingRecipe(steps=60_000)).replace(
            embedding_scale=checkpoint.scale
        ),
        templates=tuple(training_templates(domain or plain)),
        image_tower=f"its own: {checkpoint.tower}, trained further",
    )


def _domain_alike(checkpoint: Checkpoint, name: str | None) -> Domain | None:
    """Return the installed domain whose recipes suit: of that name, or of that descriptor."""
    known = [one.domain for one in installed_domains() if one.domain is not None]
    named = [one for one in known if one.name == name]
    described = [one for one in known if one.descriptor == checkpoint.descriptor]
    return next(iter(named + described), None)


def base_of(checkpoint: Checkpoint) -> str:
    """Return the base it was trained on, under a name that still leads somewhere."""
    return _GONE.get(checkpoint.base, checkpoint.base)


def _base_name(checkpoint: Checkpoint, base: str | os.PathLike[str] | None) -> str:
    wanted = os.fspath(base) if base is not None else base_of(checkpoint)
    if Path(wanted).is_dir():
        return read_base(Path(wanted)).name
    address = address_of(wanted)
    if address is not None:
        return address.name
    if base is not None:
        try:
            return check_name(wanted, "base")
        except ValueError as error:
            raise UsageError(str(error)) from error
    raise UsageError(
        f"the checkpoint was trained on {printable(checkpoint.base)!r}, which means nothing here",
        hint="say which base that is: --base sd14, or --base FOLDER",
    )


def _slug(word: str) -> str:
    return re.sub(r"[^a-z0-9_-]+", "-", word.lower()).strip("-_")[:64]
