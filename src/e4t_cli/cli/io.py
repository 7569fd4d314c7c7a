"""Inputs and outputs of `personalize` and `generate`: prompts are read, images are saved.

Prompts come from arguments, a file and stdin, and are checked before torch is imported. Each image
is saved as soon as it is generated, and its path goes to stdout.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from e4t_cli.cli.console import Console
from e4t_cli.errors import InputError, PartialResult, UsageError, printable
from e4t_cli.prompts import PLACEHOLDER, parse_prompt, slug

if TYPE_CHECKING:
    from PIL.Image import Image

    from e4t_cli.images.results import GeneratedImage, Personalization
    from e4t_cli.registry.domain import PreparedImage

STDIN = "-"
MAX_FILE_BYTES = 4_000_000  # bytes; a list of prompts, not a book


def gather_prompts(
    arguments: Sequence[str], file: str | None, *, placeholder: str | None, stdin_taken: bool = False
) -> list[str]:
    """Return all prompts in the order given: arguments first, then the file's lines.

    Args:
        arguments: prompts as typed; ``-`` stands for the lines of stdin.
        file: ``-f``, a text file with one prompt a line, or ``-``.
        placeholder: the word that stands for the concept; None if only the concept's file knows.
        stdin_taken: the photo comes from stdin already.

    Raises:
        UsageError: two inputs want stdin, or a prompt does not name the concept.
        InputError: the file cannot be read as text.
    """
    if [*arguments, file].count(STDIN) + stdin_taken > 1:
        raise UsageError("only one input can be - (stdin)", hint="give the others as files")
    prompts: list[str] = []
    for argument in arguments:
        prompts += _lines(STDIN) if argument == STDIN else [argument]
    if file is not None:
        prompts += _lines(file)
    for prompt in prompts if placeholder is not None else ():
        try:
            parse_prompt(prompt, placeholder or PLACEHOLDER)
        except UsageError as error:
            hint = _shell_hint(arguments, placeholder or PLACEHOLDER) or error.hint
            raise UsageError(error.message, hint=hint) from None
    return prompts


def _lines(source: str) -> list[str]:
    shown = "stdin" if source == STDIN else printable(source)
    try:
        if source == STDIN:
            data = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        else:
            with Path(source).open("rb") as file:
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

    ``e4t personalize face me.jpg S* as an astronaut`` arrives as single words, and in a folder with
    ``Screenshot.png`` the shell puts that name where ``S*`` stood.
    """
    if any(Path(word).exists() for word in arguments if 0 < len(word) < 256 and "\0" not in word):
        return (
            f"a file's name stands in place of a prompt: quote the prompt, "
            f'as in "{placeholder} as an astronaut", so that the shell does not expand the *; '
            "or choose another word with --placeholder '<me>'"
        )
    if len(arguments) > 1 and all(len(word.split()) == 1 for word in arguments):
        first = placeholder if placeholder.casefold() != arguments[0].casefold() else arguments[0]
        words = [word for word in arguments if word.casefold() != placeholder.casefold()]
        return f'quote the prompt: "{printable(" ".join([first, *words]))}"'
    return None


class PreparedSaver:
    """Saves a prepared image and, in a second file, its mask; prints both paths.

    Args:
        console: of the running command.
        path: a folder, or the name of a PNG file that does not exist; the mask's file has "-mask" in its name.
        photo: as it was given on the command line; names the files in a folder.

    Raises:
        UsageError: the path cannot be written to, or exists.
    """

    def __init__(self, console: Console, path: Path, photo: str) -> None:
        from e4t_cli.images.results import check_folder

        self.console = console
        name = "photo" if photo == STDIN else Path(photo).stem
        self.file = None if path.is_dir() or not path.suffix else path
        self.folder = path if self.file is None else path.parent
        self.stem = f"{slug(name, limit=40)}-prepared"
        if self.file is not None:
            if self.file.suffix.lower() != ".png":
                shown = printable(str(path))
                raise UsageError(f"{shown} is not the name of a PNG file", hint="such as face.png")
            for taken in (self.file, _mask_of(self.file)):
                if taken.exists():
                    shown = printable(str(taken))
                    raise UsageError(f"{shown} exists and is not overwritten", hint="another name")
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
            shown = printable(str(file))
            raise UsageError(f"{shown} exists and is not overwritten", hint="another name") from None
        return file


def _mask_of(file: Path) -> Path:
    return file.with_name(f"{file.stem}-mask{file.suffix}")


class ImageSaver:
    """Saves the images, the contact sheet and the concept of one command; prints every path.

    Args:
        console: of the running command.
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
            if concept.exists():
                shown = printable(str(concept))
                raise UsageError(f"{shown} exists and is not overwritten", hint="use another name")
            check_folder(concept.parent)

    def save(self, image: GeneratedImage) -> None:
        """Save one image at once: a later interrupt does not lose it."""
        path = image.save(self.out, include_prompts=self.metadata)
        details = image.record.as_dict()
        self.console.product(str(path), {"type": "image", "path": str(path), **details})

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
            record = {"type": "concept", "path": str(self.concept)}
            self.console.product(str(self.concept), record)
        for withheld in result.withheld if self.console.json else ():
            details = withheld.as_dict(include_prompts=self.metadata)
            self.console.product("", {"type": "withheld", **details})
        seconds = ", ".join(f"{k} {v:.1f}" for k, v in result.timings.as_dict().items() if v)
        self.console.note(f"seed {result.seed}; {result.timings.total:.1f} s: {seconds}")
        self.console.detail(f"peak memory {_peak_megabytes():.0f} MB")
        if result.withheld:
            wanted = len(result.images) + len(result.withheld)
            raise PartialResult(
                f"the safety checker withheld {len(result.withheld)} of {wanted} images",
                hint="try another --seed or prompt; --no-safety-checker if it is mistaken",
            )


def _peak_megabytes() -> float:
    try:
        import resource
    except ImportError:  # Windows has no such count
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024
