"""Pictures as people hand them in: a file, bytes, a PIL image, a mask of their own."""

from __future__ import annotations

import io

from PIL import Image

from .images import OpenedImage, Source, open_image, open_mask

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
    deep = picture.mode in ("I", "F", "CMYK", "LAB") or picture.mode.startswith("I;16")
    known = deep or picture.mode in ("RGB", "RGBA", "L", "LA", "P", "1")
    plain = picture if known else picture.convert("RGB")
    plain.save(buffer, "TIFF" if deep else "PNG", exif=picture.getexif())
    return open_image(buffer.getvalue())


def open_own_mask(mask: Picture, photo: Image.Image) -> Image.Image:
    """Open a mask that the user drew for `photo`; returns mode L.

    Raises:
        InputError: it has other proportions than the photo.
    """
    if isinstance(mask, Image.Image):
        buffer = io.BytesIO()
        mask.convert("L").save(buffer, "PNG")
        mask = buffer.getvalue()
    return open_mask(mask, photo)
