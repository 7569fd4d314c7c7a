"""``e4t personalize`` and ``e4t generate``: images of a concept, from a photo or a saved one.

Each image is saved as soon as it is generated, and its path goes to stdout.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from e4t_cli.cli import options
from e4t_cli.cli.console import Console
from e4t_cli.cli.prompt_files import STDIN, gather_prompts
from e4t_cli.devices import peak_memory
from e4t_cli.errors import PartialResult, UsageError, printable
from e4t_cli.prompts import slug

if TYPE_CHECKING:
    from PIL.Image import Image

    from e4t_cli.images.results import GeneratedImage, Personalization
    from e4t_cli.registry.domain import PreparedImage


class PreparedSaver:
    """Saves a prepared image and, in a second file, its mask; prints both paths.

    Args:
        path: a folder, or the name of a PNG file that does not exist; the mask's file has "-mask" in its name.
        photo: as it was given on the command line; names the files in a folder.

    Raises:
        UsageError: the path cannot be written to, or exists.
    """

    def __init__(self, console: Console, path: Path, photo: str) -> None:
        from e4t_cli.images.results import check_folder

        self.console = console
        self.file = None if os.path.isdir(path) or not path.suffix else path
        self.folder = path if self.file is None else path.parent
        self.stem = f"{slug('photo' if photo == STDIN else Path(photo).stem, limit=40)}-prepared"
        if self.file is not None:
            if self.file.suffix.lower() != ".png":
                raise UsageError(f"{printable(str(path))} is not the name of a PNG file", hint="such as face.png")
            for file in (self.file, _mask_of(self.file)):
                _check_free(file)
        check_folder(self.folder)

    def __call__(self, prepared: PreparedImage) -> None:
        """Save the image and its mask."""
        image = self._write(self.file, self.stem, prepared.image)
        record = {"type": "prepared", "path": str(image)}
        if prepared.mask is None:
            return self.console.product(str(image), record)
        file = None if self.file is None else _mask_of(self.file)
        mask = self._write(file, _mask_of(image).stem, prepared.mask)
        self.console.product(str(image), {**record, "mask": str(mask)})
        return self.console.product(str(mask), {"type": "mask", "path": str(mask)})

    def _write(self, file: Path | None, stem: str, image: Image) -> Path:
        from e4t_cli.files import write_atomically
        from e4t_cli.images.results import write_new

        data = io.BytesIO()
        image.save(data, "PNG")
        if file is None:
            return write_new(self.folder, stem, data.getvalue())
        try:
            write_atomically(file, data.getvalue(), overwrite=False)
        except FileExistsError:
            _check_free(file)  # meanwhile it is taken
            raise
        return file


def _mask_of(file: Path) -> Path:
    return file.with_name(f"{file.stem}-mask{file.suffix}")


def _check_free(file: Path) -> None:
    if os.path.exists(file):
        raise UsageError(f"{printable(str(file))} exists and is not overwritten", hint="use another name")


class ImageSaver:
    """Saves the images, the contact sheet and the concept of one command; prints every path.

    Args:
        out: the folder; created now, so that a wrong one fails before tuning.
        metadata: whether prompts and settings go into the files.
        grid: whether there will be a contact sheet.
        concept: the concept's file, which must not exist; None saves none.

    Raises:
        UsageError: one of the paths cannot be written to.
    """

    def __init__(
        self, console: Console, out: Path, *, metadata: bool = True, grid: bool = False, concept: Path | None = None
    ) -> None:
        from e4t_cli.images.results import check_folder

        self.console, self.out = console, check_folder(out)
        self.metadata, self.grid, self.concept = metadata, grid, concept
        if concept is not None:
            _check_free(concept)
            check_folder(concept.parent)

    def save(self, image: GeneratedImage) -> None:
        """Save one image at once: a later interrupt does not lose it."""
        path = image.save(self.out, include_prompts=self.metadata)
        self.console.product(str(path), {"type": "image", "path": str(path), **image.record.as_dict()})

    def finish(self, result: Personalization) -> None:
        """Save the contact sheet and the concept, then report the seed and the time.

        Raises:
            PartialResult: the safety checker withheld images.
        """
        if self.grid and result.images:
            path = result.save_grid(self.out, include_prompts=self.metadata)
            self.console.product(str(path), {"type": "grid", "path": str(path)})
        if self.concept is not None:
            result.concept.save(self.concept)
            self.console.product(str(self.concept), {"type": "concept", "path": str(self.concept)})
        for record in result.withheld if self.console.json else ():
            self.console.product("", {"type": "withheld", **record.as_dict(include_prompts=self.metadata)})
        seconds = ", ".join(f"{k} {v:.1f}" for k, v in result.timings.as_dict().items() if v)
        self.console.note(f"seed {result.seed}; {result.timings.total:.1f} s: {seconds}")
        self.console.detail(f"peak memory {peak_memory() / 2**20:.0f} MB")
        if result.withheld:
            withheld, wanted = len(result.withheld), len(result.images) + len(result.withheld)
            message = f"the safety checker withheld {withheld} of {wanted} images"
            raise PartialResult(message, hint="try another --seed or prompt; --no-safety-checker if it is mistaken")


GENERATE_EXAMPLES = 'Example: e4t generate me.e4t "S* on the beach" "a pencil sketch of S*" -n 4 --grid'

Saved = Annotated[Path, typer.Argument(metavar="CONCEPT", help="A file made with `e4t personalize --save`.")]
Photo = Annotated[str, typer.Argument(metavar="IMAGE", help="The one photo: a file, or -.")]
OwnPlaceholder = Annotated[
    str | None, options.images_option(help="Another word for the concept; by default the one it was saved with.")
]


def check_concept(concept: Path) -> None:
    if not os.path.isfile(concept):
        raise UsageError(f"there is no file {printable(str(concept))}", hint="make one: e4t personalize … --save")


@options.grouped
def generate(
    concept: Saved, prompts: options.PromptFlags, sampling: options.SamplingFlags, run: options.GenerateFlags,
    output: options.OutputFlags, terminal: options.TerminalFlags, placeholder: OwnPlaceholder = None,
) -> None:  # fmt: skip
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
            concept, wanted, num_images_per_prompt=prompts.num_images, seed=prompts.seed, sampling=sampling.given(),
            placeholder=placeholder, **run.generate_keywords(console, on_progress, saver.save),
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
    from e4t_cli.api import personalization as api

    if output.dry_run:
        plan = api.plan(
            domain, image, wanted, num_images_per_prompt=prompts.num_images, placeholder=placeholder,
            tuning=run.tuning, tune_steps=run.tune_steps, **run.run_keywords(console),
        )  # fmt: skip
        return console.details("plan", {**plan, "folder": str(output.out)})
    prepared_saver = None if save_prepared is None else PreparedSaver(console, save_prepared, image)
    if prepared_saver and not wanted and save is None:
        with console.progress() as on_progress:
            keywords = run.run_keywords(console, on_progress)
            prepared = api.prepare(domain, image, **keywords, **run.photo_keywords())
        return prepared_saver(prepared)
    saver = ImageSaver(console, output.out, metadata=not output.no_metadata, grid=output.grid, concept=save)
    with console.progress() as on_progress:
        asked = run.generate_keywords(console, on_progress, saver.save)
        result = api.personalize(
            domain, image, wanted, num_images_per_prompt=prompts.num_images, seed=prompts.seed,
            sampling=sampling.given(), placeholder=placeholder, **run.personalize_keywords(asked, prepared_saver),
        )  # fmt: skip
    return saver.finish(result)
