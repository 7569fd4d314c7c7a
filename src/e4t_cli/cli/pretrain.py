"""``e4t pretrain``: a folder of pictures in, a domain of your own out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from e4t_cli.cli import console as consoles
from e4t_cli.cli.options import Base, Device, Dtype, Json, Quiet, Verbose

EXAMPLES = """
Example: [bold]e4t pretrain --domain my_dogs --descriptor dog --data ./dogs[/bold], then
[bold]e4t personalize my_dogs rex.jpg "S* on the beach"[/bold]
"""

Name = Annotated[str, typer.Option("--domain", metavar="NAME", help="Its name: a-z, 0-9, - and _.")]
Data = Annotated[
    Path, typer.Option("--data", metavar="DIR", help="A folder of pictures; sub-folders count.")
]
Descriptor = Annotated[
    str | None,
    typer.Option(metavar="WORD", help="The everyday word for such things; by default the name."),
]
TrainingSteps = Annotated[
    int | None, typer.Option("--steps", min=1, help="Training steps; default: as the recipe says.")
]
TrainingSeed = Annotated[int, typer.Option("--seed", min=0, help="Of weights and noise.")]


def pretrain(
    domain: Name,
    data: Data,
    descriptor: Descriptor = None,
    base: Base = "auto",
    steps: TrainingSteps = None,
    seed: TrainingSeed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Pre-train a domain on a folder of pictures, for `e4t personalize` to use.

    No captions are needed. It takes hours to days, and a graphics card; an interrupted run goes
    on from its last checkpoint when the same command is given again.
    """
    console = consoles.start(json=json, quiet=quiet, verbose=verbose)
    from e4t_cli import api

    console.resume_hint = "the same command goes on from the last checkpoint"
    with console.progress() as on_progress:
        folder = api.pretrain(
            domain,
            data,
            descriptor=descriptor,
            base=base,
            steps=steps,
            seed=seed,
            device=device,
            dtype=dtype,
            on_progress=on_progress,
        )
    console.product(str(folder), {"type": "domain", "name": domain, "path": str(folder)})
    console.note(f'try it: e4t personalize {domain} PHOTO "S* on the beach"')
