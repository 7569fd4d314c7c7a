"""`pretrain`: pictures in, a domain of your own out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e4t_cli.api.choices import base_name, choose_base
from e4t_cli.api.new_domains import check_new_name, plan_domain
from e4t_cli.api.pretraining_run import PretrainingRun, own_device
from e4t_cli.api.training_data import check_cache, choose_cache, training_data
from e4t_cli.domain import Domain, PreparedImage
from e4t_cli.hub.access import Access, AskLicence
from e4t_cli.photos import Picture
from e4t_cli.progress import ProgressCallback
from e4t_cli.recipes import PretrainingRecipe, TuningRecipe
from e4t_cli.session import Session
from e4t_cli.sources import find_source
from e4t_cli.stopping import StopRequest

if TYPE_CHECKING:
    from e4t_cli.base_model import TextToImageModel

Data = str | os.PathLike[str] | Iterable[Picture | PreparedImage]


def pretrain(
    name: str | Domain,
    data: Data,
    *,
    descriptor: str | None = None,
    base: str | os.PathLike[str] | TextToImageModel = "auto",
    recipe: PretrainingRecipe | None = None,
    tuning: TuningRecipe | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    base_learning_rate: float | None = None,
    embedding_penalty: float | None = None,
    micro_batch: int | None = None,
    seed: int = 0,
    cache: str = "auto",
    strict: bool = False,
    sample_every: int = 0,
    trackers: Sequence[Any] = (),
    checkpoint_every: int | None = None,
    resume: bool = True,
    force: bool = False,
    folder: str | os.PathLike[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    offline: bool = False,
    accept_license: bool | AskLicence = False,
    stop: StopRequest | None = None,
    on_progress: ProgressCallback | None = None,
) -> Path:
    """Pre-train a domain on pictures (section 3.3), so that `personalize` can use it.

    Args:
        name: of the domain: a new one, or an installed one that lacks weights for this base; or a
            `Domain` with a preparation and sentences of its own.
        data: a folder of pictures (sub-folders count), tar shards, a dataset (see `find_source`),
            or any iterable of pictures.
        descriptor: the everyday word for such things; the installed domain's, or the longest word
            of a new name that is one token of the base.
        base: as in `personalize`.
        recipe, tuning: the numbers of training and those that the pack will carry; by default
            the installed domain's, for a new one those of a pack that was made for this base.
        steps, batch_size, base_learning_rate, embedding_penalty: instead of the recipe's.
        micro_batch: samples that are in memory at once; None is the whole batch.
        seed: of the first weights and of every draw.
        cache: "on" looks at each picture once and keeps what it saw in the user's cache, "off"
            looks anew each time; "auto" is on from the second pass over the pictures on.
        strict: stop at the first picture that cannot be used; otherwise they are left out,
            counted and named in a log.
        sample_every: steps between two contact sheets of a few held-out pictures; 0: none.
        trackers: names that accelerate knows, such as "tensorboard".
        checkpoint_every: steps between two checkpoints.
        resume: go on from the last checkpoint of an interrupted run that was called alike.
        force: go on also if settings differ.
        folder: where the pack goes; by default among the user's own domains.
        offline, accept_license: as in `personalize`.
        stop: asks the run to save itself and to end in KeyboardInterrupt.

    Returns:
        The folder, which `e4t domains list` shows and `personalize` accepts. Inside, `training/`
        has the losses, their curve, the sheets, and the names of pictures that were left out.

    Raises:
        UsageError: the name or the word cannot be used, or there is such a pack already.
        InputError: there is no usable picture.
        E4TError: another of its children.
    """
    check_new_name(name)
    check_cache(cache)
    source = find_source(data)
    from e4t_cli.pretraining import join_processes, pretrain_domain

    with join_processes(device) as processes:
        listener = on_progress if processes.first else None
        session = Session(own_device(device, processes), dtype, listener)
        access = Access(offline=offline, accept_license=accept_license, on_progress=session.report)
        place = choose_base(base, access, device=device, dtype=dtype, safety=False)
        plan = plan_domain(
            name, base_name(place), descriptor=descriptor, recipe=recipe, tuning=tuning,
            folder=folder, steps=steps, batch_size=batch_size,
            base_learning_rate=base_learning_rate, embedding_penalty=embedding_penalty,
        )  # fmt: skip
        with session.running():
            session.load(place, None)
            run = PretrainingRun(session, plan, source, access, processes, strict=strict)
            held_out = run.hold_out() if sample_every else []
            samples = plan.recipe.steps * plan.recipe.batch_size * processes.count
            choice = choose_cache(cache, run.source, session.model, samples, mask=plan.recipe.mask)
            with (
                training_data(
                    session.model, run.source, run.preparation, choice,
                    processes=processes, on_progress=session.report,
                ) as encoded,
                run.watched(held_out, sample_every, trackers) as callbacks,
            ):  # fmt: skip
                pack = pretrain_domain(
                    session.model,
                    encoded,
                    seed=seed,
                    licence=run.domain.licence,
                    micro_batch=micro_batch,
                    processes=processes,
                    checkpoints=plan.work,
                    resume=resume,
                    force=force,
                    stop=stop,
                    **run.settings(),
                    **callbacks,
                    **({"checkpoint_every": checkpoint_every} if checkpoint_every else {}),
                )
            if processes.first:
                pack.save(plan.folder)
                run.keep_story()
    return plan.folder
