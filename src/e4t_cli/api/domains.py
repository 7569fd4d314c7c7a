"""`pretrain`: pictures in, a domain of your own out."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from e4t_cli.api.choices import base_name, choose_base, with_steps
from e4t_cli.domain import (
    Domain,
    PreparationTarget,
    PreparedImage,
    PretrainingRecipe,
    TuningRecipe,
    check_name,
)
from e4t_cli.errors import E4TError, UsageError, WeightsUnavailable, printable
from e4t_cli.photos import Picture, list_pictures, prepared_pictures
from e4t_cli.progress import ProgressCallback
from e4t_cli.prompts import training_templates
from e4t_cli.registry import installed_domains, user_domain, user_domains_folder, weights_folder
from e4t_cli.session import Session

if TYPE_CHECKING:
    from e4t_cli.base_model import TextToImageModel


def pretrain(
    name: str | Domain,
    data: str | os.PathLike[str] | Iterable[Picture | PreparedImage],
    *,
    descriptor: str | None = None,
    base: str | os.PathLike[str] | TextToImageModel = "auto",
    recipe: PretrainingRecipe | None = None,
    tuning: TuningRecipe | None = None,
    steps: int | None = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    on_progress: ProgressCallback | None = None,
) -> Path:
    """Pre-train a domain on pictures (section 3.3), so that `personalize` can use it.

    Args:
        name: of the domain: a new one, or an installed one that lacks weights for this base; or a
            `Domain` with a preparation and sentences of its own.
        data: a folder of pictures (sub-folders count), or any iterable of pictures.
        descriptor: the everyday word for such things; the installed domain's, or the name.
        base: as in `personalize`.
        recipe, tuning: the numbers of training and those that the pack will carry; by default
            the installed domain's, for a new one those of a pack that was made for this base.
        steps: instead of the recipe's.
        seed: of the first weights and of every draw.
        folder: where the pack goes; by default among the user's own domains.

    An interrupted run goes on from its last checkpoint when it is called again alike.

    Returns:
        The folder, which `e4t domains list` shows and `personalize` accepts.

    Raises:
        UsageError: the name or the word cannot be used, or there is such a pack already.
        InputError: there is no usable picture.
        E4TError: another of its children.
    """
    if isinstance(name, str):
        _check_name(name)
    pictures = list_pictures(data)
    place = choose_base(base)
    domain = _domain_to_pretrain(name, descriptor, base_name(place))
    target = Path(folder) if folder is not None else user_domains_folder() / domain.name
    if (target / "domain.toml").exists():
        raise UsageError(
            f"there is a domain in {printable(str(target))} already",
            hint="choose another name, or move that folder away",
        )
    recipe = recipe or domain.pretraining or PretrainingRecipe(steps=60_000)
    if steps is not None:
        recipe = with_steps(recipe, steps)
    checkpoints = target.with_name(f".{target.name}.checkpoints")
    session = Session(device, dtype, on_progress)
    with session.running():
        session.load(place, None)
        from e4t_cli.pretraining import encode_images, pretrain_domain

        model = session.model
        model.descriptor_id(domain.descriptor)  # a word it does not know stops us here
        encoded = encode_images(
            model,
            prepared_pictures(
                domain,
                pictures,
                PreparationTarget(size=model.resolution, base=model.base.name),
                session.report,
            ),
            total=len(pictures) if isinstance(pictures, Sequence) else 0,
            on_progress=session.report,
        )
        pack = pretrain_domain(
            model,
            encoded,
            name=domain.name,
            descriptor=domain.descriptor,
            recipe=recipe,
            tuning=tuning or domain.tuning,
            templates=training_templates(domain),
            seed=seed,
            licence=domain.licence,
            autocast=model.device.type == "cuda",
            checkpoints=checkpoints,
            on_progress=session.report,
        )
        pack.save(target)
    shutil.rmtree(checkpoints, ignore_errors=True)  # what it led to is safe
    return target


def _domain_to_pretrain(name: str | Domain, descriptor: str | None, base: str) -> Domain:
    """Return the value, the installed domain of that name, or a new plain one."""
    if isinstance(name, Domain):
        return replace(name, descriptor=descriptor) if descriptor else name
    installed = installed_domains()
    for listing in installed:
        if listing.name == name and listing.domain is not None:
            found = listing.domain
            with contextlib.suppress(WeightsUnavailable):
                weights_folder(found, base)
                raise UsageError(
                    f"the domain {name!r} has weights for {base} already",
                    hint="choose another name with --domain",
                )
            return replace(found, descriptor=descriptor) if descriptor else found
    known = [one.domain for one in installed if one.domain is not None]
    tuning, pretraining = _known_recipes(known, base)
    return Domain(name=name, descriptor=descriptor or name, tuning=tuning, pretraining=pretraining)


def _check_name(name: str) -> None:
    try:
        check_name(name)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _known_recipes(known: list[Domain], base: str) -> tuple[TuningRecipe, PretrainingRecipe]:
    """Return the numbers that a new domain begins with on a base.

    The paper's rates belong to Stable Diffusion; a pack that was made for this very base knows
    better ones. Of several, one without a mask and with the usual sentences is the nearest.
    """
    for domain in sorted(known, key=lambda one: bool(one.prompt_templates)):
        with contextlib.suppress(E4TError):
            pack = user_domain(weights_folder(domain, base))
            if pack.pretraining is not None and not pack.tuning.mask:
                return pack.tuning, pack.pretraining.replace(mask=False)
    # The paper's numbers for cats, its unmasked domain of things (section 3.5).
    tuning = TuningRecipe(steps=5, base_learning_rate=3e-6, embedding_penalty=1e-4)
    return tuning, PretrainingRecipe(steps=60_000)
