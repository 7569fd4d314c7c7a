"""``e4t batch``: images of many subjects, from a file of jobs or from a domain and its photos.

What is finished is in a manifest beside the images: the same command continues an interrupted batch.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from e4t_cli.cli import options
from e4t_cli.cli.plans import print_plan
from e4t_cli.errors import E4TError, InputError, PartialResult, UsageError, printable
from e4t_cli.progress import Progress, StopRequest

if TYPE_CHECKING:
    from e4t_cli.api.batch import JobResult
    from e4t_cli.cli.console import Console
    from e4t_cli.cli.job_files import FileJob
    from e4t_cli.pretraining.batches import DistributedContext

EXAMPLES = """
Examples:\n
e4t batch face photos/*.jpg -f prompts.txt -n 2 -o out/\n
e4t batch jobs.jsonl --json\n
torchrun --nproc-per-node 8 -m e4t_cli batch jobs.jsonl
"""
PHOTOS = {".jpg", ".jpeg", ".png", ".webp", ".avif", ".tif", ".tiff", ".gif", ".bmp", ".heic", ".heif"}  # of a folder
FOREVER = timedelta(days=365)  # a process waits for the others at the end

# fmt: off
Arguments = Annotated[list[str], typer.Argument(
    metavar="JOBS.jsonl | DOMAIN IMAGE...",
    help="A file with a job on each line, - is stdin; or a domain and photos, or folders of them, each a subject.")]


@dataclass(frozen=True, kw_only=True)
class BatchPromptFlags(options.PromptFlags):
    """`PromptFlags`, with prompts as options: the arguments are photos."""

    prompts: Annotated[list[str] | None, options.images_option(
        "-p", "--prompt", metavar="TEXT", help="A prompt, in quotes; several if repeated.")] = None
    seed: Annotated[str | None, options.images_option(
        metavar="SEED", show_default=False,
        help="As in `personalize`, the same for every photo. Default: one of its own for each photo.")] = None


@dataclass(frozen=True, kw_only=True)
class BatchOutputFlags:
    """Where results go."""

    out: Annotated[Path, options.output_option("-o", "--out", metavar="DIR", help="Folder for images.")] = Path(
        "outputs")
    save: Annotated[Path | None, options.output_option(
        metavar="DIR", help="Save each photo's concept in this folder, as PHOTO.e4t.")] = None
    force: Annotated[bool, options.output_option(
        "--force", help="Do again what is finished, and replace its files.")] = False
    no_metadata: Annotated[bool, options.output_option(
        "--no-metadata", help="Leave all but the AI mark out of the files.")] = False
    dry_run: Annotated[bool, options.output_option(
        "--dry-run", help="Check everything, print the plan, and end.")] = False
# fmt: on


@options.grouped
def batch(
    arguments: Arguments, prompts: BatchPromptFlags, sampling: options.SamplingFlags, run: options.PersonalizeFlags,
    output: BatchOutputFlags, terminal: options.TerminalFlags, placeholder: options.Placeholder = "S*",
) -> None:  # fmt: skip
    """Generate images of many subjects, one after the other.

    The base is loaded once. Images go to stdout, one path a line, as soon as they are saved. An error of one photo
    does not end the others. The same command continues where it was interrupted.
    """
    rank = int(os.environ.get("RANK", "0"))
    console = terminal.start()
    jobs = _jobs(arguments, prompts, sampling, run, output, placeholder)
    from e4t_cli.api import batch as api
    from e4t_cli.cli.batch_files import BatchSaver

    stop = console.stop = StopRequest()
    console.resume_hint = "the same command continues"
    saver = BatchSaver(
        console, jobs, rank=rank, force=output.force, metadata=not output.no_metadata,
        checks=not run.no_safety_checker, create=not output.dry_run,
    )  # fmt: skip
    keywords = run.generate_keywords(console)
    if output.dry_run:
        return _print_plan(console, jobs, saver.is_finished, keywords, output.out) if rank == 0 else None
    ended = Ended(total=len(jobs))
    with _processes(run.device) as processes, _progress(console, ended, shown=rank == 0) as on_progress:
        if processes is not None and processes.device is not None:
            keywords["device"] = str(processes.device)
        keywords["on_progress"] = on_progress
        results = api.personalize_many(
            jobs, is_finished=saver.is_finished, callbacks=saver, processes=processes, stop=stop, **keywords
        )
        for result in results:
            saver.withheld(result)
            ended.add(result)
            if result.error is not None:
                hint = result.error.hint if console.json or console.verbose else None
                console.error(type(result.error)(result.error.message, hint=hint))
            on_progress(ended.progress)
        if processes is not None:
            ended = Ended.of(processes.of_all([ended]), len(jobs))
    if rank > 0:
        return None  # the first process reports the end: the launcher would stop it, if another failed before
    console.note(ended.summary)
    return ended.check()


# ── jobs ──


def _jobs(
    arguments: Sequence[str], prompts: BatchPromptFlags, sampling: options.SamplingFlags,
    run: options.PersonalizeFlags, output: BatchOutputFlags, placeholder: str,
) -> list[FileJob]:  # fmt: skip
    """Return the jobs of a file, or one for each photo."""
    from e4t_cli.cli.job_files import FileJob, read_jobs
    from e4t_cli.cli.prompt_files import STDIN, gather_prompts

    file = arguments[0] if len(arguments) == 1 else None
    texts = gather_prompts(
        prompts.prompts or [], prompts.prompts_file, placeholder=placeholder, stdin_taken=file == STDIN
    )
    seed = prompts.seeds()
    if output.out.suffix.lower() == ".png" and not os.path.isdir(output.out):
        raise UsageError(f"{printable(str(output.out))} is no folder, and a batch needs one", hint="-o FOLDER")
    own: dict[str, Any] = {
        **run.photo_keywords(), "tuning": run.tuning, "tune_steps": run.tune_steps,
        "keep_weights": run.keep_weights, "domain_base": run.domain_base,
    }  # fmt: skip
    defaults = FileJob(
        domain="", image=[], prompts=texts, num_images_per_prompt=prompts.num_images, seed=seed,
        sampling=sampling.given(), placeholder=placeholder, options=own, out=output.out,  # type: ignore[arg-type]
    )  # fmt: skip
    if file is not None:
        if file != STDIN and not os.path.exists(file):
            hint = f"e4t batch jobs.jsonl, or a domain and photos: e4t batch {printable(file)} photos/*.jpg"
            raise UsageError(f"there is no file {printable(file)}", hint=hint)
        if output.save is not None:
            raise UsageError("--save is for photos on the command line", hint='in a file of jobs: "save": "me.e4t"')
        return read_jobs(file, defaults)
    return list(_photo_jobs(arguments[0], arguments[1:], defaults, output.save))


def _photo_jobs(domain: str, arguments: Sequence[str], defaults: FileJob, save: Path | None) -> Iterator[FileJob]:
    from dataclasses import replace

    if "." in domain and os.path.isfile(domain):  # no name of a domain has a dot
        example = f"for example: e4t batch face {printable(domain)} …"
        raise UsageError(f"{printable(domain)} is a file; the domain comes before it", hint=example)
    names: set[str] = set()
    for number, photo in enumerate(_photos(arguments), start=1):
        concept = None
        if save is not None:
            stem = Path(photo).stem
            free = itertools.chain([stem], (f"{stem}-{count}" for count in itertools.count(2)))
            names.add(name := next(one for one in free if one not in names))
            concept = save / f"{name}.e4t"
        yield replace(
            defaults, domain=domain, image=photo, source=photo, number=number, save=concept,
            wants_concept=concept is not None,
        )  # fmt: skip


def _photos(arguments: Sequence[str]) -> Iterator[str]:
    """Yield photos; of a folder all that are in it, by name."""
    for one in arguments:
        if not os.path.isdir(one):
            yield one
            continue
        found = [name for name in sorted(os.listdir(one)) if Path(name).suffix.lower() in PHOTOS and name[0] != "."]
        if not found:
            raise InputError(f"the folder {printable(one)} has no photos")
        yield from (os.path.join(one, name) for name in found)


# ── several processes ──


@contextlib.contextmanager
def _processes(device: str) -> Iterator[DistributedContext | None]:
    """Join the processes of a launcher, if there are several."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield None
        return
    from e4t_cli.pretraining.batches import init_distributed

    with init_distributed(device, timeout=FOREVER) as processes:
        yield processes


# ── progress and the end ──


@contextlib.contextmanager
def _progress(console: Console, ended: Ended, *, shown: bool) -> Iterator[Callable[[Progress], None]]:
    """Yield the `on_progress` callback: on a terminal a table of jobs and stages, elsewhere a line now and then."""
    from e4t_cli.cli.terminal import stderr_is_terminal

    with console.progress() if shown else contextlib.nullcontext() as show:
        live = shown and stderr_is_terminal()

        def on_progress(event: Progress) -> None:
            once = event.stage in ("jobs", "load", "fetch")
            if show is not None and (live or once or not event.total or event.note or event.remark):
                show(event)
            elif show is None and event.note:
                console.warning(event.note)

        if live:
            on_progress(ended.progress)  # the first row
        yield on_progress


@dataclass
class Ended:
    """How many jobs ended how; of one process, or of all together."""

    total: int
    done: int = 0  # without an error, also those with nothing to do
    images: int = 0
    skipped: int = 0  # images that were finished before
    withheld: int = 0
    failures: list[tuple[type[E4TError], str, str | None]] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)

    def add(self, result: JobResult) -> None:
        """Count one job."""
        self.skipped += result.skipped
        if result.error is not None:
            self.failures.append((type(result.error), result.error.message, result.error.hint))
            return
        self.done += 1
        self.withheld += len(result.withheld)
        self.images += len(result.result.images) if result.result is not None else 0

    @classmethod
    def of(cls, several: Sequence[Ended], total: int) -> Ended:
        """Return the sum of all processes."""
        whole = cls(total=total, failures=[one for each in several for one in each.failures])
        for name in ("done", "images", "skipped", "withheld"):
            setattr(whole, name, sum(getattr(one, name) for one in several))
        whole.begun = several[0].begun
        return whole

    @property
    def progress(self) -> Progress:
        """Return the event for the row of jobs."""
        ended, minutes = self.done + len(self.failures), (time.monotonic() - self.begun) / 60
        values = {"failed": float(len(self.failures))} if self.failures else {}
        return Progress(stage="jobs", done=ended, total=self.total, values={**values, "a minute": ended / minutes})

    @property
    def summary(self) -> str:
        """Return one line for the end."""
        before = f"; {self.skipped} were there before" if self.skipped else ""
        minutes = (time.monotonic() - self.begun) / 60
        return f"{self.done} of {self.total} jobs, {self.images} images in {minutes:.1f} min{before}"

    def check(self) -> None:
        """Raise the error that the command ends with, if there is one.

        Raises:
            E4TError: all failed, all in the same way.
            PartialResult: some failed, or images were withheld.
        """
        kinds = {kind for kind, _, _ in self.failures}
        if len(self.failures) == self.total and len(kinds) == 1:
            kind, _, hint = self.failures[0]
            raise kind(f"all {self.total} jobs failed" if self.total > 1 else "the job failed", hint=hint)
        if self.failures:
            message = f"{len(self.failures)} of {self.total} jobs failed"
            raise PartialResult(message, hint="the same command tries them again, and no others")
        if self.withheld:
            wanted = self.withheld + self.images
            message = f"the safety checker withheld {self.withheld} of {wanted} images"
            raise PartialResult(message, hint="try another seed or prompt; --no-safety-checker if it is mistaken")


def _print_plan(
    console: Console, jobs: Sequence[FileJob], is_finished: Callable[[Any, str], bool], keywords: Any, out: Path
) -> None:
    """Print what would be done with each job, then what all of it costs."""
    from e4t_cli.api.batch_plans import plan_batch

    plan = plan_batch(jobs, is_finished=is_finished, **keywords)
    rows = plan["jobs"]
    if not console.json:
        cells = [
            [row["source"], row["domain"], str(row.get("seed", "")), str(row["images"]), str(row["finished"]),
             row.get("error", "")]
            for row in rows
        ]  # fmt: skip
        console.table(("job", "domain", "seed", "images", "finished", "error"), cells)
        plan["jobs"] = len(rows)
    print_plan(console, plan, out)
