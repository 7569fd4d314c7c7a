"""`pretrain`: trains a new domain on images (section 3.3), so that `personalize` can use it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from e4t_cli.api.options import PretrainKeywords, PretrainOptions, TrainingOptions
from e4t_cli.api.pretraining_setup import (
    CacheChoice,
    NewDomain,
    check_cache,
    check_descriptor,
    check_new_name,
    choose_cache,
    choose_descriptor,
    plan_domain,
    training_data,
)
from e4t_cli.api.resolve import base_name, resolve_base
from e4t_cli.api.session import Session
from e4t_cli.datasets.reader import Preparation
from e4t_cli.datasets.sources import Source, find_source, hold_out
from e4t_cli.images.loading import ImageSource
from e4t_cli.images.preparation import snapshot_downloader
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.prompts import training_templates
from e4t_cli.registry.config import PretrainingConfig, TuningConfig
from e4t_cli.registry.domain import Domain, PreparationTarget, PreparedImage

if TYPE_CHECKING:
    from e4t_cli.models.domain_weights import DomainWeights
    from e4t_cli.pretraining.batches import DistributedContext
    from e4t_cli.pretraining.encoded_images import TrainingData
    from e4t_cli.pretraining.loop import PretrainingStep

    StepCallback = Callable[[PretrainingStep], None]

Data = str | os.PathLike[str] | Iterable[ImageSource | PreparedImage]


class PretrainingRun:
    """One pre-training whose base is loaded; `pretrain` and `plan_pretraining` share it.

    Args:
        session: with the base loaded.
        plan: what is trained.
        source: of the images.
        options: of the run.

    Attributes:
        domain: with its final descriptor.
        source: less the images that were held out.
        preparation: of each image.
        samples: images that the run trains on, repetitions counted.
    """

    def __init__(
        self,
        session: Session,
        plan: NewDomain,
        source: Source,
        options: TrainingOptions,
        processes: DistributedContext,
    ) -> None:
        self.session, self.plan, self.source = session, plan, source
        self.options, self.processes = options, processes
        model, config = session.model, plan.config
        if plan.names_itself:
            word = choose_descriptor(plan.domain.name, model)
            session.report(Progress(stage="load", remark=f"the descriptor is {word!r}"))
        else:
            word = check_descriptor(plan.domain.descriptor, model)
        self.domain = replace(plan.domain, descriptor=word)
        target = PreparationTarget(
            size=model.resolution,
            base=model.base.name,
            mask="auto" if config.mask else None,
            device=str(model.device),
            fetch=snapshot_downloader(session.access),
        )
        log = plan.work / "left-out.tsv" if processes.first else None
        self.preparation = Preparation(self.domain, target, strict=options.strict, log=log)
        self.samples = config.steps * config.batch_size * processes.count

    def choose_cache(self) -> CacheChoice:
        """Return whether the encoded images are kept on the disk."""
        mask, cache = self.plan.config.mask, self.options.cache
        return choose_cache(cache, self.source, self.session.model, self.samples, mask=mask)

    def hold_out(self) -> list[PreparedImage]:
        """Take a few images out of training, for contact sheets."""
        self.source, held_out = hold_out(self.source, self.preparation)
        if not held_out:
            self.session.note("encode", "too few images to hold some out: no contact sheets")
        return held_out

    def train(
        self,
        data: TrainingData,
        *,
        on_step: StepCallback | None,
        steps: int | None = None,
        saved: PretrainOptions | None = None,
        on_progress: ProgressCallback | None = None,
        seed: int = 0,
    ) -> DomainWeights:
        """Run the training loop.

        Args:
            data: of this run's base.
            on_step, on_progress: called in the first process.
            steps: instead of the config's.
            saved: how checkpoints are written and read; None writes none.
        """
        from e4t_cli.pretraining.loop import pretrain_domain

        config = self.plan.config
        every = saved.checkpoint_every if saved is not None else None
        return pretrain_domain(
            self.session.model,
            data,
            name=self.domain.name,
            descriptor=self.domain.descriptor,
            config=config if steps is None else config.replace(steps=steps),
            tuning=self.plan.tuning,
            templates=training_templates(self.domain),
            seed=seed,
            licence=self.domain.licence,
            autocast=self.session.model.device.type == "cuda",
            micro_batch=self.options.micro_batch,
            processes=self.processes,
            checkpoints=self.plan.work if saved is not None else None,
            checkpoint_every=every or 500,
            resume=saved is None or saved.resume,
            force=saved is not None and saved.force,
            stop=saved.stop if saved is not None else None,
            on_progress=on_progress,
            on_step=on_step,
        )

    @contextlib.contextmanager
    def logged(
        self, held_out: list[PreparedImage], options: PretrainOptions
    ) -> Iterator[tuple[ProgressCallback, StepCallback | None]]:
        """Yield `on_progress` and `on_step`, which log the losses and generate contact sheets."""
        from e4t_cli.pretraining.logging import LoggerConfig, TrainingLogger

        report = self.session.report
        if not self.processes.first:
            yield report, None
            return
        config = LoggerConfig(
            folder=self.plan.work / "training",
            sample_every=options.sample_every,
            images=held_out,
            trackers=tuple(options.trackers),
        )
        logger = TrainingLogger(
            config, self.session.model, name=self.domain.name,
            settings=self.plan.config.as_dict(), on_progress=report,
        )  # fmt: skip

        def both(event: Progress) -> None:
            logger.report(event)
            report(event)

        with logger:
            yield both, logger.look

    def keep_logs(self) -> None:
        """Move logs and contact sheets to the domain folder, and remove the checkpoints."""
        work, kept = self.plan.work, self.plan.folder / "training"
        log = work / "left-out.tsv"
        with contextlib.suppress(OSError):  # the domain weights are complete without them
            kept.mkdir(exist_ok=True)
            for path in (log, *(work / "training").glob("*")):
                if path.exists():
                    os.replace(path, kept / path.name)
            if (kept / log.name).exists():
                text = f"the images left out are named in {kept / log.name}"
                self.session.report(Progress(stage="pretrain", remark=text))
        shutil.rmtree(work, ignore_errors=True)


def process_options(options: TrainingOptions, processes: DistributedContext) -> TrainingOptions:
    """Return the options of this process: a launcher assigns each its device, the first reports."""
    return replace(
        options,
        device=options.device if processes.device is None else str(processes.device),
        on_progress=options.on_progress if processes.first else None,
    )


def pretrain(
    name: str | Domain,
    data: Data,
    *,
    config: PretrainingConfig | None = None,
    tuning: TuningConfig | None = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    **options: Unpack[PretrainKeywords],
) -> Path:
    """Pre-train a domain on images (section 3.3), so that `personalize` can use it.

    Args:
        name: of the domain: a new one, or an installed one that lacks weights for this base; or a
            `Domain` with its own preparation and prompt templates.
        data: a folder of images with its sub-folders, tar shards, a dataset (see `find_source`),
            or any iterable of images.
        config, tuning: of the pre-training, and of later personalization; by default the installed
            domain's, for a new one those of domain weights that were made for this base.
        seed: of the initial weights and of all random numbers.
        folder: where the domain weights go; by default among the user domains.
        options: keywords, see `e4t_cli.api.options`: base, device, dtype, offline, accept_license,
            on_progress (`RunOptions`); descriptor, steps, batch_size, base_learning_rate,
            reg_weight, micro_batch, cache, strict (`TrainingOptions`); sample_every, trackers,
            checkpoint_every, resume, force, stop (`PretrainOptions`).

    Returns:
        The folder, which `e4t domains list` shows and `personalize` accepts. Inside, `training/`
        has the losses, their curve, contact sheets, and the names of images that were left out.

    Raises:
        UsageError: the name or the descriptor cannot be used, or there are such weights already.
        InputError: there is no usable image.
        E4TError: another of its children.
    """
    asked = PretrainOptions(**options)
    check_new_name(name)
    check_cache(asked.cache)
    source = find_source(data)
    from e4t_cli.pretraining.batches import init_distributed

    with init_distributed(asked.device) as processes:
        session = Session(process_options(asked, processes))
        base = resolve_base(asked, session.access, safety=False)
        plan = plan_domain(
            name, base_name(base), asked, config=config, tuning=tuning, folder=folder
        )
        with session.running():
            session.load(base, None)
            run = PretrainingRun(session, plan, source, asked, processes)
            held_out = run.hold_out() if asked.sample_every else []
            with (
                training_data(
                    session.model, run.source, run.preparation, run.choose_cache(),
                    processes=processes, on_progress=session.report,
                ) as encoded,
                run.logged(held_out, asked) as (on_progress, on_step),
            ):  # fmt: skip
                trained = run.train(
                    encoded, on_step=on_step, saved=asked, on_progress=on_progress, seed=seed
                )
            if processes.first:
                trained.save(plan.folder)
                run.keep_logs()
    return plan.folder
