"""Files that `personalize` and `generate` write: the images, the contact sheet, the concept, the prepared image.

Paths are checked before the work. Nothing is lost at the end: where somebody else has taken a name meanwhile, the file
is written under the next free one, and the command ends with code 2.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from e4t_cli.cli.console import Console
from e4t_cli.cli.options import OutputFlags, PersonalizeOutputFlags
from e4t_cli.devices import peak_memory
from e4t_cli.errors import E4TError, PartialResult, UsageError, printable
from e4t_cli.files import write_atomically
from e4t_cli.formats.recognition import recognize, todays_names
from e4t_cli.images.png_metadata import png_bytes, read_metadata
from e4t_cli.images.results import check_folder, free_names, write_free, write_new
from e4t_cli.prompts import slug

if TYPE_CHECKING:
    from e4t_cli.formats.concept import Concept
    from e4t_cli.images.results import GeneratedImage, Personalization
    from e4t_cli.registry.domain import PreparedImage

# Of files that `-o` cannot be: a folder of such a name is a slip.
OTHER_FORMATS = {".jpg", ".jpeg", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".e4t", ".safetensors"}


def is_concept(path: Path) -> bool:
    """Whether a file is a concept, by its header."""
    try:
        return recognize(path).type == "concept"
    except E4TError:
        return False


def is_own_picture(path: Path) -> bool:
    """Whether a file is a PNG that e4t wrote."""
    try:
        return read_metadata(path.read_bytes()).by_e4t
    except (OSError, E4TError):
        return False


@dataclass(frozen=True)
class UserFile:
    """A file that the user named.

    Args:
        force: whether it may replace what e4t wrote there before.
        is_own: whether an existing file is that; a concept for a concept, a picture for a picture.
    """

    path: Path
    force: bool
    is_own: Callable[[Path], bool]

    def check(self, *, create: bool) -> None:
        """Raise UsageError if the file cannot be written there; `create` makes its folder."""
        shown = printable(str(self.path))
        if os.path.isdir(self.path):
            raise UsageError(f"{shown} is a folder", hint="give the name of a file")
        if os.path.lexists(self.path) and not self.replaceable:
            own = os.path.isfile(self.path) and self.is_own(self.path)
            what = "concept" if self.is_own is is_concept else "picture of e4t"
            reason = f"is no {what} and is not replaced" if self.force else "exists and is not overwritten"
            raise UsageError(f"{shown} {reason}", hint="--force replaces it" if own else "use another name")
        check_folder(self.path.parent, create=create)

    @property
    def replaceable(self) -> bool:
        """Whether a file that exists may be replaced."""
        return self.force and os.path.isfile(self.path) and self.is_own(self.path)

    def write(self, save: Callable[[Path, bool], None]) -> Path:
        """Write the file with `save(path, overwrite)`, under a free name if this one is taken; returns the path."""
        replaceable = self.replaceable
        return write_free(self.path, lambda path: save(path, replaceable and path == self.path))

    def write_bytes(self, data: bytes) -> Path:
        """Write bytes as `write`."""
        return self.write(lambda path, overwrite: write_atomically(path, data, overwrite=overwrite))


@dataclass
class Written:
    """The names that were taken, and what was written instead."""

    elsewhere: list[str] = field(default_factory=list)

    def note(self, wanted: Path, path: Path) -> Path:
        """Remember a file that did not get its name."""
        if path != wanted:
            self.elsewhere.append(f"{printable(str(path))}, because {printable(str(wanted))} appeared meanwhile")
        return path

    def check(self) -> None:
        """Raise UsageError if a file did not get its name."""
        if self.elsewhere:
            raise UsageError(f"saved as {'; as '.join(self.elsewhere)}", hint="--force replaces what e4t wrote")


def check_distinct(output: PersonalizeOutputFlags, *, photos: int = 1) -> None:
    """Raise UsageError if two outputs have one name, or one is a file in whose place another needs a folder.

    Args:
        photos: how many `--save-prepared` is for.
    """
    prepared = output.save_prepared
    named: list[tuple[str, Path | None, bool]] = [("-o", output.out, _names_file(output.out))]
    named += [("--save", output.save, True)]
    if prepared is not None:
        is_file = bool(prepared.suffix) and not os.path.isdir(prepared)
        files = itertools.islice(free_names(prepared), photos if is_file else 1)
        for path in files:
            named += [("--save-prepared", path, is_file)]
            named += [("the mask of --save-prepared", _mask_of(path), True)] if is_file else []
    places = [(option, Path(os.path.abspath(path)), is_file) for option, path, is_file in named if path is not None]
    for (one, first, is_file), (other, second, also_file) in itertools.combinations(places, 2):
        same = first == second and (is_file or also_file)
        if same or (is_file and first in second.parents) or (also_file and second in first.parents):
            place = printable(min(first, second, key=lambda path: len(path.parts)).name)
            raise UsageError(f"{one} and {other} have the same name, {place}", hint="give each a name of its own")


class PreparedSaver:
    """Saves prepared images and, in a second file each, their masks; prints the paths.

    Args:
        path: a folder, where files have the photos' names; or the name of a PNG file, the second photo's with "-2".
            A mask's file has "-mask" in its name.
        photos: as they were given on the command line.
        force: replace what e4t wrote there before.
        create: make the folder now.

    Raises:
        UsageError: the path cannot be written to, or exists.
    """

    def __init__(
        self, console: Console, written: Written, path: Path, photos: Sequence[str], *, force: bool, create: bool
    ) -> None:
        self.console, self.written, self.force = console, written, force
        self.file = None if os.path.isdir(path) or not path.suffix else path
        self.folder = path if self.file is None else path.parent
        if self.file is not None:
            if self.file.suffix.lower() != ".png":
                raise UsageError(f"{printable(str(path))} is not the name of a PNG file", hint="such as face.png")
            for file in itertools.islice(free_names(self.file), len(photos)):
                for one in (file, _mask_of(file)):
                    self._user_file(one).check(create=create)
            self.names = free_names(self.file)
        else:
            check_folder(self.folder, create=create)

    def __call__(self, prepared: PreparedImage) -> None:
        """Save an image and its mask."""
        data = png_bytes(prepared.image, None)
        if self.file is None:
            image = write_new(self.folder, f"{slug(prepared.name or 'photo', limit=40)}-prepared", data)
        else:
            image = self._write(next(self.names), data)
        record = {"type": "prepared", "path": str(image)}
        mask_file = self._user_file(_mask_of(image))
        if prepared.mask is None:
            if mask_file.replaceable:  # of the picture that was replaced
                os.unlink(mask_file.path)
            return self.console.product(str(image), record)
        data = png_bytes(prepared.mask, None)
        if self.file is None:
            mask = write_new(self.folder, mask_file.path.stem, data)
        else:
            mask = self._write(mask_file.path, data)
        self.console.product(str(image), {**record, "mask": str(mask)})
        return self.console.product(str(mask), {"type": "mask", "path": str(mask)})

    def _user_file(self, path: Path) -> UserFile:
        return UserFile(path, self.force and self.file is not None, is_own_picture)

    def _write(self, file: Path, data: bytes) -> Path:
        return self.written.note(file, self._user_file(file).write_bytes(data))


def _mask_of(file: Path) -> Path:
    return file.with_name(f"{file.stem}-mask{file.suffix}")


class ImageSaver:
    """Saves the images, the contact sheet and the concept of one command; prints every path.

    Args:
        output: a folder, or the name of a PNG file for one image.
        images: how many there will be.
        concept: the concept's file; None saves none.
        create: make the folders now, so that a wrong one fails before tuning.

    Raises:
        UsageError: one of the paths cannot be written to.
    """

    def __init__(
        self, console: Console, written: Written, output: OutputFlags,
        *, images: int, concept: Path | None = None, create: bool = True,
    ) -> None:  # fmt: skip
        self.console, self.written, self.output = console, written, output
        self.metadata, self.name = not output.no_metadata, output.name
        out, suffix = output.out, output.out.suffix.lower()
        self.file = UserFile(out, output.force, is_own_picture) if _names_file(out) else None
        self.concept = None if concept is None else UserFile(concept, output.force, is_concept)
        if self.file is not None:
            shown = printable(str(out))
            if suffix != ".png":
                raise UsageError(f"pictures are PNG files, not {suffix}", hint=f"-o {printable(out.stem)}.png")
            if images != 1 or output.grid or self.name is not None:
                asked = "a contact sheet" if output.grid else "--name" if images == 1 else f"{images} pictures"
                raise UsageError(f"{shown} is the name of one picture, for {asked} give a folder", hint="-o FOLDER")
            self.file.check(create=create)
        else:
            check_folder(out, create=create)
        if self.concept is not None:
            self.concept.check(create=create)

    def save_concept(self, concept: Concept) -> None:
        """Save the concept, before the first image."""
        assert self.concept is not None
        path = self.concept.write(lambda path, overwrite: concept.save(path, overwrite=overwrite))
        self.written.note(self.concept.path, path)
        self.console.product(str(path), {"type": "concept", "path": str(path)})

    def save(self, image: GeneratedImage) -> None:
        """Save one image at once: a later interrupt does not lose it."""
        if self.file is None:
            path = image.save(self.output.out, name=self.name, metadata=self.metadata)
        else:
            path = self.file.write_bytes(png_bytes(image.image, image.record, metadata=self.metadata))
            self.written.note(self.file.path, path)
        self.console.product(str(path), {"type": "image", "path": str(path), **todays_names(image.record.as_dict())})

    def finish(self, result: Personalization) -> None:
        """Save the contact sheet, then report the seed and the time.

        Raises:
            PartialResult: the safety checker withheld images.
            UsageError: a file did not get the name that was asked for.
        """
        if self.output.grid and result.images:
            path = result.save_grid(self.output.out, name=self.name, metadata=self.metadata)
            self.console.product(str(path), {"type": "grid", "path": str(path)})
        for record in result.withheld if self.console.json else ():
            self.console.product("", {"type": "withheld", **todays_names(record.as_dict())})
        seconds = ", ".join(f"{k} {v:.1f}" for k, v in result.timings.as_dict().items() if v)
        self.console.note(f"seed {result.seed}; {result.timings.total:.1f} s: {seconds}")
        self.console.detail(f"peak memory {peak_memory() / 2**20:.0f} MB")
        self.written.check()
        if result.withheld:
            withheld, wanted = len(result.withheld), len(result.images) + len(result.withheld)
            message = f"the safety checker withheld {withheld} of {wanted} images"
            raise PartialResult(message, hint="try another --seed or prompt; --no-safety-checker if it is mistaken")


def _names_file(out: Path) -> bool:
    """Whether `-o` is the name of a picture: an existing folder is one, whatever its name."""
    return out.suffix.lower() in {".png", *OTHER_FORMATS} and not os.path.isdir(out)
