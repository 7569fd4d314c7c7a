"""`personalize_many`: personalizes many subjects, one after the other, on a base that is loaded once.

Each job does what `personalize` does with the same arguments, bit for bit. Several processes share the jobs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Unpack

from e4t_cli.api.job_calls import BatchCallbacks, JobCalls
from e4t_cli.api.jobs import CheckedJob, Job, KeyedJob
from e4t_cli.api.options import GenerateKeywords, GenerateOptions, PersonalizeOptions
from e4t_cli.api.personalization import personalize_loaded
from e4t_cli.api.photos import PhotoSet
from e4t_cli.api.resolve import refuse_addons, resolve_base, resolve_base_name, resolve_domain_weights
from e4t_cli.api.session import Session
from e4t_cli.errors import E4TError, ResourceError, UsageError, printable
from e4t_cli.images.results import Personalization
from e4t_cli.progress import StopRequest
from e4t_cli.registry.domain import Domain
from e4t_cli.system_memory import memory_ran_out, out_of_memory

if TYPE_CHECKING:
    from e4t_cli.hub.bases import Base
    from e4t_cli.models.domain_weights import DomainWeights
    from e4t_cli.models.loading import SafetyChecker
    from e4t_cli.models.text_to_image import TextToImageModel

IsFinished = Callable[[Job, str], bool]


class Processes(Protocol):
    """What is needed of `pretraining.batches.DistributedContext`."""

    @property
    def rank(self) -> int: ...
    @property
    def count(self) -> int: ...
    def of_first(self, values: list[int]) -> list[int]: ...


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """How one job ended.

    Args:
        result: with the images that were generated now; None if there was nothing to do, or an error.
        skipped: images that were finished before.
        error: why it failed; its message begins with the job's source.
        withheld: keys of images that the safety checker withheld.
    """

    job: Job
    result: Personalization | None = None
    skipped: int = 0
    error: E4TError | None = None
    withheld: tuple[str, ...] = ()


def check_jobs(jobs: Sequence[Job]) -> list[CheckedJob]:
    """Check all jobs, and look each domain up once; raises as `Job.check`."""
    found: dict[str, tuple[Domain, str]] = {}
    return [job.check(found) for job in jobs]


def personalize_many(
    jobs: Sequence[Job],
    *,
    is_finished: IsFinished | None = None,
    callbacks: BatchCallbacks | None = None,
    processes: Processes | None = None,
    stop: StopRequest | None = None,
    **options: Unpack[GenerateKeywords],
) -> Iterator[JobResult]:
    """Check all jobs, then do one after the other, and yield how each ended; an error of one does not end the others.

    The base is loaded for the first job that has something to do, the weights of a domain once. The files of the next
    job are read and decoded while one is tuned and its images are generated.

    Args:
        jobs: those of all processes.
        is_finished: called with a job and the key of one of its images, or of its concept: whether it is not needed
            again.
        callbacks: called with each concept and image.
        processes: those that share the jobs; this one does its part.
        stop: its request ends the batch with KeyboardInterrupt, as soon as the images in work have come.
        options: keywords, see `e4t_cli.api.options`: base, device, dtype, vram, offline, accept_license, addons,
            safety_checker, on_progress.

    Raises:
        UsageError: a job cannot be; raised by the call, before anything is loaded.
        E4TError: the base or the weights of a domain cannot be loaded; a ResourceError of a callback, such as a full
            disk. Other errors of callbacks are those of the job.
    """
    return Engine(check_jobs(jobs), GenerateOptions(**options), is_finished, callbacks, stop).run(processes)


class Engine:
    """What the jobs of one batch share; the arguments are those of `personalize_many`."""

    def __init__(
        self, jobs: list[CheckedJob], options: GenerateOptions, is_finished: IsFinished | None = None,
        callbacks: BatchCallbacks | None = None, stop: StopRequest | None = None,
    ) -> None:  # fmt: skip
        self.jobs, self.callbacks, self.stop = jobs, callbacks, stop
        self.is_finished = is_finished or (lambda job, key: False)
        self.session = Session(options, vram=options.vram, safety=options.safety_checker)
        self.session.find_addons()
        self.options = replace(options, addons=self.session.options.addons)
        self.model: TextToImageModel | None = None
        self.folders: dict[tuple[int, str], Path] = {}  # of the weights of a domain, by its id and another base's name
        self.weights: dict[Path, DomainWeights] = {}
        self.checkers: list[SafetyChecker | None] = []
        self.notes: set[str] = set()  # about the base, shown once
        self.loaded = contextlib.ExitStack()
        self.circumstances = self._circumstances()

    def _circumstances(self) -> dict[str, Any]:
        """Return what all images of the batch depend on beside their jobs; the device only changes roundings."""
        base = self.options.base
        if isinstance(base, str | os.PathLike):
            access = replace(self.session.access, on_progress=None)  # the reason is reported when it is loaded
            names = {
                resolve_base_name(base, access, domain=one, device=self.options.device, confirm=False)
                for one in {id(job.domain): job.domain for job in self.jobs}.values()
            }
            if len(names) > 1:
                message = f"the domains of these jobs have weights for different bases: {' and '.join(sorted(names))}"
                raise UsageError(message, hint="say which one is used: --base")
            name, addons = "".join(names), self.options.addons.check()
        else:
            if self.options.addons:
                refuse_addons(self.options)
            name, addons = base.weights_fingerprint, base.addons
        return {"base": name, "dtype": self.options.dtype, "addons": [one.as_dict() for one in addons]}

    def run(self, processes: Processes | None) -> Iterator[JobResult]:
        """Do this process's share."""
        share = self.jobs
        if processes is not None and processes.count > 1:
            left = []
            if processes.rank == 0:  # it says what is left: the others may see files that were finished since
                for number, job in enumerate(self.jobs):
                    if finished := self._finished(job):
                        yield JobResult(job=job.job, skipped=finished)
                    else:
                        left.append(number)
            left = processes.of_first(left)
            share = [self.jobs[number] for number in left[processes.rank :: processes.count]]
        with self.loaded, ThreadPoolExecutor(1, "e4t-photos") as reader:
            # Files are read and decoded there, without Python's lock. Detection would have to share it with tuning:
            # with forward passes below 100 ms two threads of Python are no faster than one.
            opening = [reader.submit(self.open, job) for job in share[:1]]
            for number, job in enumerate(share):
                if self.stop is not None and self.stop.asked:
                    raise KeyboardInterrupt
                opened = opening.pop()
                failed = opened.exception()
                opening += [reader.submit(self.open, one) for one in share[number + 1 : number + 2]]
                if isinstance(failed, Exception):
                    yield self._failed(job.job, failed)
                else:
                    yield self._do(*opened.result())

    def _finished(self, job: CheckedJob) -> int:
        """Return the number of a job's images, or 0 if there is something to do."""
        try:
            keyed = job.keyed(self.circumstances)
            return 0 if self._left(keyed).every_key else keyed.total
        except Exception:
            return 0  # whoever gets the job reports it

    def open(self, job: CheckedJob) -> tuple[KeyedJob, PhotoSet | None]:
        """Return what is left of a job, and its photos, unless nothing is."""
        left = self._left(job.keyed(self.circumstances))
        return left, left.open_photos() if left.every_key else None

    def _left(self, keyed: KeyedJob) -> KeyedJob:
        job = keyed.checked.job
        return keyed.without({key for key in keyed.every_key if self.is_finished(job, key)})

    def _failed(self, job: Job, error: Exception) -> JobResult:
        """Return the result of a job that raised an error."""
        if memory_ran_out(error) and not isinstance(error, ResourceError):
            error = out_of_memory()
        if not isinstance(error, E4TError):
            text = printable(f"{type(error).__name__}: {error}")
            error = E4TError(f"unexpected {text}", hint="this is a bug of e4t; rerun with -vv for the traceback")
        # Without its traceback, which keeps tensors.
        return JobResult(job=job, error=job.located(error).with_traceback(None))

    # ── one job ──

    def _do(self, keyed: KeyedJob, photos: PhotoSet | None) -> JobResult:
        """Do what is left of one job."""
        checked, job = keyed.checked, keyed.checked.job
        keyed = self._left(keyed)  # the job before may have had the same images
        skipped = keyed.total - len(keyed.wanted)
        if photos is None or not keyed.every_key:
            return JobResult(job=job, skipped=skipped)
        self._load()
        weights = self._weights_of(checked.domain, checked.domain_base)
        calls = JobCalls(keyed, self.callbacks, self.options.on_progress, self.stop, self.notes)
        try:
            with calls:
                result = self._personalize(keyed, photos, weights, calls)
        except Exception as error:
            if error is calls.fatal:
                raise
            return self._failed(job, error)
        return JobResult(job=job, result=result, skipped=skipped, withheld=tuple(calls.waiting))

    def _personalize(
        self, keyed: KeyedJob, photos: PhotoSet, weights: DomainWeights, calls: JobCalls
    ) -> Personalization:
        checked, shared = keyed.checked, self.options
        assert self.model is not None
        own: dict[str, Any] = {
            **checked.job.options, "base": self.model, "device": shared.device, "dtype": shared.dtype,
            "offline": shared.offline, "accept_license": shared.accept_license, "vram": shared.vram,
            "safety_checker": shared.safety_checker, "on_progress": calls.on_progress, "on_image": calls.on_image,
            "on_concept": calls.on_concept if keyed.concept_key else None,
        }  # fmt: skip
        asked = PersonalizeOptions(**own)
        session = _JobSession(self, asked)
        with session.running():
            session.use_weights(weights, domain_base=checked.domain_base)
            return personalize_loaded(
                session, asked, photos, keyed.wanted, domain=checked.domain, package=checked.package,
                seed=keyed.seed, placeholder=checked.placeholder, domain_base=checked.domain_base,
            )  # fmt: skip

    # ── what is loaded once ──

    def _load(self) -> None:
        """Find the weights of all domains, and load the base, if that was not done before."""
        if self.model is not None:
            return
        session, base = self.session, None
        for one in self.jobs:
            if (key := self._weights_key(one.domain, one.domain_base)) not in self.folders:
                base = base or self._base(one)
                weights = resolve_domain_weights(one.domain, base, session.access, domain_base=one.domain_base)
                self.folders[key] = weights
        assert base is not None
        self.loaded.enter_context(session.running(base))
        session.load(base, None)
        self.model = session.model

    def _base(self, job: CheckedJob) -> Base | TextToImageModel:
        options, access = self.options, self.session.access
        return resolve_base(
            options, access, domain=job.domain, safety=options.safety_checker, domain_base=job.domain_base
        )

    def _weights_key(self, domain: Domain, domain_base: str) -> tuple[int, str]:
        return id(domain), domain_base

    def _weights_of(self, domain: Domain, domain_base: str) -> DomainWeights:
        from e4t_cli.models.domain_weights import DomainWeights

        folder = self.folders[self._weights_key(domain, domain_base)]
        if folder not in self.weights:
            self.weights[folder] = DomainWeights.load(folder)
        return self.weights[folder]

    def checker(self) -> SafetyChecker | None:
        """Return the safety checker, loaded once."""
        if not self.checkers:
            self.checkers.append(self.session.safety_checker())
        return self.checkers[0]


class _JobSession(Session):
    """The session of one job, with what the batch has loaded."""

    def __init__(self, engine: Engine, options: PersonalizeOptions) -> None:
        super().__init__(options, vram=options.vram, safety=options.safety_checker)
        assert engine.model is not None
        self.engine, self.model = engine, engine.model
        self._owns_model, self.shares_model = engine.session._owns_model, True

    def safety_checker(self) -> SafetyChecker | None:
        """Return the checker of the batch."""
        return self.engine.checker()
