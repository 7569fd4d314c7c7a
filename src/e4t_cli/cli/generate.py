"""``e4t generate``: more pictures of a concept that was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from e4t_cli.cli import console as consoles
from e4t_cli.cli import options as o
from e4t_cli.cli.inputs import gather_prompts, sampling_of
from e4t_cli.cli.pictures import Saver
from e4t_cli.errors import UsageError, printable

EXAMPLES = """
Example: e4t generate me.e4t "S* on the beach" "a pencil sketch of S*" -n 4 --grid
"""

Saved = Annotated[
    Path, typer.Argument(metavar="CONCEPT", help="A file made with `e4t personalize --save`.")
]
OwnPlaceholder = Annotated[
    str | None,
    typer.Option("--placeholder", rich_help_panel=o.PICTURES,
                 help="Another word for the concept; by default the one it was saved with."),
]  # fmt: skip


def generate(
    concept: Saved, prompts: o.Prompts = None, prompts_file: o.PromptsFile = None,
    number: o.Number = 1, seed: o.Seed = None, placeholder: OwnPlaceholder = None,
    base: o.Base = "auto", steps: o.Steps = None, guidance: o.Guidance = None,
    scheduler: o.Scheduler = None, negative: o.Negative = None, strength: o.Strength = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto", offline: o.Offline = False, accept_license: o.AcceptLicense = False,
    vram: o.Vram = "auto", no_safety_checker: o.NoSafetyChecker = False,
    out: o.Out = Path("outputs"), grid: o.Grid = False,
    no_metadata: o.NoMetadata = False, json: o.Json = False, quiet: o.Quiet = False,
    verbose: o.Verbose = 0,
) -> None:  # fmt: skip
    """Draw a saved concept again, as your prompts say.

    The concept is tuned again to the same bits, in seconds, unless it was saved with its weights.
    Saved paths go to stdout, one a line.
    """
    console = consoles.start(json=json, quiet=quiet, verbose=verbose)
    if not concept.is_file():
        shown = printable(str(concept))
        raise UsageError(f"there is no file {shown}", hint="make one: e4t personalize … --save")
    wanted = gather_prompts(prompts or [], prompts_file, placeholder=placeholder)
    if not wanted:
        raise UsageError("there is no prompt", hint='for example: "S* as an astronaut"')
    from e4t_cli import api

    saver = Saver(console, out, metadata=not no_metadata, grid=grid)
    with console.progress() as on_progress:
        result = api.generate(
            concept, wanted, images_per_prompt=number, seed=seed, base=base,
            sampling=sampling_of(
                steps=steps, guidance=guidance, scheduler=scheduler, negative=negative,
                strength=strength,
            ),
            placeholder=placeholder, device=device, dtype=dtype, vram=vram,
            safety_checker=not no_safety_checker, offline=offline,
            accept_license=console.consent(accept_license),
            on_progress=on_progress, on_image=saver.picture,
        )  # fmt: skip
    saver.rest(result)
