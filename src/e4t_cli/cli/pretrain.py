"""``e4t pretrain``: trains a domain on the user's images."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from e4t_cli.cli import options
from e4t_cli.progress import ProgressCallback, StopRequest

if TYPE_CHECKING:
    from e4t_cli.api.options import DomainTrainingKeywords
    from e4t_cli.cli.console import Console

EXAMPLES = """
Examples:\n
e4t pretrain --domain my_dogs --data ./dogs --dry-run\n
e4t pretrain --domain my_dogs --data ./dogs\n
e4t personalize my_dogs rex.jpg "S* on the beach"
"""
training_option = functools.partial(typer.Option, rich_help_panel="Training")
run_option = functools.partial(typer.Option, rich_help_panel="The run")

# fmt: off
Name = Annotated[str, typer.Option("--domain", metavar="NAME", help="Its name: a-z, 0-9, - and _.")]
Data = Annotated[str, typer.Option(
    metavar="SOURCE", help="A folder; shards: a .tar, 'x-{000..099}.tar', a .txt that lists them; a dataset: "
                           "hf://owner/name, a saved folder, a .parquet, '*.parquet'.")]
Seed = Annotated[int, training_option(metavar="N", min=0, help="Of weights, noise and order.")]
DryRun = Annotated[bool, run_option(
    "--dry-run", help="Measure a few steps, print the cost, and end.")]


@dataclass(frozen=True, kw_only=True)
class TrainingFlags(options.RunFlags):
    """`api.options.DomainTrainingOptions`."""

    descriptor: Annotated[str | None, options.images_option(
        metavar="WORD", help="The everyday word for such things; default: from the name.")] = None
    strict: Annotated[bool, options.images_option(
        "--strict", help="Stop at an image that cannot be used.")] = False
    cache: Annotated[str, options.images_option(
        metavar="auto|on|off", help="Encode each image once; auto: if it is used repeatedly.")] = "auto"
    steps: Annotated[int | None, training_option(
        metavar="N", min=1, help="Training steps. Here and below, default: the config's.")] = None
    batch: Annotated[int | None, training_option(
        metavar="N", min=1, help="Images in a step, in each process.")] = None
    base_lr: Annotated[float | None, training_option(
        metavar="X", help="Learning rate, before it is multiplied by batch and processes.")] = None
    reg_weight: Annotated[float | None, training_option(
        metavar="X", help="Weight of the embedding regularization L_reg (eq. 2).")] = None
    micro_batch: Annotated[int | None, run_option(
        metavar="N", min=1, help="Images in memory at once: the same training in less memory.")] = None
    force: options.Force = False

    def keywords(self, terminal: Console, on_progress: ProgressCallback) -> DomainTrainingKeywords:
        """Return the keywords of the library."""
        return {
            **self.run_keywords(terminal, on_progress),
            "descriptor": self.descriptor, "strict": self.strict, "cache": self.cache, "steps": self.steps,
            "batch_size": self.batch, "base_learning_rate": self.base_lr, "reg_weight": self.reg_weight,
            "micro_batch": self.micro_batch, "force": self.force,
        }


@dataclass(frozen=True, kw_only=True)
class CheckpointFlags:
    """`api.options.PretrainOptions`: checkpoints and logs."""

    sample_every: Annotated[int, run_option(
        min=0, metavar="N", help="Every N steps a contact sheet of a few held-out images.")] = 0
    checkpoint_every: Annotated[int | None, run_option(
        min=1, metavar="N", help="Steps between two checkpoints.")] = None
    resume: Annotated[bool, run_option(
        "--resume/--fresh", help="Continue an interrupted run, or start again.")] = True
    resume_changed: Annotated[bool, run_option(
        "--resume-changed", help="Continue also if data or settings differ.")] = False
    tracker: Annotated[list[str] | None, run_option(
        metavar="NAME", help="Send the losses to tensorboard, wandb, …; can be repeated.")] = None
# fmt: on


@options.grouped
def pretrain(
    domain: Name,
    data: Data,
    training: TrainingFlags,
    checkpoints: CheckpointFlags,
    terminal: options.TerminalFlags,
    seed: Seed = 0,
    dry_run: DryRun = False,
) -> None:
    """Pre-train a domain on images, for `e4t personalize` to use.

    No captions are needed. On mini it takes minutes, on Stable Diffusion hours on a GPU. After an
    interruption the same command continues from the last checkpoint.
    """
    # Under a launcher the same command runs in every process; only the first one prints.
    first = os.environ.get("RANK", "0") == "0"
    console = terminal.start(quiet=not first)
    from e4t_cli.api import dry_run as planning
    from e4t_cli.api import pretraining

    if dry_run:
        with console.progress() as on_progress:
            plan = planning.plan_pretraining(domain, data, **training.keywords(console, on_progress))
        if first:
            console.details(domain, plan if terminal.json else _plan_lines(plan))
        return
    console.resume_hint = "the same command continues from the last checkpoint"
    console.stop = StopRequest()
    with console.progress() as on_progress:
        folder = pretraining.pretrain(
            domain, data, seed=seed, stop=console.stop, trackers=checkpoints.tracker or (),
            sample_every=checkpoints.sample_every, checkpoint_every=checkpoints.checkpoint_every,
            resume=checkpoints.resume, resume_changed=checkpoints.resume_changed,
            **training.keywords(console, on_progress),
        )  # fmt: skip
    if first:
        console.product(str(folder), {"type": "domain", "name": domain, "path": str(folder)})
        console.note(f'try it: e4t personalize {domain} PHOTO "S* on the beach"')


def _plan_lines(plan: dict[str, Any]) -> dict[str, str]:
    """Return the plan with units, without what is unknown."""
    from e4t_cli.files import shown_size

    seconds, used = plan["seconds"], plan["cache"]["used"]
    opened = "" if plan["opened"] == plan["images"] else f", of {plan['opened']:,} opened"
    kept = shown_size(plan["cache"]["bytes"]) if plan["cache"]["bytes"] else "of unknown size"
    return {
        "descriptor": plan["descriptor"],
        "base": plan["base"],
        "images": f"{plan['images']:,}" if plan["images"] else "unknown",
        "left out": f"{plan['left_out']:,}{opened}",
        "other files": f"{plan['other_files']:,}" if plan["other_files"] else "",
        "steps": f"{plan['steps']:,} of {plan['batch']} images"
        + (f" in each of {plan['processes']} processes" if plan["processes"] > 1 else ""),
        "learning rate": f"{plan['learning_rate']:.3g}",
        "passes": f"{plan['passes']:,g}" if plan["passes"] is not None else "",
        "cache": kept if used else f"none (it would be {kept})",
        "memory": shown_size(plan["memory_bytes"]) if plan["memory_bytes"] else "",
        "time": f"about {_duration(seconds['total'])}: encoding {_duration(seconds['encode'])}, "
        f"then {seconds['step']:.3g} s per step",
    }


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
