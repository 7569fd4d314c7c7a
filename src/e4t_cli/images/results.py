"""Results: generated images with their records, contact sheets, and files under free names."""

from __future__ import annotations

import errno
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from e4t_cli.errors import UsageError, printable
from e4t_cli.files import file_error, write_atomically
from e4t_cli.images.png_metadata import GenerationRecord, png_bytes
from e4t_cli.prompts import slug
from e4t_cli.temporary import leftovers, remove

if TYPE_CHECKING:
    from e4t_cli.formats.concept import Concept


def check_folder(folder: str | os.PathLike[str], *, create: bool = True) -> Path:
    """Make the folder for results, before the work, and remove from it what killed runs left.

    Args:
        create: False only checks whether it could be made.

    Raises:
        E4TError: as of `file_error`.
    """
    path = there = Path(folder)
    try:
        while not os.path.lexists(there) and there != there.parent:
            there = there.parent
        os.stat(os.path.join(there, "."))  # NotADirectoryError, or a link to nowhere
        if create:
            path.mkdir(parents=True, exist_ok=True)
    except NotADirectoryError as error:
        raise file_error(FileExistsError(errno.EEXIST, ""), there) from error
    except (OSError, ValueError) as error:
        raise file_error(error, path) from error
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"the folder {printable(str(there))} cannot be written to")
    for left in leftovers(path) if create else ():
        remove(left)
    return path


def free_names(path: Path) -> Iterator[Path]:
    """Yield `name.png`, `name-2.png`, `name-3.png`, …"""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def write_free(path: Path, write: Callable[[Path], None]) -> Path:
    """Write a file under the first free name of `name.png`, `name-2.png`, …; returns the path.

    The file system reserves the name, so that many processes can share a folder; no existing file is changed.

    Args:
        write: raises FileExistsError if the name that it is called with is taken.
    """
    for target in free_names(path):
        try:
            write(target)
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise file_error(error, target) from error
    return target


def write_new(folder: str | os.PathLike[str], name: str, data: bytes) -> Path:
    """Write `name.png` to a folder, which is made if need be, under the first free name; see `write_free`."""
    path = check_folder(folder) / f"{name}.png"
    return write_free(path, lambda target: write_atomically(target, data, overwrite=False))


CELL = 256  # side in pixels that an image of a contact sheet is scaled to, at least, about
CAPTION_SIZE, CAPTION_LINES, MARGIN = 17, 3, 12
INK, PAPER = (40, 40, 40), (255, 255, 255)


def contact_sheet(images: Sequence[Image.Image], captions: Sequence[str], *, columns: int = 0) -> Image.Image:
    """Return a grid of images, each above its caption.

    Small images are enlarged by an integer factor to about 256 pixels, so that the 64-pixel images of `mini` are easy
    to see. diffusers' `make_image_grid` has neither captions nor margins, and needs complete rows.

    Args:
        images: all are scaled to one size, that of the last one times the factor.
        captions: one for each image.
        columns: images per row; 0 for as square as possible.
    """
    width, height = images[-1].size
    factor = max(1, round(CELL / width))
    cell = (width * factor, height * factor)
    columns = columns or math.ceil(math.sqrt(len(images)))
    font = ImageFont.load_default(CAPTION_SIZE)
    texts = [_wrapped(caption, font, cell[0]) for caption in captions]
    line = CAPTION_SIZE + 4
    below = line * max(text.count("\n") + 1 for text in texts) + 4
    rows = math.ceil(len(images) / columns)
    step = (cell[0] + MARGIN, cell[1] + below + MARGIN)
    sheet = Image.new("RGB", (columns * step[0] + MARGIN, rows * step[1] + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (image, text) in enumerate(zip(images, texts, strict=True)):
        left = MARGIN + index % columns * step[0]
        top = MARGIN + index // columns * step[1]
        sheet.paste(image.convert("RGB").resize(cell, Image.Resampling.LANCZOS), (left, top))
        draw.multiline_text((left, top + cell[1] + 4), text, fill=INK, font=font, spacing=4)
    return sheet


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Break a caption into lines of at most `width` pixels; what exceeds the last one is cut."""
    lines = [""]
    for word in printable(text, limit=1000).split():
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:  # a word wider than the cell is broken anywhere
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > CAPTION_LINES:
        *lines, last = lines[:CAPTION_LINES]
        while font.getlength(last + "…") > width:
            last = last[:-1]
        lines.append(last.rstrip() + "…")
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds of each part of the work; `tune` is what the paper's Table 2 counts."""

    imports: float = 0.0
    load: float = 0.0
    prepare: float = 0.0
    tune: float = 0.0
    generate: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.as_dict().values())

    def as_dict(self) -> dict[str, float]:
        """Return plain values, in the order of the work."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class GeneratedImage:
    """A generated image and its record.

    Args:
        image: PIL, mode RGB.
        prompt: as it was given.
        seed: of this image; the same seed gives the same image, alone or in a batch.
        record: everything it depends on.
        name: whose image it is, for the names of files: the stem of the photo's or the concept's file, if it has one.
    """

    image: Image.Image
    prompt: str
    seed: int
    record: GenerationRecord
    name: str = ""

    def save(
        self, folder: str | os.PathLike[str] = "outputs", *, name: str | None = None, metadata: bool = True
    ) -> Path:
        """Write `<name>-<prompt>-<seed>.png`, with a number appended if that name is taken; returns the path.

        Args:
            folder: made if it does not exist.
            name: the beginning of the file's name; by default the image's own, else the domain's.
            metadata: False leaves everything out of the file but the AI mark.

        Raises:
            UsageError: the folder cannot be one, or may not be written to.
            ResourceError: the disk is full.
        """
        return write_new(folder, self.file_name(name), png_bytes(self.image, self.record, metadata=metadata))

    def file_name(self, name: str | None = None) -> str:
        """Return the name of the image's file, without its ending; `name` is that of `save`."""
        return f"{_begin(name or self.name, self.record.domain)}-{slug(self.prompt)}-{self.seed}"


def _begin(name: str, domain: str) -> str:
    """Return the beginning of a file's name; the domain's name where nothing of `name` is left in ASCII."""
    return slug(name, limit=40, default="") or slug(domain, limit=40)


@dataclass(frozen=True, kw_only=True)
class Personalization:
    """What `personalize` and `generate` return.

    Args:
        concept: to keep (`concept.save("me.e4t")`) and to generate from again.
        images: in the order of the prompts, those of one prompt together.
        seed: of the first image; a random one if none was given.
        timings: of the parts of the work.
        notes: sentences for the user, such as "no face was found".
        withheld: the records of images that the base's safety checker rejected.
        name: that of the images.
    """

    concept: Concept
    images: list[GeneratedImage]
    seed: int
    timings: Timings
    notes: tuple[str, ...] = ()
    withheld: tuple[GenerationRecord, ...] = ()
    name: str = ""

    def save(self, folder: str | os.PathLike[str] = "outputs", **options: Any) -> list[Path]:
        """Save every image; see `GeneratedImage.save`."""
        return [image.save(folder, **options) for image in self.images]

    def save_grid(
        self, folder: str | os.PathLike[str] = "outputs", *, name: str | None = None, metadata: bool = True
    ) -> Path:
        """Write `<name>-grid.png`: the photo, or photos, first, then every image above its prompt."""
        captions = [image.prompt for image in self.images]
        if len(set(captions)) < len(captions):
            captions = [f"{image.prompt} (seed {image.seed})" for image in self.images]
        photos = [photo.image for photo in self.concept.photos]
        above = ["the photo"] if len(photos) == 1 else [f"photo {number + 1}" for number in range(len(photos))]
        sheet = contact_sheet([*photos, *(image.image for image in self.images)], [*above, *captions])
        data = png_bytes(sheet, [image.record for image in self.images], metadata=metadata)
        return write_new(folder, f"{_begin(name or self.name, self.concept.domain)}-grid", data)
