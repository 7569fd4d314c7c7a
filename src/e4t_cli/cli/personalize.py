"""``e4t personalize`` and ``e4t generate``: images of a concept, from a photo or a saved one.

Prompts come from arguments, a file and stdin, and are checked before torch is imported. Each image is saved as soon as
it is generated, and its path goes to stdout.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from e4t_cli.cli import options
from e4t_cli.errors import InputError, UsageError, printable
from e4t_cli.prompts import PLACEHOLDER, parse_prompt

STDIN = "-"
MAX_FILE_BYTES = 4_000_000  # a list of prompts, not a book


def gather_prompts(
    arguments: Sequence[str], file: str | None, *, placeholder: str | None, stdin_taken: bool = False
) -> list[str]:
    """Return all prompts in the order given: arguments first, then the file's lines; ``-`` is stdin.

    Args:
        placeholder: the word that stands for the concept; None if only the concept's file knows.
        stdin_taken: the photo comes from stdin already.

    Raises:
        UsageError: two inputs want stdin, or a prompt does not name the concept.
        InputError: the file cannot be read as text.
    """
    if [*arguments, file].count(STDIN) + stdin_taken > 1:
        raise UsageError("only one input can be - (stdin)", hint="give the others as files")
    prompts = [line for one in arguments for line in (_lines(STDIN) if one == STDIN else [one])]
    prompts += _lines(file) if file is not None else []
    if placeholder is not None:
        try:
            for prompt in prompts:
                parse_prompt(prompt, placeholder or PLACEHOLDER)
        except UsageError as error:
            hint = _shell_hint(arguments, placeholder or PLACEHOLDER) or error.hint
            raise UsageError(error.message, hint=hint) from None
    return prompts


def _lines(source: str) -> list[str]:
    shown = "stdin" if source == STDIN else printable(source)
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if source == STDIN else Path(source).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise InputError(f"{shown} is longer than {MAX_FILE_BYTES // 10**6} MB of prompts")
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{shown} is not UTF-8 text: {error.reason}") from None
    except FileNotFoundError:
        raise UsageError(f"there is no file {shown}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{shown} cannot be read: {error}") from None
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise InputError(f"{shown} has no prompts; put one on each line")
    return found


def _shell_hint(arguments: Sequence[str], placeholder: str) -> str | None:
    """Return a hint for a prompt without quotes: the shell split it, and may have expanded ``S*``.

    ``e4t personalize face me.jpg S* as an astronaut`` arrives as single words, and in a folder with ``Screenshot.png``
    the shell puts that name where ``S*`` stood.
    """
    if any(os.path.exists(word) for word in arguments if 0 < len(word) < 256 and "\0" not in word):
        return (
            f'a file\'s name stands in place of a prompt: quote the prompt, as in "{placeholder} as an astronaut", '
            "so that the shell does not expand the *; or choose another word with --placeholder '<me>'"
        )
    if len(arguments) > 1 and all(len(word.split()) == 1 for word in arguments):
        first = placeholder if placeholder.casefold() != arguments[0].casefold() else arguments[0]
        words = [word for word in arguments if word.casefold() != placeholder.casefold()]
        return f'quote the prompt: "{printable(" ".join([first, *words]))}"'
    return None


GENERATE_EXAMPLES = """
Examples:\n
e4t generate me.e4t "S* on the beach" "a pencil sketch of S*" -n 4 --grid\n
e4t generate me.e4t --like outputs/me-s-on-the-beach-7.png --steps 40
"""

Saved = Annotated[Path, typer.Argument(metavar="CONCEPT", help="A file made with `e4t personalize --save`.")]
Photo = Annotated[str, typer.Argument(metavar="IMAGE", help="The one photo: a file, or -.")]
OwnPlaceholder = Annotated[
    str | None, options.images_option(help="Another word for the concept; by default the one it was saved with.")
]
Like = Annotated[str | None, options.images_option(
    metavar="PICTURE.png", help="Draw a picture of e4t again: its prompt, seed and settings, where they are not given."
)]  # fmt: skip


def check_concept(concept: Path) -> None:
    if not os.path.isfile(concept):
        raise UsageError(f"there is no file {printable(str(concept))}", hint="make one: e4t personalize … --save")


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
    check_concept(concept)
    wanted = gather_prompts(prompts.prompts or [], prompts.prompts_file, placeholder=placeholder)
    if not wanted and like is None:
        raise UsageError("there is no prompt", hint='for example: "S* as an astronaut"')
    seeds = prompts.seeds()
    from e4t_cli.api import personalization as api
    from e4t_cli.api.repetition import repeated
    from e4t_cli.cli.outputs import ImageSaver, Written
    from e4t_cli.images.loading import read_bytes
    from e4t_cli.images.png_metadata import read_records

    picture = None if like is None else read_bytes(like)
    records = [] if picture is None else read_records(picture)
    images = len(repeated(records, wanted, seeds, prompts.num_images)[0])
    saver = ImageSaver(console, Written(), output, images=images)
    with console.progress() as on_progress:
        result = api.generate(
            concept, wanted, like=picture, num_images_per_prompt=prompts.num_images, seed=seeds,
            sampling=sampling.given(), placeholder=placeholder,
            **run.generate_keywords(console, on_progress, saver.save),
        )  # fmt: skip
    saver.finish(result)


EXAMPLES = """
Examples:\n
e4t personalize face me.jpg "S* as an astronaut" -n 4 --seed 7\n
e4t personalize cat tom.jpg -f prompts.txt --grid -o outputs/tom\n
curl -sL URL | e4t personalize face - "S* in the snow" --save me.e4t
"""


@options.grouped
def personalize(
    domain: options.DomainName, image: Photo, prompts: options.PromptFlags, sampling: options.SamplingFlags,
    run: options.PersonalizeFlags, output: options.PersonalizeOutputFlags, terminal: options.TerminalFlags,
    placeholder: options.Placeholder = "S*",
) -> None:  # fmt: skip
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
    seeds = prompts.seeds()
    from e4t_cli.api import personalization as api
    from e4t_cli.api.resolve import resolve_seeds
    from e4t_cli.cli.outputs import ImageSaver, PreparedSaver, Written

    images = len(wanted) * len(resolve_seeds(seeds, prompts.num_images))
    written, create, prepared_saver = Written(), not output.dry_run, None
    if save_prepared is not None:
        prepared_saver = PreparedSaver(console, written, save_prepared, image, force=output.force, create=create)
    if prepared_saver and not output.dry_run and not wanted and save is None:
        with console.progress() as on_progress:
            keywords = run.run_keywords(console, on_progress)
            prepared = api.prepare(domain, image, **keywords, **run.photo_keywords())
        prepared_saver(prepared)
        return written.check()
    saver = ImageSaver(console, written, output, images=images, concept=save, create=create)
    if output.dry_run:
        plan = api.plan(
            domain, image, wanted, num_images_per_prompt=images // max(len(wanted), 1), placeholder=placeholder,
            tuning=run.tuning, tune_steps=run.tune_steps, **run.run_keywords(console),
        )  # fmt: skip
        return console.details("plan", {**plan, "folder": str(output.out)})
    with console.progress() as on_progress:
        asked = run.generate_keywords(console, on_progress, saver.save)
        result = api.personalize(
            domain, image, wanted, num_images_per_prompt=prompts.num_images, seed=seeds,
            sampling=sampling.given(), placeholder=placeholder,
            **run.personalize_keywords(asked, prepared_saver, saver.save_concept if save is not None else None),
        )  # fmt: skip
    return saver.finish(result)
