"""`pretrain`: trains a new domain on images (section 3.3), so that `personalize` can use it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from e4t_cli.api.options import DomainTrainingOptions, PretrainKeywords, PretrainOptions
from e4t_cli.api.pretraining_setup import (
    FINISHED,
    CacheChoice,
    NewDomain,
    check_cache,
    check_new_name,
    check_place,
    choose_cache,
    discard_work,
    is_earlier,
    plan_domain,
    training_data,
)
from e4t_cli.api.resolve import base_name, resolve_base
from e4t_cli.api.session import Session
from e4t_cli.datasets.held_out import hold_out
from e4t_cli.datasets.reader import ImageReader
from e4t_cli.datasets.sources import ImageSource, find_source
from e4t_cli.files import holds_only, put_in_place, sha256_of, staging_directory, sync_tree, write_atomically
from e4t_cli.hub.paths import HubAccess
from e4t_cli.images.loading import ImageInput
from e4t_cli.images.preparation import snapshot_downloader
from e4t_cli.models.descriptors import check_descriptor, choose_descriptor
from e4t_cli.progress import Progress, StopRequest
from e4t_cli.prompts import training_templates
from e4t_cli.registry.config import PretrainingConfig, TuningConfig
from e4t_cli.registry.domain import Domain, PreparationTarget, PreparedImage
from e4t_cli.registry.manifest import MANIFEST_NAME
from e4t_cli.temporary import remove

if TYPE_CHECKING:
    from e4t_cli.models.domain_weights import DomainWeights
    from e4t_cli.pretraining.batches import DistributedContext
    from e4t_cli.pretraining.encoded_images import TrainingData
    from e4t_cli.pretraining.loop import PretrainingStep, TrainingCallbacks

LEFT_OUT = "left-out.tsv"  # images that were not used, and why
Data = str | os.PathLike[str] | Iterable[ImageInput | PreparedImage]


class PretrainingRun:
    """One pre-training; `pretrain` and `plan_pretraining` share it.

    Args:
        session: with the base loaded.

    Attributes:
        domain: with its final descriptor.
        source: less the images that were held out.
        samples: images that the run trains on, repetitions counted.
    """

    def __init__(
        self, session: Session, plan: NewDomain, source: ImageSource, options: DomainTrainingOptions,
        processes: DistributedContext,
    ) -> None:  # fmt: skip
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
            size=model.resolution, base=model.base.name, mask="auto" if config.mask else None,
            device=str(model.device), fetch=snapshot_downloader(session.access),
        )  # fmt: skip
        log = plan.work / LEFT_OUT if processes.first else None
        self.reader = ImageReader(self.domain, target, strict=options.strict, log=log)
        self.samples = config.steps * config.batch_size * processes.count

    def choose_cache(self) -> CacheChoice:
        """Return whether the encoded images are kept on the disk."""
        cache, mask = self.options.cache, self.plan.config.mask
        return choose_cache(cache, self.source, self.session.model, self.samples, mask=mask)

    def hold_out(self) -> list[PreparedImage]:
        """Take a few images out of training, for contact sheets."""
        self.source, held_out = hold_out(self.source, self.reader)
        if not held_out:
            self.session.note("encode", "too few images to hold some out: no contact sheets")
        return held_out

    def train(
        self, data: TrainingData, *, callbacks: TrainingCallbacks, steps: int | None = None,
        saved: PretrainOptions | None = None, seed: int = 0,
    ) -> DomainWeights:  # fmt: skip
        """Run the training loop, for `steps` instead of the config's; `saved` writes and reads checkpoints."""
        from e4t_cli.pretraining.checkpoints import CheckpointOptions
        from e4t_cli.pretraining.loop import DomainInfo, TrainingOptions, pretrain_domain

        config = self.plan.config
        # None: bfloat16 where the GPU multiplies it. A CPU pre-trains small bases, in float32.
        cuda = self.session.model.device.type == "cuda"
        autocast = self.session.autocast if cuda else False
        checkpoints = CheckpointOptions()
        if saved is not None:
            every = saved.checkpoint_every or checkpoints.every
            checkpoints = CheckpointOptions(
                folder=self.plan.work, every=every, resume=saved.resume, force=saved.resume_changed
            )
        domain = DomainInfo(
            name=self.domain.name, descriptor=self.domain.descriptor, licence=self.domain.licence,
            templates=tuple(training_templates(self.domain)), tuning=self.plan.tuning,
        )  # fmt: skip
        return pretrain_domain(
            self.session.model, data, domain=domain,
            config=config if steps is None else config.replace(steps=steps),
            options=TrainingOptions(seed=seed, autocast=autocast, micro_batch=self.options.micro_batch),
            checkpoints=checkpoints, callbacks=callbacks, processes=self.processes,
        )  # fmt: skip

    @contextlib.contextmanager
    def logged(self, held_out: list[PreparedImage], options: PretrainOptions) -> Iterator[TrainingCallbacks]:
        """Yield callbacks that report progress, log the losses and generate contact sheets."""
        from e4t_cli.pretraining.logging import LoggerConfig, TrainingLogger
        from e4t_cli.pretraining.loop import TrainingCallbacks

        report, stop = self.session.report, options.stop or StopRequest()
        if not self.processes.first:
            yield TrainingCallbacks(stop=stop)
            return
        config = LoggerConfig(
            folder=self.plan.work / "training", sample_every=options.sample_every, images=held_out,
            trackers=tuple(options.trackers), offline=self.session.access.cut_off,
        )  # fmt: skip
        settings = self.plan.config.as_dict()
        logger = TrainingLogger(
            config, self.session.model, name=self.domain.name, settings=settings, on_progress=report
        )

        def resume(step: PretrainingStep) -> None:
            self.reader.resume_log()
            logger.on_resume(step)

        def both(event: Progress) -> None:
            logger.on_progress(event)
            report(event)

        with logger:
            yield TrainingCallbacks(stop=stop, on_progress=both, on_step=logger.on_step, on_resume=resume)

    def finish(self, trained: DomainWeights, *, force: bool) -> None:
        """Put the domain folder, with logs and contact sheets, in its place, and remove the checkpoints."""
        folder, work = self.plan.folder, self.plan.work
        with staging_directory(folder) as staging:
            # Two levels down, where no listing of domain folders looks for manifests.
            made = staging / "domain"
            trained.save(made)
            self._copy_logs(made / "training")
            sync_tree(made)
            check_place(folder, force=force)
            if holds_only(folder, ()):
                folder.rmdir()
            write_atomically(work / FINISHED, sha256_of(made / MANIFEST_NAME).encode())
            put_in_place(made, folder, ours=is_earlier if force else None)
        if os.path.exists(folder / "training" / LEFT_OUT):
            text = f"the images left out are named in {folder / 'training' / LEFT_OUT}"
            self.session.report(Progress(stage="pretrain", remark=text))
        discard_work(folder)

    def _copy_logs(self, kept: Path) -> None:
        work, unfinished = self.plan.work, shutil.ignore_patterns("*~")
        with contextlib.suppress(OSError):  # the domain weights are complete without them
            if os.path.isdir(work / "training"):
                shutil.copytree(work / "training", kept, ignore=unfinished)
        with contextlib.suppress(OSError):
            if os.path.exists(work / LEFT_OUT):
                kept.mkdir(exist_ok=True)
                shutil.copyfile(work / LEFT_OUT, kept / LEFT_OUT)


def process_options(options: DomainTrainingOptions, processes: DistributedContext) -> DomainTrainingOptions:
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
            reg_weight, micro_batch, cache, strict, force (`DomainTrainingOptions`); sample_every,
            trackers, checkpoint_every, resume, resume_changed, stop (`PretrainOptions`).

    Returns:
        The folder, which `e4t domains list` shows and `personalize` accepts. Inside, `training/`
        has the losses, contact sheets, and the names of images that were left out.

    Raises:
        UsageError: the name or the descriptor cannot be used, there are such weights already, or another process is
            pre-training the domain.
        InputError: there is no usable image.
        E4TError: another of its children.
    """
    asked = PretrainOptions(**options)
    check_new_name(name)
    check_cache(asked.cache)
    cut_off = HubAccess(offline=asked.offline).cut_off
    source = find_source(data, offline=cut_off)
    from e4t_cli.pretraining.batches import init_distributed
    from e4t_cli.pretraining.lock import locked
    from e4t_cli.pretraining.logging import check_trackers

    check_trackers(asked.trackers, offline=cut_off)

    with init_distributed(asked.device) as processes:
        session = Session(process_options(asked, processes))
        base = resolve_base(asked, session.access, safety=False)
        plan = plan_domain(name, base_name(base), asked, config=config, tuning=tuning, folder=folder)
        alone = locked(plan.work, plan.domain.name) if processes.first else contextlib.nullcontext()
        with session.running(), alone:
            check_place(plan.folder, force=asked.force)  # a run that held the lock until now may have filled it
            if not (asked.resume and any(plan.work.glob("step-*.safetensors"))):
                remove(plan.work / LEFT_OUT)  # of a run that was given up
            session.load(base, None)
            run = PretrainingRun(session, plan, source, asked, processes)
            held_out = run.hold_out() if asked.sample_every else []
            with (
                training_data(
                    session.model, run.source, run.reader, run.choose_cache(),
                    processes=processes, on_progress=session.report,
                ) as encoded,
                run.logged(held_out, asked) as callbacks,
            ):  # fmt: skip
                trained = run.train(encoded, callbacks=callbacks, saved=asked, seed=seed)
            if processes.first:
                run.finish(trained, force=asked.force)
    return plan.folder
