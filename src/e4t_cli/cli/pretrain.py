"""``e4t pretrain``: pictures in, a domain of your own out."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from e4t_cli.cli import console as consoles
from e4t_cli.cli.options import AcceptLicense, Base, Device, Dtype, Json, Offline, Quiet, Verbose
from e4t_cli.progress import StopRequest

EXAMPLES = """
Example: [bold]e4t pretrain --domain my_dogs --data ./dogs --dry-run[/bold], then without
[bold]--dry-run[/bold], then [bold]e4t personalize my_dogs rex.jpg "S* on the beach"[/bold]
"""
PICTURES, NUMBERS, RUN = "Pictures", "Numbers of training", "The run"

Name = Annotated[str, typer.Option("--domain", metavar="NAME", help="Its name: a-z, 0-9, - and _.")]
Data = Annotated[
    str,
    typer.Option("--data", metavar="SOURCE",
                 help="A folder; shards: a .tar, 'x-{000..099}.tar', a list of them in a .txt; "
                      "a dataset: hf://owner/name, a saved folder, a .parquet."),
]  # fmt: skip
Descriptor = Annotated[
    str | None,
    typer.Option(metavar="WORD", rich_help_panel=PICTURES,
                 help="The everyday word for such things; by default one of the name's words."),
]  # fmt: skip
Strict = Annotated[
    bool,
    typer.Option("--strict", rich_help_panel=PICTURES,
                 help="Stop at a picture that cannot be used, instead of leaving it out."),
]  # fmt: skip
Cache = Annotated[
    str,
    typer.Option(metavar="auto|on|off", rich_help_panel=PICTURES,
                 help="Look at each picture once and keep that; auto: if it is needed twice."),
]  # fmt: skip
TrainingSteps = Annotated[
    int | None,
    typer.Option("--steps", min=1, rich_help_panel=NUMBERS,
                 help="Training steps. Here and below, default: as the recipe says."),
]  # fmt: skip
Batch = Annotated[
    int | None,
    typer.Option("--batch", min=1, rich_help_panel=NUMBERS,
                 help="Pictures in a step, in each process."),
]  # fmt: skip
Rate = Annotated[
    float | None,
    typer.Option("--base-lr", rich_help_panel=NUMBERS,
                 help="Learning rate, before it is multiplied by batch and processes."),
]  # fmt: skip
RegWeight = Annotated[
    float | None,
    typer.Option("--reg-weight", rich_help_panel=NUMBERS,
                 help="Weight of the word embedding's size in the loss."),
]  # fmt: skip
TrainingSeed = Annotated[
    int, typer.Option("--seed", min=0, rich_help_panel=NUMBERS, help="Of weights and noise.")
]
MicroBatch = Annotated[
    int | None,
    typer.Option(min=1, rich_help_panel=RUN,
                 help="Pictures in memory at once; less needs less memory, and more time."),
]  # fmt: skip
SampleEvery = Annotated[
    int,
    typer.Option("--sample-every", min=0, metavar="N", rich_help_panel=RUN,
                 help="Draw a contact sheet of a few held-out pictures every N steps."),
]  # fmt: skip
CheckpointEvery = Annotated[
    int | None,
    typer.Option("--checkpoint-every", min=1, metavar="N", rich_help_panel=RUN,
                 help="Steps between two checkpoints."),
]  # fmt: skip
Resume = Annotated[
    bool,
    typer.Option("--resume/--fresh", rich_help_panel=RUN,
                 help="Go on from the last checkpoint of an interrupted run, or begin anew."),
]  # fmt: skip
Force = Annotated[
    bool,
    typer.Option("--force", rich_help_panel=RUN,
                 help="Go on from a checkpoint also if data or settings are others."),
]  # fmt: skip
Tracker = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", rich_help_panel=RUN,
                 help="Also send the losses to tensorboard, wandb, ...; can be repeated."),
]  # fmt: skip
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", rich_help_panel=RUN,
                 help="Open the pictures, measure a few steps, say what it would cost, and end."),
]  # fmt: skip


def pretrain(
    domain: Name,
    data: Data,
    descriptor: Descriptor = None,
    base: Base = "auto",
    strict: Strict = False,
    cache: Cache = "auto",
    steps: TrainingSteps = None,
    batch: Batch = None,
    base_lr: Rate = None,
    reg_weight: RegWeight = None,
    seed: TrainingSeed = 0,
    micro_batch: MicroBatch = None,
    sample_every: SampleEvery = 0,
    checkpoint_every: CheckpointEvery = None,
    resume: Resume = True,
    force: Force = False,
    tracker: Tracker = None,
    dry_run: DryRun = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offline: Offline = False,
    accept_license: AcceptLicense = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Pre-train a domain on pictures, for `e4t personalize` to use.

    No captions are needed. It takes hours to days, and a graphics card; an interrupted run goes
    on from its last checkpoint when the same command is given again.
    """
    # Under a launcher the same command runs in every process, and one of them speaks.
    first = os.environ.get("RANK", "0") == "0"
    console = consoles.start(json=json, quiet=quiet or not first, verbose=verbose)
    from e4t_cli.api import dry_run as planning
    from e4t_cli.api import pretraining

    asked: dict[str, Any] = {
        "descriptor": descriptor, "base": base, "steps": steps, "batch_size": batch,
        "base_learning_rate": base_lr, "reg_weight": reg_weight,
        "micro_batch": micro_batch, "cache": cache, "strict": strict, "device": device,
        "dtype": dtype, "offline": offline, "accept_license": console.consent(accept_license),
    }  # fmt: skip
    if dry_run:
        with console.progress() as on_progress:
            plan = planning.plan_pretraining(domain, data, **asked, on_progress=on_progress)
        if first:
            console.details(domain, plan if json else _as_people_say_it(plan))
        return
    console.resume_hint = "the same command goes on from the last checkpoint"
    console.stop = StopRequest()
    with console.progress() as on_progress:
        folder = pretraining.pretrain(
            domain,
            data,
            **asked,
            seed=seed,
            sample_every=sample_every,
            trackers=tracker or (),
            checkpoint_every=checkpoint_every,
            resume=resume,
            force=force,
            stop=console.stop,
            on_progress=on_progress,
        )
    if first:
        console.product(str(folder), {"type": "domain", "name": domain, "path": str(folder)})
        console.note(f'try it: e4t personalize {domain} PHOTO "S* on the beach"')


def _as_people_say_it(plan: dict[str, Any]) -> dict[str, str]:
    """The plan with units, without what is not known."""
    from e4t_cli.files import shown_size

    seconds, used = plan["seconds"], plan["cache"]["used"]
    opened = "" if plan["opened"] == plan["pictures"] else f", of {plan['opened']:,} opened"
    kept = shown_size(plan["cache"]["bytes"]) if plan["cache"]["bytes"] else "of unknown size"
    return {
        "descriptor": plan["descriptor"],
        "base": plan["base"],
        "pictures": f"{plan['pictures']:,}" if plan["pictures"] else "unknown",
        "left out": f"{plan['left_out']:,}{opened}",
        "other files": f"{plan['no_pictures']:,}" if plan["no_pictures"] else "",
        "steps": f"{plan['steps']:,} of {plan['batch']} pictures"
        + (f" in each of {plan['processes']} processes" if plan["processes"] > 1 else ""),
        "learning rate": f"{plan['learning_rate']:.3g}",
        "passes": f"{plan['passes']:,g}" if plan["passes"] is not None else "",
        "cache": kept if used else f"none (it would be {kept})",
        "memory": shown_size(plan["memory_bytes"]) if plan["memory_bytes"] else "",
        "time": f"about {_duration(seconds['total'])}: looking {_duration(seconds['encode'])}, "
        f"then {seconds['step']:.3g} s a step",
    }


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
