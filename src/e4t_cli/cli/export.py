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
    from e4t_cli import api

    with console.progress() as on_progress:
        made = api.export(
            concept, path, lora=lora, placeholder=placeholder, base=base, device=device,
            dtype=dtype, vram=vram, offline=offline, accept_license=console.consent(accept_license),
            on_progress=on_progress,
        )  # fmt: skip
    record: dict[str, str | float] = {
        "type": "model" if lora is None else "lora", "path": str(made.path), "token": made.token,
        "variation": round(made.variation, 4), "kept": round(made.kept, 4),
    }  # fmt: skip
    console.product(str(made.path), record)
    if lora is not None:
        console.note(f"rank {lora} holds {made.kept:.0%} of what tuning changed")
    console.note(
        f"in prompts it is {printable(made.token)}; {made.variation:.0%} of the word changes with "
        "the noise level, and is left out"
    )
