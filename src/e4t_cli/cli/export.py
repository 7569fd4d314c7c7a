"""``e4t export``: a concept for programs that know nothing of this one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from e4t_cli.cli import console as consoles
from e4t_cli.cli import options as o
from e4t_cli.cli.generate import OwnPlaceholder, Saved
from e4t_cli.errors import UsageError, printable

EXAMPLES = """
Examples:\n
e4t export me.e4t ./me-model\n
e4t export me.e4t ./me.safetensors
"""

Target = Annotated[
    Path,
    typer.Argument(metavar="FOLDER|FILE.safetensors", help="Where to; it must not exist."),
]


def export(
    concept: Saved, path: Target, placeholder: OwnPlaceholder = None, base: o.Base = "auto",
    device: o.Device = "auto", dtype: o.Dtype = "auto", vram: o.Vram = "auto",
    offline: o.Offline = False, accept_license: o.AcceptLicense = False, json: o.Json = False,
    quiet: o.Quiet = False, verbose: o.Verbose = 0,
) -> None:  # fmt: skip
    """Make a plain Stable Diffusion of a saved concept, for programs that know nothing of e4t.

    A folder is for diffusers and what reads its folders: the tuned model, with one more word in
    its vocabulary, which is the concept. FILE.safetensors is for programs that read checkpoints of
    Stable Diffusion 1.x: the tuned model, and the word in a second file, for their embeddings.

    The word's embedding is the same at every denoising step, where e4t predicts it anew at each.
    Who gets the model can draw the concept: share it as you would share the photo.
    """
    console = consoles.start(json=json, quiet=quiet, verbose=verbose)
    if not concept.is_file():
        shown = printable(str(concept))
        raise UsageError(f"there is no file {shown}", hint="make one: e4t personalize … --save")
    from e4t_cli import api

    with console.progress() as on_progress:
        made = api.export(
            concept, path, placeholder=placeholder, base=base, device=device, dtype=dtype,
            vram=vram, offline=offline, accept_license=console.consent(accept_license),
            on_progress=on_progress,
        )  # fmt: skip
    record = {"type": "model", "path": str(made.path), "token": made.token}
    console.product(str(made.path), {**record, "variation": round(made.variation, 4)})
    console.note(
        f"in prompts it is {printable(made.token)}; {made.variation:.0%} of the word changes with "
        "the noise level, and is left out"
    )
