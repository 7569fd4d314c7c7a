"""``e4t import``: weights that another program trained.

``e4t export``: a concept for programs that know nothing of this one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from e4t_cli.cli import console as consoles
from e4t_cli.cli import options as o
from e4t_cli.cli.options import Device, Dtype, Json, Quiet, Verbose
from e4t_cli.cli.personalize import OwnPlaceholder, Saved
from e4t_cli.errors import UsageError, printable

IMPORT_EXAMPLES = """
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


@app.command("e4t-diffusion", epilog=IMPORT_EXAMPLES)
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
    from e4t_cli.api import importing

    with console.progress() as on_progress:
        if save is None:
            made = importing.import_checkpoint(
                folder, name=name, base=base, licence=licence,
                normalised_patches=normalised_patches, on_progress=on_progress,
            )  # fmt: skip
        else:
            made = importing.import_concept(
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


EXAMPLES = """
Examples:\n
e4t export me.e4t ./me-model\n
e4t export me.e4t ./me.safetensors\n
e4t export me.e4t ./me-lora.safetensors --lora 64
"""

Target = Annotated[
    Path,
    typer.Argument(metavar="FOLDER|FILE.safetensors", help="Where to; it must not exist."),
]
Lora = Annotated[
    int | None,
    typer.Option("--lora", metavar="RANK", min=1, max=1024, show_default=False,
                 help="Only what was learned, as a LoRA of this rank, into FILE.safetensors."),
]  # fmt: skip


def export(
    concept: Saved, path: Target, lora: Lora = None, placeholder: OwnPlaceholder = None,
    base: o.Base = "auto", device: o.Device = "auto", dtype: o.Dtype = "auto",
    vram: o.Vram = "auto", offline: o.Offline = False, accept_license: o.AcceptLicense = False,
    json: o.Json = False, quiet: o.Quiet = False, verbose: o.Verbose = 0,
) -> None:  # fmt: skip
    """Make a plain Stable Diffusion of a saved concept, for programs that know nothing of e4t.

    A folder is for diffusers and what reads its folders: the tuned model, with one more word in
    its vocabulary, which is the concept. FILE.safetensors is for programs that read checkpoints of
    Stable Diffusion 1.x: the tuned model, and the word in a second file, for their embeddings. With
    --lora it is a small file to be added to the base, which holds most of what was learned.

    The word's embedding is the same at every denoising step, where e4t predicts it anew at each.
    Who gets the model can draw the concept: share it as you would share the photo.
    """
    console = consoles.start(json=json, quiet=quiet, verbose=verbose)
    if not concept.is_file():
        shown = printable(str(concept))
        raise UsageError(f"there is no file {shown}", hint="make one: e4t personalize … --save")
    from e4t_cli.api import exporting

    with console.progress() as on_progress:
        made = exporting.export(
            concept, path, lora=lora, placeholder=placeholder, base=base, device=device,
            dtype=dtype, vram=vram, offline=offline, accept_license=console.consent(accept_license),
            on_progress=on_progress,
        )  # fmt: skip
    record: dict[str, str | float] = {
        "type": "model" if lora is None else "lora", "path": str(made.path), "token": made.token,
        "variation": round(made.variation, 4), "retained_energy": round(made.retained_energy, 4),
    }  # fmt: skip
    console.product(str(made.path), record)
    if lora is not None:
        console.note(f"rank {lora} holds {made.retained_energy:.0%} of what tuning changed")
    console.note(
        f"in prompts it is {printable(made.token)}; {made.variation:.0%} of the word changes with "
        "the noise level, and is left out"
    )
