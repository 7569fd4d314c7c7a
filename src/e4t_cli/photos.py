"""Pictures as people hand them in: a file, bytes, a PIL image, a mask of their own, a folder."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from .domain import Domain, PreparationTarget, PreparedImage
from .errors import InputError, UsageError, printable
from .images import OpenedImage, Source, center_square, open_image, open_mask, prepare_image
from .progress import Progress, ProgressCallback

Picture = Source | Image.Image


def open_picture(picture: Picture) -> OpenedImage:
    """Open whatever is a picture.

    Raises:
        UsageError: there is no such file, or it is a URL.
        InputError: it cannot be used as a picture.
    """
    if not isinstance(picture, Image.Image):
        return open_image(picture)
    # The road of files, so that alpha, palettes and 16 bits are treated as anywhere else.
    buffer = io.BytesIO()
    plain = picture if picture.mode in ("RGB", "RGBA", "L", "LA", "P") else picture.convert("RGB")
    plain.save(buffer, "PNG", exif=picture.getexif())
    return open_image(buffer.getvalue())


def open_own_mask(mask: Picture, photo: Image.Image) -> Image.Image:
    """Open a mask that the user drew for `photo`; returns mode L.

    Raises:
        InputError: it has other proportions than the photo, or nothing is white in it.
    """
    if isinstance(mask, Image.Image):
        buffer = io.BytesIO()
        mask.convert("L").save(buffer, "PNG")
        mask = buffer.getvalue()
    found = open_mask(mask, photo)
    if not found.getextrema()[1]:
        raise InputError("the mask is black all over", hint="paint the concept white")
    return found


def with_mask(prepared: PreparedImage, photo: Image.Image, mask: Image.Image) -> PreparedImage:
    """Put the user's mask on the prepared picture, cropped as the picture was."""
    size = prepared.image.width
    square = center_square(photo, size)
    notes = prepared.notes
    if square.tobytes() != prepared.image.tobytes():
        # Where the domain looked, only the domain knows; a mask must lie on the right pixels.
        notes = (*notes, "with a mask of your own the centred square is used")
    return PreparedImage(image=square, mask=center_square(mask, size), notes=notes)


def list_pictures(data: str | os.PathLike[str] | Iterable[Any]) -> Iterable[Any]:
    """Return the files of a folder and its sub-folders in order, or the iterable as it is.

    Raises:
        UsageError: there is no such folder.
        InputError: it is empty.
    """
    if not isinstance(data, str | os.PathLike):
        return data
    root = Path(data)
    if not root.is_dir():
        raise UsageError(f"there is no folder {printable(str(root))}")
    # os.walk does not follow links to folders, so a loop of them is not one.
    found = sorted(
        Path(place, name)
        for place, folders, names in os.walk(root)
        for name in names
        if not any(part.startswith(".") for part in Path(place, name).relative_to(root).parts)
    )
    if not found:
        raise InputError(f"there is no picture in {printable(str(root))}")
    return found


def prepared_pictures(
    domain: Domain,
    pictures: Iterable[Any],
    target: PreparationTarget,
    on_progress: ProgressCallback,
) -> Iterator[PreparedImage]:
    """Prepare pictures one by one; those that cannot be read are counted, not fatal."""
    left_out: list[str] = []
    for picture in pictures:
        if isinstance(picture, PreparedImage):
            yield picture
            continue
        try:
            yield prepare_image(domain, open_picture(picture).image, target)
        except (InputError, UsageError) as error:
            left_out.append(error.message)
    if left_out:
        count = "1 picture was" if len(left_out) == 1 else f"{len(left_out)} pictures were"
        note = f"{count} left out; the first: {left_out[0]}"
        on_progress(Progress(stage="encode", note=note))
