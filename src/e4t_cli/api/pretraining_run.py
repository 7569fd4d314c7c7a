"""One pre-training whose base is loaded: what `pretrain` and its rehearsal have in common."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from e4t_cli.api.new_domains import NewDomain
from e4t_cli.domain import PreparationTarget, PreparedImage
from e4t_cli.hub.access import Access
from e4t_cli.progress import Progress
from e4t_cli.prompts import training_templates
from e4t_cli.segmenters import fetcher
from e4t_cli.session import Session
from e4t_cli.sources import Preparation, Source, hold_out

if TYPE_CHECKING:
    from e4t_cli.pretraining import Processes


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
    access: Access
    processes: Processes
    strict: bool = False

    def __post_init__(self) -> None:
        from e4t_cli.api.descriptors import check_descriptor, choose_descriptor

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
            mask="auto" if self.plan.recipe.mask else None,
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
        return {
            "name": self.domain.name,
            "descriptor": self.domain.descriptor,
            "recipe": self.plan.recipe,
            "tuning": self.plan.tuning,
            "templates": training_templates(self.domain),
            "autocast": self.session.model.device.type == "cuda",
        }

    @contextlib.contextmanager
    def watched(
        self, held_out: list[PreparedImage], sample_every: int, trackers: Sequence[Any]
    ) -> Iterator[dict[str, Any]]:
        """Hand out the callbacks that write down the losses and draw on the way."""
        from e4t_cli.watching import Watch, Watching

        report = self.session.report
        if not self.processes.first:
            yield {"on_progress": report}
            return
        watching = Watching(
            folder=self.plan.work / "training",
            sample_every=sample_every,
            images=held_out,
            trackers=tuple(trackers),
        )
        watch = Watch(
            watching, self.session.model, name=self.domain.name,
            settings=self.plan.recipe.as_dict(), on_progress=report,
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


def own_device(device: str, processes: Processes) -> str:
    """Return the device of this process: a launcher gives each of them another one."""
    return device if processes.device is None else str(processes.device)
