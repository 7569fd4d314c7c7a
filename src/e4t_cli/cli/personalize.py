"""``e4t personalize`` and ``e4t generate``: images of a concept, from a photo or a saved one.

Each image is saved as soon as it is generated, and its path goes to stdout.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from e4t_cli.cli import options
from e4t_cli.cli.photo_arguments import split_arguments
from e4t_cli.cli.plans import print_plan
from e4t_cli.cli.prompt_files import STDIN, gather_prompts
from e4t_cli.errors import UsageError, printable
from e4t_cli.prompts import PLACEHOLDER

GENERATE_EXAMPLES = """
Examples:\n
e4t generate me.e4t "S* on the beach" "a pencil sketch of S*" -n 4 --grid\n
e4t generate me.e4t --like outputs/me-s-on-the-beach-7.png --steps 40
"""

Saved = Annotated[Path, typer.Argument(metavar="CONCEPT", help="A file of `e4t personalize … --save`.")]
Photo = Annotated[str, typer.Argument(
    metavar="IMAGE", help="The photo: a file, or - for stdin. More of the same subject: before --."
)]  # fmt: skip
MorePhotos = Annotated[list[str] | None, options.photo_option(
    "--image", metavar="FILE", help="Another photo of the same subject; several if repeated."
)]  # fmt: skip
OwnPlaceholder = Annotated[
    str | None, options.images_option(metavar="WORD", help="What prompts call it, such as '<me>'.")
]
Like = Annotated[str | None, options.images_option(
    metavar="PICTURE", help="Draw this picture of e4t again; other options stand in place of what it records."
)]  # fmt: skip


def check_concept(concept: Path) -> None:
    """Raise an error if there is no such concept, before torch is imported."""
    from e4t_cli.formats import recognition

    if not os.path.isfile(concept):
        shown = printable(str(concept))
        message = f"{shown} is a folder or a pipe" if os.path.exists(concept) else f"there is no file {shown}"
        raise UsageError(message, hint="make a concept: e4t personalize … --save me.e4t")
    recognition.check_concept(concept)


@options.grouped
def generate(
    concept: Saved, prompts: options.PromptFlags, sampling: options.SamplingFlags, run: options.GenerateFlags,
    output: options.OutputFlags, terminal: options.TerminalFlags, placeholder: OwnPlaceholder = None,
    like: Like = None,
) -> None:  # fmt: skip
    """Generate images of a saved concept.

    The concept is tuned again to the same bits, in seconds, unless it was saved with its weights.
    Saved paths go to stdout, one a line.
    """
    console = terminal.start()
    wanted = gather_prompts(
        prompts.prompts or [], prompts.prompts_file, placeholder=placeholder, stdin_taken=int(like == STDIN)
    )
    if not wanted and like is None:
        raise UsageError("there is no prompt", hint='for example: "S* as an astronaut"')
    seeds, count = prompts.seeds(), prompts.num_images
    from e4t_cli.api import personalization as api
    from e4t_cli.api.plans import plan_generation
    from e4t_cli.api.repetition import repeated
    from e4t_cli.api.requests import count_images
    from e4t_cli.cli.outputs import ImageSaver, Written
    from e4t_cli.images.loading import read_bytes
    from e4t_cli.images.png_metadata import read_records

    picture = None if like is None else read_bytes(like)
    images = count_images(wanted, seeds, count)
    if picture is not None:
        images = count_images(*repeated(read_records(picture), wanted, seeds, count, None)[:2], count)
    check_concept(concept)
    saver = ImageSaver(console, Written(), output, images=images, create=not output.dry_run)
    if output.dry_run:
        plan = plan_generation(
            concept, wanted, like=picture, num_images_per_prompt=count, seed=seeds,
            sampling=sampling.given(), placeholder=placeholder, **run.generate_keywords(console),
        )  # fmt: skip
        return print_plan(console, plan, output.out)
    with console.progress() as on_progress:
        result = api.generate(
            concept, wanted, like=picture, num_images_per_prompt=count, seed=seeds,
            sampling=sampling.given(), placeholder=placeholder,
            **run.generate_keywords(console, on_progress, saver.save),
        )  # fmt: skip
    return saver.finish(result)


EXAMPLES = """
Examples:\n
e4t personalize face me.jpg "S* as an astronaut" -n 4 --seed 7\n
e4t personalize face a.jpg b.jpg c.jpg -- "S* on the beach"\n
e4t personalize cat tom.jpg -f prompts.txt --grid -o outputs/tom\n
curl -sL URL | e4t personalize face - "S* in the snow" --save me.e4t
"""


@options.grouped
def personalize(
    context: typer.Context, domain: options.DomainName, image: Photo, prompts: options.PromptFlags,
    sampling: options.SamplingFlags, run: options.PersonalizeFlags, output: options.PersonalizeOutputFlags,
    terminal: options.TerminalFlags, placeholder: options.Placeholder = "S*", images: MorePhotos = None,
) -> None:  # fmt: skip
    """Learn a face, a cat or a style from one photo, or several of it, and generate images of it.

    Saved paths go to stdout, one a line. With `--`, what comes before it are photos of one subject, and what comes
    after it prompts, also those that begin with a dash.

    Use photos of people only with their consent to what you want to make of them, and never to
    deceive, to shame or to undress anybody. The photo stays on this machine, but a concept saved
    with --save shows the person to whoever gets the file: share it as you would share the photo.
    Every image has a mark that says it was generated.
    """
    console = terminal.start()
    if "." in domain and os.path.isfile(domain):  # no name of a domain has a dot
        example = f'for example: e4t personalize face {printable(domain)} "S* as an astronaut"'
        raise UsageError(f"{printable(domain)} is a file; the domain comes before it", hint=example)
    photos, texts = split_arguments(
        context, image, prompts.prompts or [], images=images or [], placeholder=placeholder or PLACEHOLDER
    )
    taken = [*photos, *(run.mask or ())].count(STDIN)
    wanted = gather_prompts(texts, prompts.prompts_file, placeholder=placeholder, stdin_taken=taken)
    save, save_prepared = output.save, output.save_prepared
    if not wanted and save is None and save_prepared is None:
        raise UsageError("there is no prompt", hint='for example: "S* as an astronaut"')
    if run.keep_weights and save is None:
        raise UsageError("--keep-weights needs a file to keep them in", hint="add --save me.e4t")
    seeds, count = prompts.seeds(), prompts.num_images
    from e4t_cli.api import personalization as api
    from e4t_cli.api.plans import plan_personalization, plan_preparation
    from e4t_cli.api.requests import count_images
    from e4t_cli.cli.outputs import ImageSaver, PreparedSaver, Written, check_distinct

    number = count_images(wanted, seeds, count)
    check_distinct(output, photos=len(photos))
    written, create, prepared_saver = Written(), not output.dry_run, None
    if save_prepared is not None:
        prepared_saver = PreparedSaver(console, written, save_prepared, photos, force=output.force, create=create)
    if prepared_saver and save_prepared is not None and not wanted and save is None:
        if output.dry_run:
            plan = plan_preparation(domain, photos, **run.run_keywords(console), **run.photo_keywords())
            return print_plan(console, plan, save_prepared)
        with console.progress() as on_progress:
            keywords = run.run_keywords(console, on_progress)
            prepared = api.prepare_all(domain, photos, **keywords, **run.photo_keywords())
        for one in prepared:
            prepared_saver(one)
        return written.check()
    saver = ImageSaver(console, written, output, images=number, concept=save, create=create)
    if output.dry_run:
        plan = plan_personalization(
            domain, photos, wanted, num_images_per_prompt=count, seed=seeds,
            sampling=sampling.given(), placeholder=placeholder,
            **run.personalize_keywords(run.generate_keywords(console), None, None),
        )  # fmt: skip
        return print_plan(console, plan, output.out)
    with console.progress() as on_progress:
        asked = run.generate_keywords(console, on_progress, saver.save)
        result = api.personalize(
            domain, photos, wanted, num_images_per_prompt=count, seed=seeds,
            sampling=sampling.given(), placeholder=placeholder,
            **run.personalize_keywords(asked, prepared_saver, saver.save_concept if save is not None else None),
        )  # fmt: skip
    return saver.finish(result)
