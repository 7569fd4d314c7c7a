"""From whatever the user has to an upright sRGB picture, and from there to a prepared square.

`open_image` answers for every kind of file: what it cannot use it refuses in one sentence, what
it can becomes 8-bit RGB (`decoding`). Nothing of the file's metadata survives.

Pictures as people hand them in: a file, bytes, a PIL image, a mask of their own.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from e4t_cli.errors import E4TError, InputError, UsageError, printable
from e4t_cli.images.decoding import decode
from e4t_cli.images.framing import Frame
from e4t_cli.registry.domain import Domain, PreparationTarget, PreparedImage

MAX_BYTES = 256 * 1024 * 1024
MIN_COVERAGE = 0.01
"""A mask over a smaller part of the picture is left out: too little to learn from."""

Source = str | os.PathLike[str] | bytes | BinaryIO


@dataclass(frozen=True)
class OpenedImage:
    """A picture as the rest of the program sees it.

    Args:
        image: RGB, upright, sRGB, without metadata.
        notes: sentences for the user about what was done to it.
        sha256: of the file's bytes, as `sha256sum` prints it.
        alpha: mode L, of the picture's size, where some of it is transparent: 255 is opaque.
    """

    image: Image.Image
    notes: tuple[str, ...]
    sha256: str
    alpha: Image.Image | None = None


def open_image(source: Source) -> OpenedImage:
    """Read a picture from a path, bytes, an open binary file, or "-" (standard input).

    Raises:
        UsageError: there is no such file, or it is a URL.
        InputError: it is not a picture, or damaged, or too large, or too small.
    """
    data, name = _read(source)
    decoded = decode(data, name)
    digest = hashlib.sha256(data).hexdigest()
    return OpenedImage(decoded.image, tuple(decoded.notes), digest, decoded.alpha)


def open_mask(source: Source, image: Image.Image) -> Image.Image:
    """Read a mask drawn for `image`; returns mode L in its own size.

    White is the concept; in a picture that is transparent in places, what is opaque is.

    Raises:
        InputError: as `open_image`, or its proportions are not those of the picture.
    """
    opened = open_image(source)
    mask = opened.image if opened.alpha is None else opened.alpha
    if (
        abs(mask.width * image.height - mask.height * image.width)
        > 0.01 * mask.width * image.height
    ):
        raise InputError(
            f"the mask is {mask.width}×{mask.height} and the picture {image.width}×{image.height}: "
            "they must have the same proportions"
        )
    return mask.convert("L")


def center_square(image: Image.Image, size: int) -> Image.Image:
    """Return the largest centred square of a picture or mask, scaled to `size` × `size`."""
    return Frame.centered(image.size).apply(image, size)


def image_sha256(image: Image.Image) -> str:
    """Return a hash of the pixels alone, the same whatever file they came from."""
    head = f"{image.mode} {image.width}x{image.height}\n".encode()
    return hashlib.sha256(head + image.tobytes()).hexdigest()


def prepare_image(domain: Domain, image: Image.Image, target: PreparationTarget) -> PreparedImage:
    """Run the domain's preparation and check what it returns.

    A mask that covers under 1 % of the picture is left out with a note: too little to learn from.

    Raises:
        E4TError: the domain's function failed or returned something else than promised.
    """
    if domain.prepare is None:
        prepared = PreparedImage(
            image=center_square(image, target.size), frame=Frame.centered(image.size)
        )
    else:
        author = getattr(domain.prepare, "__module__", "?")
        try:
            prepared = domain.prepare(image, target)
        except E4TError:
            raise
        except Exception as error:
            raise E4TError(
                f"the preparation of domain {domain.name!r} ({author}) failed: "
                + printable(f"{type(error).__name__}: {error}"),
                hint="E4T_DEBUG=1 shows the traceback",
            ) from error
        size = getattr(getattr(prepared, "image", None), "size", None)
        if not isinstance(prepared, PreparedImage) or size != (target.size, target.size):
            raise E4TError(
                f"the preparation of domain {domain.name!r} ({author}) must return a PreparedImage "
                f"of {target.size}×{target.size}, not {type(prepared).__name__} of {size}"
            )
    notes = _too_small(prepared.frame or Frame.centered(image.size), image, target)
    mask = prepared.mask if target.mask else None
    if mask is not None and mask_coverage(mask) < MIN_COVERAGE:
        mask = None
        notes.append("the mask covers less than 1 % of the picture and is left out")
    return replace(prepared, mask=mask, notes=(*notes, *prepared.notes))


def mask_coverage(mask: Image.Image) -> float:
    """Return which part of a picture a mask of mode L covers, from 0 to 1."""
    histogram = mask.histogram()
    return sum(value * count for value, count in enumerate(histogram)) / (255 * sum(histogram))


def _too_small(frame: Frame, image: Image.Image, target: PreparationTarget) -> list[str]:
    wanted = f"smaller than the {target.size} pixels that {target.base} works with: it is scaled up"
    if min(image.size) < target.size:
        return [f"the picture is {image.width}×{image.height}, {wanted}"]
    if frame.side < target.size * 0.75:  # a little is not worth a warning
        side = round(frame.side)
        return [f"what is used of the picture is {side}×{side}, {wanted}"]
    return []


def _read(source: Source) -> tuple[bytes, str]:
    """Return the bytes and a name for messages, refusing what is no plain file."""
    if isinstance(source, bytes):
        return source, "the picture"
    if isinstance(source, str) and source == "-":
        if sys.stdin.isatty():
            raise UsageError(
                "'-' reads the picture from standard input, which is the keyboard",
                hint="for example: cat me.jpg | e4t personalize face - 'S* on the beach'",
            )
        return _bounded(sys.stdin.buffer, "standard input"), "standard input"
    if not isinstance(source, str | os.PathLike):
        return _bounded(source, "the picture"), "the picture"
    path = os.fspath(source)
    shown = printable(path)
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", path):
        raise UsageError(
            "pictures are not fetched from the web", hint=f"curl -L -o photo.jpg '{shown}'"
        )
    # Without O_NONBLOCK, opening a FIFO that nobody writes to would wait for ever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        if Path(path).is_dir():
            raise InputError(f"{shown} is a folder, not a picture")
        with open(os.open(path, flags), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InputError(f"{shown} is not a plain file", hint="pipe it in and name it '-'")
            return _bounded(file, shown), shown
    except FileNotFoundError:
        raise UsageError(f"there is no file {shown}") from None
    except ValueError:
        raise UsageError(f"{shown} cannot be the name of a file") from None
    except OSError as error:
        raise InputError(f"{shown} cannot be read: {error.strerror}") from error


def _bounded(file: BinaryIO, name: str) -> bytes:
    data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise InputError(f"{name} is larger than {MAX_BYTES >> 20} MiB")
    return data


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
