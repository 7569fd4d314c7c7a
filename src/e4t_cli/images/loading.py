"""Opens photos and masks from paths, bytes, open files or PIL images, and runs a domain's preparation on them."""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import BinaryIO

from PIL import Image

from e4t_cli.errors import E4TError, InputError, UsageError, printable
from e4t_cli.images.decoding import OpenedImage, decode
from e4t_cli.images.framing import Frame
from e4t_cli.registry.domain import Domain, PreparationTarget, PreparedImage
from e4t_cli.system_memory import memory_ran_out

MAX_BYTES = 256 * 1024 * 1024
MIN_COVERAGE = 0.01  # a mask over a smaller part of the image is left out: the loss divides by its area

ImageInput = str | os.PathLike[str] | bytes | BinaryIO | Image.Image
ImageInputs = ImageInput | Sequence[ImageInput]  # one, or several


def open_image(source: ImageInput) -> OpenedImage:
    """Open an image from a path, bytes, an open binary file, "-" (standard input), or Pillow.

    Raises:
        UsageError: there is no such file, or it is a URL.
        InputError: it is not an image, or damaged, or too large, or too small.
    """
    return decode(*read_image(source))


def read_bytes(source: ImageInput) -> bytes:
    """Return the bytes of an image's file as they are; raises as `open_image`."""
    return read_image(source)[0]


def open_mask(source: ImageInput, image: Image.Image) -> Image.Image:
    """Open a mask drawn for `image`; returns mode L in the mask's own size.

    White is the concept; in a file with transparent pixels, the opaque ones are.

    Raises:
        InputError: as `open_image`, or its proportions are not those of the image.
    """
    opened = open_image(source.convert("L") if isinstance(source, Image.Image) else source)
    mask = opened.image if opened.alpha is None else opened.alpha
    difference = mask.width * image.height - mask.height * image.width
    if abs(difference) > 0.01 * mask.width * image.height:
        sizes = f"the mask is {mask.width}×{mask.height} and the image {image.width}×{image.height}"
        raise InputError(f"{sizes}: they must have the same proportions")
    return mask.convert("L")


def center_square(image: Image.Image, size: int) -> Image.Image:
    """Return the largest centred square of an image or mask, scaled to `size` × `size`."""
    return Frame.centered(image.size).apply(image, size)


def image_sha256(image: Image.Image) -> str:
    """Return a hash of the pixels alone, the same for every file format."""
    head = f"{image.mode} {image.width}x{image.height}\n".encode()
    return hashlib.sha256(head + image.tobytes()).hexdigest()


def prepare_image(domain: Domain, image: Image.Image, target: PreparationTarget) -> PreparedImage:
    """Run the domain's preparation and check what it returns; a mask under 1 % of the image is left out with a note.

    Raises:
        E4TError: the domain's function failed or returned something else than promised.
    """
    frame = Frame.centered(image.size)
    if domain.prepare is None:
        prepared = PreparedImage(image=frame.apply(image, target.size), frame=frame)
    else:
        about = f"the preparation of domain {domain.name!r} ({domain.prepare.__module__})"
        try:
            prepared = domain.prepare(image, target)
        except Exception as error:
            if isinstance(error, E4TError) or memory_ran_out(error):
                raise
            message = f"{about} failed: " + printable(f"{type(error).__name__}: {error}")
            raise E4TError(message, hint="E4T_DEBUG=1 shows the traceback") from error
        size = getattr(getattr(prepared, "image", None), "size", None)
        if not isinstance(prepared, PreparedImage) or size != (target.size, target.size):
            wanted = f"a PreparedImage of {target.size}×{target.size}"
            raise E4TError(f"{about} must return {wanted}, not {type(prepared).__name__} of {size}")
    notes, side = [], (prepared.frame or frame).side
    too_small = f"smaller than the {target.size} pixels that {target.base} works with: it is scaled up"
    if min(image.size) < target.size:
        notes.append(f"the image is {image.width}×{image.height}, {too_small}")
    elif side < target.size * 0.75:  # a little is not worth a warning
        notes.append(f"the used part of the image is {side:.0f}×{side:.0f}, {too_small}")
    mask = prepared.mask if target.mask else None
    if mask is not None and mask_coverage(mask) < MIN_COVERAGE:
        mask = None
        notes.append("the mask covers less than 1 % of the image and is left out")
    return replace(prepared, mask=mask, notes=(*notes, *prepared.notes))


def mask_coverage(mask: Image.Image) -> float:
    """Return the part of an image that a mask of mode L covers, from 0 to 1."""
    histogram = mask.histogram()
    return sum(value * count for value, count in enumerate(histogram)) / (255 * sum(histogram))


def read_image(source: ImageInput) -> tuple[bytes, str]:
    """Return the bytes of an image's file and a name for messages, as `decode` takes them; raises as `open_image`.

    Only regular files are read.
    """
    if isinstance(source, Image.Image):
        source = _encoded(source)
    if isinstance(source, bytes):
        return source, "the image"
    if isinstance(source, str) and source == "-":
        if sys.stdin is None or sys.stdin.closed:  # `<&-`
            raise UsageError("'-' reads the image from standard input, which is closed", hint="name a file")
        if sys.stdin.isatty():
            hint = "for example: cat me.jpg | e4t personalize face - 'S* on the beach'"
            raise UsageError("'-' reads the image from standard input, which is the keyboard", hint=hint)
        return _bounded(sys.stdin.buffer, "standard input"), "standard input"
    if not isinstance(source, str | os.PathLike):
        return _bounded(source, "the image"), "the image"
    path = os.fspath(source)
    shown = printable(path)
    if not path:
        raise UsageError("the name of an image is empty", hint="a variable of the shell may be unset")
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", path):
        raise UsageError("images are not fetched from the web", hint=f"curl -L -o photo.jpg '{shown}'")
    # Without O_NONBLOCK, opening a FIFO without a writer would block.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        if os.path.isdir(path):
            raise InputError(f"{shown} is a folder, not an image")
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


def _encoded(image: Image.Image) -> bytes:
    """Return a PIL image as a file, so that alpha, palettes and 16 bits are decoded as usual."""
    if image.mode in ("RGBa", "La", "PA"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    deep = image.mode in ("I", "F", "CMYK", "LAB") or image.mode.startswith("I;16")
    known = deep or image.mode in ("RGB", "RGBA", "L", "LA", "P", "1")
    buffer = io.BytesIO()
    (image if known else image.convert("RGB")).save(buffer, "TIFF" if deep else "PNG", exif=image.getexif())
    return buffer.getvalue()
