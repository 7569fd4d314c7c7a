"""From whatever the user has to an upright sRGB picture, and from there to a prepared square.

`open_image` answers for every kind of file: what it cannot use it refuses in one sentence, what
it can it turns into 8-bit RGB without losing what the eye would see (orientation, transparency,
16-bit greys, colour profiles). Nothing of the file's metadata survives.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from .domain import Domain, PreparationTarget, PreparedImage
from .errors import E4TError, InputError, UsageError, printable

MOST_PIXELS = 64_000_000
LEAST_SIDE = 64
MOST_BYTES = 256 * 1024 * 1024
# Formats of pictures that people have. Left out on purpose: those whose decoders run other
# programs (EPS) or that nobody photographs in.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "HEIF")
_HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}

Source = str | os.PathLike[str] | bytes | BinaryIO


@dataclass(frozen=True)
class OpenedImage:
    """A picture as the rest of the program sees it.

    Args:
        image: RGB, upright, sRGB, without metadata.
        notes: sentences for the user about what was done to it.
        sha256: of the file's bytes, as `sha256sum` prints it.
    """

    image: Image.Image
    notes: tuple[str, ...]
    sha256: str


def open_image(source: Source) -> OpenedImage:
    """Read a picture from a path, bytes, an open binary file, or "-" (standard input).

    Raises:
        UsageError: there is no such file, or it is a URL.
        InputError: it is not a picture, or damaged, or too large, or too small.
    """
    data, name = _read(source)
    picture, notes = _decode(data, name)
    return OpenedImage(picture, tuple(notes), hashlib.sha256(data).hexdigest())


def open_mask(source: Source, image: Image.Image) -> Image.Image:
    """Read a mask (white = the concept) drawn for `image`; returns mode L in its own size.

    Raises:
        InputError: as `open_image`, or its proportions are not those of the picture.
    """
    mask = open_image(source).image
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
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


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
    notes: list[str] = []
    if min(image.size) < target.size:
        notes.append(
            f"the picture is {image.width}×{image.height}, smaller than the {target.size} pixels "
            f"that {target.base} works with: it is scaled up"
        )
    if domain.prepare is None:
        prepared = PreparedImage(image=center_square(image, target.size))
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
    mask = prepared.mask if target.mask else None
    if mask is not None and _coverage(mask) < 0.01:
        mask = None
        notes.append("the mask covers less than 1 % of the picture and is left out")
    return PreparedImage(image=prepared.image, mask=mask, notes=(*notes, *prepared.notes))


def _coverage(mask: Image.Image) -> float:
    histogram = mask.histogram()
    return sum(value * count for value, count in enumerate(histogram)) / (255 * sum(histogram))


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
    data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise InputError(f"{name} is larger than {MOST_BYTES >> 20} MiB")
    return data


def _decode(data: bytes, name: str) -> tuple[Image.Image, list[str]]:
    if not data:
        raise InputError(f"{name} is empty")
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS:
        _learn_heic(name)
    Image.init()
    formats = [known for known in _FORMATS if known in Image.OPEN]
    notes: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata concerns nobody
            # Pillow only warns between 89 and 179 megapixels.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=formats)
            width, height = picture.size
            if width * height > MOST_PIXELS:  # known from the header; nothing is decoded yet
                raise Image.DecompressionBombError
            if min(width, height) < LEAST_SIDE:
                raise InputError(
                    f"{name} is {width}×{height}: {LEAST_SIDE} pixels a side are the least"
                )
            frames = getattr(picture, "n_frames", 1)
            # A photo in MPO brings depth or brightness maps as further frames: not worth a note.
            if frames > 1 and picture.format != "MPO":
                notes.append(f"{name} has {frames} frames; the first is used")
            picture.seek(0)
            picture.load()  # `verify` would not notice a truncated JPEG
            return _upright_rgb(picture, name, notes), notes
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise InputError(
            f"{name} has more than {MOST_PIXELS // 10**6} megapixels", hint="make it smaller first"
        ) from None
    except UnidentifiedImageError:
        raise InputError(
            f"{name} is not a picture in a format known here",
            hint="JPEG, PNG, WebP, AVIF, GIF, TIFF, BMP and PPM are",
        ) from None
    except InputError:
        raise
    except Exception as error:  # decoders meet hostile bytes with every kind of exception
        raise InputError(f"{name} is damaged: {printable(str(error), limit=120)}") from error


def _learn_heic(name: str) -> None:
    try:
        import pi_heif
    except ImportError:
        raise InputError(
            f"{name} is a HEIC picture, which needs one more package",
            hint="pip install 'e4t[heic]'",
        ) from None
    pi_heif.register_heif_opener()


def _upright_rgb(picture: Image.Image, name: str, notes: list[str]) -> Image.Image:
    profile = picture.info.get("icc_profile")
    try:
        picture = ImageOps.exif_transpose(picture)
    except Exception:  # malformed EXIF is no reason to refuse a good picture
        notes.append(f"the orientation written in {name} could not be read")
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        picture = _eight_bit_grey(picture, name)
    alpha = None
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        alpha = picture.getchannel("A")
        picture = picture.convert("RGB")  # the colours alone: the profile speaks of them only
    elif picture.mode not in ("RGB", "L", "CMYK", "LAB"):
        picture = picture.convert("RGB")
    picture = _to_srgb(picture, profile, name, notes)
    # Onto a fresh white sheet: hidden colours do not show through, and metadata stays behind.
    sheet = Image.new("RGB", picture.size, "white")
    sheet.paste(picture, mask=alpha)
    return sheet


def _eight_bit_grey(picture: Image.Image, name: str) -> Image.Image:
    """Scale 16-bit, 32-bit and floating greys to 8 bits; Pillow's own conversion would clip."""
    import numpy as np

    values = np.asarray(picture, dtype=np.float32)  # 64 megapixels stay under 0.3 GB
    if not np.isfinite(values).all():
        raise InputError(f"{name} contains numbers that are not finite")
    low, high = float(values.min()), float(values.max())
    if picture.mode.startswith("I;16"):
        low, high = 0.0, 65535.0
    elif low >= 0 and high <= 65535:
        # The file does not say its range: the smallest usual one that holds all values.
        ranges = (1.0, 255.0, 65535.0) if picture.mode == "F" else (255.0, 65535.0)
        low, high = 0.0, next(top for top in ranges if high <= top)
    scaled = (values - low) * (255.0 / max(high - low, 1e-12))
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def _to_srgb(
    picture: Image.Image, profile: bytes | None, name: str, notes: list[str]
) -> Image.Image:
    srgb = ImageCms.createProfile("sRGB")
    try:
        if profile:
            meant = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(meant):
                return ImageCms.profileToProfile(picture, meant, srgb, outputMode="RGB") or picture
        elif picture.mode == "LAB":
            lab = ImageCms.createProfile("LAB")
            return ImageCms.profileToProfile(picture, lab, srgb, outputMode="RGB") or picture
    except (ImageCms.PyCMSError, OSError, ValueError):
        notes.append(f"the colour profile in {name} could not be read and is left out")
    return picture.convert("RGB")
