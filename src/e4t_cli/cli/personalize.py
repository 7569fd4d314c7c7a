"""``e4t personalize`` and ``e4t generate``: images of a concept, from a photo or a saved one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from e4t_cli.cli import options
from e4t_cli.cli.io import STDIN, ImageSaver, PreparedSaver, gather_prompts
from e4t_cli.errors import UsageError, printable

GENERATE_EXAMPLES = """
Example: e4t generate me.e4t "S* on the beach" "a pencil sketch of S*" -n 4 --grid
"""

Saved = Annotated[Path, typer.Argument(metavar="CONCEPT", help="A file made with `e4t personalize --save`.")]
Photo = Annotated[str, typer.Argument(metavar="IMAGE", help="The one photo: a file, or -.")]
OwnPlaceholder = Annotated[
    str | None,
    typer.Option("--placeholder", rich_help_panel=options.IMAGES,
                 help="Another word for the concept; by default the one it was saved with."),
]  # fmt: skip


def check_concept(concept: Path) -> None:
    """Raise `UsageError` if there is no such file."""
    if not concept.is_file():
        shown = printable(str(concept))
        raise UsageError(f"there is no file {shown}", hint="make one: e4t personalize … --save")


@options.grouped
def generate(
    concept: Saved,
    prompts: options.PromptFlags,
    sampling: options.SamplingFlags,
    run: options.GenerateFlags,
    output: options.OutputFlags,
    terminal: options.TerminalFlags,
    placeholder: OwnPlaceholder = None,
) -> None:
    """Generate images of a saved concept.

    The concept is tuned again to the same bits, in seconds, unless it was saved with its weights.
    Saved paths go to stdout, one a line.
    """
    console = terminal.start()
    check_concept(concept)
    wanted = gather_prompts(prompts.prompts or [], prompts.prompts_file, placeholder=placeholder)
    if not wanted:
        raise UsageError("there is no prompt", hint='for example: "S* as an astronaut"')
    from e4t_cli.api import personalization as api

    saver = ImageSaver(console, output.out, metadata=not output.no_metadata, grid=output.grid)
    with console.progress() as on_progress:
        result = api.generate(
            concept,
            wanted,
            num_images_per_prompt=prompts.num_images,
            seed=prompts.seed,
            sampling=sampling.given(),
            placeholder=placeholder,
            **run.generate_keywords(console, on_progress, saver.save),
        )
    saver.finish(result)


EXAMPLES = """
Examples:\n
e4t personalize face me.jpg "S* as an astronaut" -n 4 --seed 7\n
e4t personalize cat tom.jpg -f prompts.txt --grid -o outputs/tom\n
curl -sL URL | e4t personalize face - "S* in the snow" --save me.e4t
"""


@options.grouped
def personalize(
    domain: options.DomainName,
    image: Photo,
    prompts: options.PromptFlags,
    sampling: options.SamplingFlags,
    run: options.PersonalizeFlags,
    output: options.PersonalizeOutputFlags,
    terminal: options.TerminalFlags,
    placeholder: options.Placeholder = "S*",
) -> None:
    """Learn a face, a cat, a style from one photo, and generate images of it.

    Saved paths go to stdout, one a line. A prompt that begins with a dash goes behind `--`.

    A face is somebody's. Use photos of people only with their consent to what you want to make
    of them, and never to deceive, to shame or to undress anybody. The photo stays on this machine,
    but a concept saved with --save shows the person to whoever gets the file: share it as you
    would share the photo. Every image carries a mark that says it was generated.
    """
    console = terminal.start()
    wanted = gather_prompts(
        prompts.prompts or [], prompts.prompts_file, placeholder=placeholder, stdin_taken=image == STDIN
    )
    save, save_prepared = output.save, output.save_prepared
    if not wanted and save is None and save_prepared is None:
        raise UsageError("there is no prompt", hint='for example: "S* as an astronaut"')
    if run.keep_weights and save is None:
        raise UsageError("--keep-weights needs a file to keep them in", hint="add --save me.e4t")
    from e4t_cli.api import personalization as api

    if output.dry_run:
        plan = api.plan(
            domain,
            image,
            wanted,
            num_images_per_prompt=prompts.num_images,
            placeholder=placeholder,
            **run.run_keywords(console),
        )
        return console.details("plan", {**plan, "folder": str(output.out)})
    prepared_saver = None if save_prepared is None else PreparedSaver(console, save_prepared, image)
    if prepared_saver and not wanted and save is None:
        with console.progress() as on_progress:
            asked = run.run_keywords(console, on_progress)
            prepared = api.prepare(domain, image, **asked, **run.photo_keywords())
        return prepared_saver(prepared)
    saver = ImageSaver(console, output.out, metadata=not output.no_metadata, grid=output.grid, concept=save)
    with console.progress() as on_progress:
        keywords = run.generate_keywords(console, on_progress, saver.save)
        result = api.personalize(
            domain,
            image,
            wanted,
            num_images_per_prompt=prompts.num_images,
            seed=prompts.seed,
            sampling=sampling.given(),
            placeholder=placeholder,
            **run.personalize_keywords(keywords, prepared_saver),
        )
    return saver.finish(result)
