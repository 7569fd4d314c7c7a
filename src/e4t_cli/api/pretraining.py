"""One pre-training whose base is loaded: what `pretrain` and its rehearsal have in common.

`pretrain`: pictures in, a domain of your own out.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e4t_cli.api.pretraining_setup import (
    NewDomain,
    check_cache,
    check_new_name,
    choose_cache,
    plan_domain,
    training_data,
)
from e4t_cli.api.resolve import base_name, resolve_base
from e4t_cli.api.session import Session
from e4t_cli.datasets.reader import ImageReader
from e4t_cli.datasets.sources import ImageSource, find_source, hold_out
from e4t_cli.hub.paths import AskLicence, HubAccess
from e4t_cli.images.preparation import snapshot_downloader
from e4t_cli.progress import Progress, ProgressCallback, StopRequest
from e4t_cli.prompts import training_templates
from e4t_cli.registry.config import PretrainingConfig, TuningConfig
from e4t_cli.registry.domain import Domain, PreparationTarget, PreparedImage

if TYPE_CHECKING:
    from e4t_cli.models.text_to_image import TextToImageModel
    from e4t_cli.pretraining.batches import DistributedContext
    from e4t_cli.pretraining.loop import DomainInfo, TrainingCallbacks, TrainingOptions


@dataclass
class PretrainingRun:
    """One pre-training whose base is loaded: its word, its preparation, what is written down.

    Args:
        source: of the pictures; less those that were held out.
        strict: whether a picture that cannot be used stops the run.
    """

    session: Session
    plan: NewDomain
    source: ImageSource
    access: HubAccess
    processes: DistributedContext
    strict: bool = False

    def __post_init__(self) -> None:
        from e4t_cli.api.pretraining_setup import check_descriptor, choose_descriptor

        model, domain = self.session.model, self.plan.domain
        if self.plan.names_itself:
            word = choose_descriptor(domain.name, model)
            self.session.report(Progress(stage="load", remark=f"the descriptor is {word!r}"))
        else:
            word = check_descriptor(domain.descriptor, model)
        self.domain = replace(domain, descriptor=word)
        target = PreparationTarget(
            size=model.resolution,
            base=model.base.name,
            mask="auto" if self.plan.config.mask else None,
            device=str(model.device),
            fetch=snapshot_downloader(self.access),
        )
        log = self.plan.work / "left-out.tsv" if self.processes.first else None
        self.reader = ImageReader(self.domain, target, strict=self.strict, log=log)

    def hold_out(self) -> list[PreparedImage]:
        """Take a few pictures out of training, for contact sheets."""
        self.source, held_out = hold_out(self.source, self.reader)
        if not held_out:
            self.session.note("encode", "too few pictures to hold some out: no contact sheets")
        return held_out

    def info(self) -> DomainInfo:
        """Return what the domain weights will contain beside parameters."""
        from e4t_cli.pretraining.loop import DomainInfo

        return DomainInfo(
            name=self.domain.name,
            descriptor=self.domain.descriptor,
            templates=tuple(training_templates(self.domain)),
            tuning=self.plan.tuning,
            licence=self.domain.licence,
        )

    def options(self, *, seed: int = 0, micro_batch: int | None = None) -> TrainingOptions:
        """Return how training computes on this run's device."""
        from e4t_cli.pretraining.loop import TrainingOptions

        # None: where the GPU multiplies bfloat16. A CPU pre-trains small bases, in float32.
        cuda = self.session.model.device.type == "cuda"
        autocast = self.session.autocast if cuda else False
        return TrainingOptions(seed=seed, autocast=autocast, micro_batch=micro_batch)

    @contextlib.contextmanager
    def callbacks(
        self,
        held_out: list[PreparedImage],
        sample_every: int,
        trackers: Sequence[Any],
        stop: StopRequest | None,
    ) -> Iterator[TrainingCallbacks]:
        """Yield callbacks that report progress, and record losses and contact sheets."""
        from e4t_cli.pretraining.logging import LoggerConfig, TrainingLogger
        from e4t_cli.pretraining.loop import TrainingCallbacks

        report, stop = self.session.report, stop or StopRequest()
        if not self.processes.first:
            yield TrainingCallbacks(stop=stop)
            return
        config = LoggerConfig(
            folder=self.plan.work / "training",
            sample_every=sample_every,
            images=held_out,
            trackers=tuple(trackers),
            offline=self.access.cut_off,
        )
        logger = TrainingLogger(
            config, self.session.model, name=self.domain.name,
            settings=self.plan.config.as_dict(), on_progress=report,
        )  # fmt: skip

        def both(event: Progress) -> None:
            logger.on_progress(event)
            report(event)

        with logger:
            yield TrainingCallbacks(stop=stop, on_progress=both, on_step=logger.on_step)

    def keep_record(self) -> None:
        """Move the run's log and sheets to the domain's folder, and remove the checkpoints."""
        work, record = self.plan.work, self.plan.folder / "training"
        log = work / "left-out.tsv"
        with contextlib.suppress(OSError):  # the pack is whole; the rest is worth no error
            record.mkdir(exist_ok=True)
            for path in (log, *(work / "training").glob("*")):
                if path.exists():
                    os.replace(path, record / path.name)
            if (record / log.name).exists():
                sentence = f"the images left out are named in {record / log.name}"
                self.session.report(Progress(stage="pretrain", remark=sentence))
        shutil.rmtree(work, ignore_errors=True)


def own_device(device: str, processes: DistributedContext) -> str:
    """Return the device of this process: a launcher gives each of them another one."""
    return device if processes.device is None else str(processes.device)


Data = str | os.PathLike[str] | Iterable[ImageSource | PreparedImage]


def pretrain(
    name: str | Domain,
    data: Data,
    *,
    descriptor: str | None = None,
    base: str | os.PathLike[str] | TextToImageModel = "auto",
    config: PretrainingConfig | None = None,
    tuning: TuningConfig | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    base_learning_rate: float | None = None,
    reg_weight: float | None = None,
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
        trackers: names that accelerate knows, such as "tensorboard"; offline that, or "wandb".
        checkpoint_every: steps between two checkpoints.
        resume: go on from the last checkpoint of an interrupted run that was called alike.
        force: go on also if settings differ.
        folder: where the pack goes; by default among the user's own domains.
        offline, accept_license: as in `personalize`.
        stop: asks the run to save itself and to end in KeyboardInterrupt.

    Returns:
        The folder, which `e4t domains list` shows and `personalize` accepts. Inside, `training/`
        has the losses, the sheets, and the names of images that were left out.

    Raises:
        UsageError: the name or the word cannot be used, or there is such a pack already.
        InputError: there is no usable picture.
        E4TError: another of its children.
    """
    check_new_name(name)
    check_cache(cache)
    cut_off = HubAccess(offline=offline).cut_off
    source = find_source(data, offline=cut_off)
    from e4t_cli.pretraining.batches import init_distributed
    from e4t_cli.pretraining.checkpoints import CheckpointOptions
    from e4t_cli.pretraining.logging import check_trackers
    from e4t_cli.pretraining.loop import pretrain_domain

    check_trackers(trackers, offline=cut_off)
    checkpoint_options = {"every": checkpoint_every} if checkpoint_every else {}
    with init_distributed(device) as processes:
        listener = on_progress if processes.first else None
        session = Session(own_device(device, processes), dtype, listener)
        access = HubAccess(
            offline=offline, accept_license=accept_license, on_progress=session.report
        )
        place = resolve_base(base, access, device=device, dtype=dtype, safety=False)
        plan = plan_domain(
            name, base_name(place), descriptor=descriptor, config=config, tuning=tuning,
            folder=folder, steps=steps, batch_size=batch_size,
            base_learning_rate=base_learning_rate, reg_weight=reg_weight,
        )  # fmt: skip
        with session.running():
            session.load(place, None)
            run = PretrainingRun(session, plan, source, access, processes, strict=strict)
            held_out = run.hold_out() if sample_every else []
            samples = plan.config.steps * plan.config.batch_size * processes.count
            choice = choose_cache(cache, run.source, session.model, samples, mask=plan.config.mask)
            with (
                training_data(
                    session.model, run.source, run.reader, choice,
                    processes=processes, on_progress=session.report,
                ) as encoded,
                run.callbacks(held_out, sample_every, trackers, stop) as callbacks,
            ):  # fmt: skip
                pack = pretrain_domain(
                    session.model,
                    encoded,
                    domain=run.info(),
                    config=plan.config,
                    options=run.options(seed=seed, micro_batch=micro_batch),
                    checkpoints=CheckpointOptions(
                        folder=plan.work, resume=resume, force=force, **checkpoint_options
                    ),
                    callbacks=callbacks,
                    processes=processes,
                )
            if processes.first:
                pack.save(plan.folder)
                run.keep_record()
    return plan.folder
