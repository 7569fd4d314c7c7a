"""``e4t import``: weights that another program trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from e4t_cli.cli import console as consoles
from e4t_cli.cli.options import Device, Dtype, Json, Quiet, Verbose
from e4t_cli.errors import UsageError

EXAMPLES = """
Examples:\n
e4t import e4t-diffusion ./my-checkpoint --name my_dogs --base sd14\n
e4t personalize my_dogs rex.jpg "S* on the beach" --base sd14\n
e4t import e4t-diffusion ./tuned-on-rex --save rex.e4t
"""

app = typer.Typer(help="Use weights that another program trained.", no_args_is_help=True)

Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="With config.json, encoder.pt and the weights.")
]
Name = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Of the domain; by default the one that it was made for."),
]
TrainedOn = Annotated[
    str | None,
    typer.Option("--base", help="What it was trained on; by default what its config says."),
]
Licence = Annotated[
    str, typer.Option(metavar="TEXT", help="Of the weights, for the domain's card.")
]
Save = Annotated[
    Path | None,
    typer.Option("--save", metavar="FILE.e4t", help="A tuned checkpoint's subject, as a concept."),
]
Photo = Annotated[
    str | None,
    typer.Option("--image", metavar="FILE", help="The photo it was tuned on, if it is not there."),
]
Patches = Annotated[
    bool,
    typer.Option(
        "--normalised-patches", help="For checkpoints trained with an open_clip from 2024 on."
    ),
]


@app.callback()
def weights() -> None:
    """Use weights that another program trained."""


@app.command("e4t-diffusion", epilog=EXAMPLES)
def e4t_diffusion(
    folder: Folder,
    name: Name = None,
    base: TrainedOn = None,
    licence: Licence = "",
    save: Save = None,
    image: Photo = None,
    normalised_patches: Patches = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Make a domain of a checkpoint of mkshing/e4t-diffusion.

    Its files are pickles: they are read once, with torch's restricted loader, by a process that
    has no network, and kept as safetensors. The domain's folder goes to stdout, with --save the
    concept's file instead.
    """
    console = consoles.start(json=json, quiet=quiet, verbose=verbose)
    if image is not None and save is None:
        raise UsageError("--image is for a tuned checkpoint's concept", hint="add --save me.e4t")
    from e4t_cli.api import foreign, foreign_concepts

    with console.progress() as on_progress:
        if save is None:
            made = foreign.import_checkpoint(
                folder, name=name, base=base, licence=licence,
                normalised_patches=normalised_patches, on_progress=on_progress,
            )  # fmt: skip
        else:
            made = foreign_concepts.import_concept(
                folder, save, image=image, name=name, base=base, licence=licence,
                normalised_patches=normalised_patches, device=device, dtype=dtype,
                on_progress=on_progress,
            )  # fmt: skip
    console.note(made.summary)
    if save is None:
        record = {"type": "domain", "name": made.name, "base": made.base}
        console.product(str(made.folder), {**record, "path": str(made.folder)})
        console.note(
            f'try it: e4t personalize {made.name} PHOTO "S* on the beach" --base {made.base}'
        )
    else:
        console.product(str(save), {"type": "concept", "name": made.name, "path": str(save)})
        console.note(f'try it: e4t generate {save} "S* on the beach"')
