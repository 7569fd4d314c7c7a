"""``e4t generate``: more pictures of a concept that was saved.

``e4t personalize``: one photo in, pictures of its subject out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from e4t_cli.cli import console as consoles
from e4t_cli.cli import options as o
from e4t_cli.cli.io import STDIN, PreparedSaver, Saver, gather_prompts, sampling_of
from e4t_cli.errors import UsageError, printable

GENERATE_EXAMPLES = """
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
    num_images: o.NumImages = 1, seed: o.Seed = None, placeholder: OwnPlaceholder = None,
    base: o.Base = "auto", steps: o.Steps = None, guidance: o.Guidance = None,
    scheduler: o.Scheduler = None, negative_prompt: o.NegativePrompt = None,
    concept_scale: o.ConceptScale = None,
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
    from e4t_cli.api import personalization as api

    saver = Saver(console, out, metadata=not no_metadata, grid=grid)
    with console.progress() as on_progress:
        result = api.generate(
            concept, wanted, num_images_per_prompt=num_images, seed=seed, base=base,
            sampling=sampling_of(
                steps=steps, guidance=guidance, scheduler=scheduler,
                negative_prompt=negative_prompt,
                concept_scale=concept_scale,
            ),
            placeholder=placeholder, device=device, dtype=dtype, vram=vram,
            safety_checker=not no_safety_checker, offline=offline,
            accept_license=console.consent(accept_license),
            on_progress=on_progress, on_image=saver.picture,
        )  # fmt: skip
    saver.rest(result)


EXAMPLES = """
Examples:\n
e4t personalize face me.jpg "S* as an astronaut" -n 4 --seed 7\n
e4t personalize cat tom.jpg -f prompts.txt --grid -o outputs/tom\n
curl -sL URL | e4t personalize face - "S* in the snow" --save me.e4t
"""

Save = Annotated[
    Path | None,
    typer.Option("--save", metavar="FILE.e4t", rich_help_panel=o.OUTPUT,
                 help="Keep the concept for `e4t generate`."),
]  # fmt: skip
SavePrepared = Annotated[
    Path | None,
    typer.Option("--save-prepared", metavar="FILE.png|DIR", rich_help_panel=o.PHOTO,
                 help="Save the cropped photo, and its mask in a second file; "
                      "without prompts that is all."),
]  # fmt: skip
KeepWeights = Annotated[
    bool,
    typer.Option("--keep-weights", rich_help_panel=o.OUTPUT,
                 help="Save the tuned weights too: a large file, drawn without tuning again."),
]  # fmt: skip
DryRun = Annotated[
    bool, typer.Option("--dry-run", rich_help_panel=o.OUTPUT, help="Check, say the plan, and end.")
]


def personalize(
    domain: o.DomainName, image: o.Photo, prompts: o.Prompts = None,
    prompts_file: o.PromptsFile = None, num_images: o.NumImages = 1, seed: o.Seed = None,
    placeholder: o.Placeholder = "S*", base: o.Base = "auto",
    steps: o.Steps = None, guidance: o.Guidance = None, scheduler: o.Scheduler = None,
    negative_prompt: o.NegativePrompt = None, concept_scale: o.ConceptScale = None,
    tuning: o.Tuning = None, tune_steps: o.TuneSteps = None,
    mask: o.Mask = "auto", face: o.Face = "largest", no_align: o.NoAlign = False,
    require_face: o.RequireFace = False, save_prepared: SavePrepared = None,
    device: o.Device = "auto", dtype: o.Dtype = "auto", offline: o.Offline = False,
    accept_license: o.AcceptLicense = False,
    vram: o.Vram = "auto", no_safety_checker: o.NoSafetyChecker = False,
    out: o.Out = Path("outputs"),
    grid: o.Grid = False, save: Save = None, keep_weights: KeepWeights = False,
    no_metadata: o.NoMetadata = False, dry_run: DryRun = False,
    json: o.Json = False, quiet: o.Quiet = False, verbose: o.Verbose = 0,
) -> None:  # fmt: skip
    """Learn a face, a cat, a style from one photo, and draw it as your prompts say.

    Saved paths go to stdout, one a line. A prompt that begins with a dash goes behind `--`.

    A face is somebody's. Use pictures of people only with their consent to what you want to make
    of them, and never to deceive, to shame or to undress anybody. The photo stays on this machine,
    but a concept saved with --save shows the person to whoever gets the file: share it as you
    would share the photo. Every picture carries a mark that says it was generated.
    """
    console = consoles.start(json=json, quiet=quiet, verbose=verbose)
    wanted = gather_prompts(
        prompts or [], prompts_file, placeholder=placeholder, stdin_taken=image == STDIN
    )
    if not wanted and save is None and save_prepared is None:
        raise UsageError("there is no prompt", hint='for example: "S* as an astronaut"')
    if keep_weights and save is None:
        raise UsageError("--keep-weights needs a file to keep them in", hint="add --save me.e4t")
    from e4t_cli.api import personalization as api
    from e4t_cli.api import preprocessing

    if dry_run:
        plan = api.plan(
            domain,
            image,
            wanted,
            num_images_per_prompt=num_images,
            base=base,
            device=device,
            dtype=dtype,
            offline=offline,
        )
        return console.details("plan", {**plan, "folder": str(out)})
    keep = None if save_prepared is None else PreparedSaver(console, save_prepared, image)
    photo = {"mask": mask, "align": not no_align, "face": face, "require_face": require_face}
    consent = console.consent(accept_license)
    if keep is not None and not wanted and save is None:
        with console.progress() as on_progress:
            prepared = preprocessing.prepare(
                domain, image, base=base, device=device, offline=offline, accept_license=consent,
                on_progress=on_progress, **photo,
            )  # fmt: skip
        return keep(prepared)
    saver = Saver(console, out, metadata=not no_metadata, grid=grid, concept=save)
    with console.progress() as on_progress:
        result = api.personalize(
            domain, image, wanted, num_images_per_prompt=num_images, seed=seed, base=base,
            tuning=tuning, tune_steps=tune_steps,
            sampling=sampling_of(
                steps=steps, guidance=guidance, scheduler=scheduler,
                negative_prompt=negative_prompt,
                concept_scale=concept_scale,
            ),
            **photo, placeholder=placeholder, keep_weights=keep_weights, device=device,
            dtype=dtype, offline=offline, accept_license=consent, vram=vram,
            safety_checker=not no_safety_checker, on_progress=on_progress,
            on_prepared=keep, on_image=saver.picture,
        )  # fmt: skip
    return saver.rest(result)
