"""Saving the prepared picture: what the model learns from, to look at or to draw a mask on."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from e4t_cli.cli.console import Console
from e4t_cli.cli.inputs import STDIN
from e4t_cli.errors import UsageError, printable
from e4t_cli.prompts import slug

if TYPE_CHECKING:
    from PIL.Image import Image

    from e4t_cli.domain import PreparedImage


class PreparedSaver:
    """Saves a prepared picture and, in a second file, its mask; reports both on stdout.

    Args:
        console: of the running command.
        place: a folder, or the name of a PNG file that is not there yet; the mask's name has
            "-mask" in it.
        photo: as it was given on the command line; names the files in a folder.

    Raises:
        UsageError: the place cannot be written to, or is taken.
    """

    def __init__(self, console: Console, place: Path, photo: str) -> None:
        from e4t_cli.results import check_folder

        self.console = console
        name = "photo" if photo == STDIN else Path(photo).stem
        self.file = None if place.is_dir() or not place.suffix else place
        self.folder = place if self.file is None else place.parent
        self.stem = f"{slug(name, limit=40)}-prepared"
        if self.file is not None:
            if self.file.suffix.lower() != ".png":
                shown = printable(str(place))
                raise UsageError(f"{shown} is not the name of a PNG file", hint="such as face.png")
            for taken in (self.file, _mask_of(self.file)):
                if taken.exists():
                    shown = printable(str(taken))
                    raise UsageError(f"{shown} exists and is not overwritten", hint="another name")
        check_folder(self.folder)

    def __call__(self, prepared: PreparedImage) -> None:
        """Save it."""
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
        from e4t_cli.results import write_new

        data = io.BytesIO()
        image.save(data, "PNG")
        if file is None:
            return write_new(self.folder, stem, data.getvalue())
        try:
            write_atomically(file, data.getvalue(), overwrite=False)
        except FileExistsError:
            shown = printable(str(file))
            raise UsageError(
                f"{shown} exists and is not overwritten", hint="another name"
            ) from None
        return file


def _mask_of(file: Path) -> Path:
    return file.with_name(f"{file.stem}-mask{file.suffix}")
