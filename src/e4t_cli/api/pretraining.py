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
from e4t_cli.datasets.reader import Preparation
from e4t_cli.datasets.sources import Source, find_source, hold_out
from e4t_cli.hub.paths import AskLicence, HubAccess
from e4t_cli.images.loading import Picture
from e4t_cli.images.preparation import fetcher
from e4t_cli.progress import Progress, ProgressCallback, StopRequest
from e4t_cli.prompts import training_templates
from e4t_cli.registry.config import PretrainingConfig, TuningConfig
from e4t_cli.registry.domain import Domain, PreparationTarget, PreparedImage

if TYPE_CHECKING:
    from e4t_cli.models.text_to_image import TextToImageModel
    from e4t_cli.pretraining.batches import DistributedContext


@dataclass
class PretrainingRun:
    """One pre-training whose base is loaded: its word, its preparation, what is written down.

    Args:
        source: of the pictures; less those that were held out.
        strict: whether a picture that cannot be used stops the run.
    """

    session: Session
    plan: NewDomain
    source: Source
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
            fetch=fetcher(self.access),
        )
        log = self.plan.work / "left-out.tsv" if self.processes.first else None
        self.preparation = Preparation(self.domain, target, strict=self.strict, log=log)

    def hold_out(self) -> list[PreparedImage]:
        """Take a few pictures out of training, for contact sheets."""
        self.source, held_out = hold_out(self.source, self.preparation)
        if not held_out:
            self.session.note("encode", "too few pictures to hold some out: no contact sheets")
        return held_out

    def settings(self) -> dict[str, Any]:
        """Return what `pretrain_domain` is told in any case."""
        cuda = self.session.model.device.type == "cuda"
        return {
            "name": self.domain.name,
            "descriptor": self.domain.descriptor,
            "config": self.plan.config,
            "tuning": self.plan.tuning,
            "templates": training_templates(self.domain),
            # None: where the GPU multiplies bfloat16; a CPU pre-trains small bases, in float32.
            "autocast": self.session.autocast if cuda else False,
        }

    @contextlib.contextmanager
    def watched(
        self, held_out: list[PreparedImage], sample_every: int, trackers: Sequence[Any]
    ) -> Iterator[dict[str, Any]]:
        """Hand out the callbacks that write down the losses and draw on the way."""
        from e4t_cli.pretraining.logging import LoggerConfig, TrainingLogger

        report = self.session.report
        if not self.processes.first:
            yield {"on_progress": report}
            return
        watching = LoggerConfig(
            folder=self.plan.work / "training",
            sample_every=sample_every,
            images=held_out,
            trackers=tuple(trackers),
        )
        watch = TrainingLogger(
            watching, self.session.model, name=self.domain.name,
            settings=self.plan.config.as_dict(), on_progress=report,
        )  # fmt: skip

        def both(event: Progress) -> None:
            watch.report(event)
            report(event)

        with watch:
            yield {"on_progress": both, "on_step": watch.look}

    def keep_story(self) -> None:
        """Move what tells of the run to the pack; the checkpoints led to it and go."""
        work, story = self.plan.work, self.plan.folder / "training"
        log = work / "left-out.tsv"
        with contextlib.suppress(OSError):  # the pack is whole; the rest is worth no error
            story.mkdir(exist_ok=True)
            for path in (log, *(work / "training").glob("*")):
                if path.exists():
                    os.replace(path, story / path.name)
            if (story / log.name).exists():
                sentence = f"the pictures left out are named in {story / log.name}"
                self.session.report(Progress(stage="pretrain", remark=sentence))
        shutil.rmtree(work, ignore_errors=True)


def own_device(device: str, processes: DistributedContext) -> str:
    """Return the device of this process: a launcher gives each of them another one."""
    return device if processes.device is None else str(processes.device)


Data = str | os.PathLike[str] | Iterable[Picture | PreparedImage]


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
    from e4t_cli.pretraining.batches import init_distributed
    from e4t_cli.pretraining.loop import pretrain_domain

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
