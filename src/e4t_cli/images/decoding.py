"""Decodes an image file to upright 8-bit sRGB pixels without metadata.

Orientation, transparency, deep greys and colour profiles are applied.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from PIL import Image
from PIL.ExifTags import Base
from PIL.ImageFile import ImageFile

from e4t_cli.errors import E4TError, InputError, ResourceError, printable
from e4t_cli.images.colours import to_srgb
from e4t_cli.images.recognition import has_hdr_transfer, open_header

# Larger photos than `MAX_DECODED` are decoded at half the width and height: those of 200 megapixels from phones too.
MAX_PIXELS, MAX_DECODED, MIN_SIDE = 256_000_000, 64_000_000, 64
_END_OF_IMAGE = b"\xff\xd9"
_MARKER = re.compile(rb"\xff+([^\0\xd0-\xd7\xff])", re.DOTALL)  # one of a JPEG, but for those inside a scan
# ImageMagick's names for what it writes as hexadecimal text, and Pillow's for the same.
_PNG_PROFILES = {"exif": "exif", "app1": "exif", "xmp": "xmp", "icc": "icc_profile", "icm": "icc_profile"}
_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class OpenedImage:
    """A decoded image."""

    image: Image.Image  # RGB, upright, sRGB, without metadata
    notes: tuple[str, ...]  # sentences for the user about how it was decoded
    sha256: str  # of the file's bytes, as `sha256sum` prints it
    alpha: Image.Image | None = None  # mode L, of the image's size, if it has transparent pixels: 255 is opaque


def decode(data: bytes, name: str) -> OpenedImage:
    """Decode a file to an upright 8-bit sRGB image without metadata; `name` is for messages.

    Raises:
        InputError: it is not an image, or damaged, or too large, or too small, or nothing in it is visible.
        ResourceError: there is not enough memory for it.
    """
    if not data:
        raise InputError(f"{name} is empty")
    notes: list[str] = []
    try:
        image = open_header(data, name)
        width, height = image.size
        if width * height > MAX_PIXELS:  # nothing is decoded yet
            message = f"{name} has more than {MAX_PIXELS // 10**6} megapixels"
            raise InputError(message, hint="make it smaller first")
        if min(width, height) < MIN_SIDE:
            raise InputError(f"{name} is {width}×{height}: {MIN_SIDE} pixels a side are the minimum")
        frames, heic = getattr(image, "n_frames", 1), image.format == "HEIF"
        # The further frames of a photo in MPO are depth or brightness maps: not worth a note.
        if frames > 1 and image.format != "MPO":
            notes.append(f"{name} has {frames} {'images; the main' if heic else 'frames; the first'} one is used")
        if image.format in ("PNG", "AVIF", "HEIF") and has_hdr_transfer(data):
            notes.append(f"{name} is an HDR image, its colours may look pale: an export without HDR is better")
        image = _loaded(image, data, name, notes)
        if image.format == "PNG":
            _mend_png(image, data)
        orientation = _orientation(image, name, notes)
        halve = width * height > MAX_DECODED and image.width * image.height > MAX_DECODED
        upright, alpha = to_srgb(image, name, notes, halve=halve)
        if orientation in _TRANSPOSED:
            upright = upright.transpose(_TRANSPOSED[orientation])
            alpha = alpha and alpha.transpose(_TRANSPOSED[orientation])
        if width * height > MAX_DECODED:
            notes.append(f"{name} was reduced from {width}×{height} to {(width + 1) // 2}×{(height + 1) // 2}")
        return OpenedImage(upright, tuple(notes), hashlib.sha256(data).hexdigest(), alpha)
    except E4TError:
        raise
    except MemoryError:
        raise ResourceError(f"there is not enough memory to decode {name}", hint="make it smaller first") from None
    except Exception as error:  # hostile bytes make decoders raise any exception
        raise InputError(f"{name} is damaged: {printable(str(error), limit=120)}") from error


def _loaded(image: ImageFile, data: bytes, name: str, notes: list[str]) -> ImageFile:
    """Decode the pixels, and detect what decoders do not: truncated JPEGs, and zeros where a download has stopped."""
    zeros = len(data) - len(data.rstrip(b"\0"))
    truncated = InputError(f"{name} is truncated", hint="copy or download it again")
    if image.format == "PNG" and zeros >= 64 and b"IEND" not in data:
        raise truncated
    if image.format in ("WEBP", "AVIF", "HEIF") and zeros >= 1024:  # fewer may be the end of its metadata
        notes.append(f"{name} ends in {zeros} zeros, as if its download were not finished")
    if image.format not in ("JPEG", "MPO") or data.rstrip(b"\0").endswith(_END_OF_IMAGE):
        return _load(image)
    complete, ended = _scans(data)
    if ended:
        return _load(image)
    whole = _without_end(data, name) if complete else None
    if whole is None:
        raise truncated
    notes.append(f"{name} lacks its end marker; no pixel is missing")
    return whole


def _load(image: ImageFile) -> ImageFile:
    width, height = image.size
    if width * height > MAX_DECODED and image.format in ("JPEG", "MPO"):
        image.draft(None, (width // 2, height // 2))
    image.load()
    return image


def _without_end(data: bytes, name: str) -> ImageFile | None:
    """Decode a JPEG that lacks nothing but its end marker; None if pixels are missing.

    libjpeg fills missing pixels with grey and only warns, which Pillow does not report. If different endings give the
    same pixels, none depends on what is missing. They have restart markers, after which decoding goes on.
    """
    scan = data.rstrip(b"\0")  # zeros are what a download is not filled with yet, and a byte after 255
    if len(data) - len(scan) < 8:
        scan = data
    elif scan.endswith(b"\xff"):
        scan += b"\0"
    scan = scan.rstrip(b"\xff")  # half of the marker
    with suppress(OSError):
        whole = _load(open_header(scan + _END_OF_IMAGE, name))
        for bits, first in ((b"\x55", 0), (b"\xaa", 3), (b"\x1d\xe4\x72", 6)):
            restarts = (bytes((0xFF, 0xD0 + (first + number) % 8)) for number in range(8))
            ending = bits * 32 + b"".join(marker + bits * 32 for marker in restarts) + _END_OF_IMAGE
            if _load(open_header(scan + ending, name)).tobytes() != whole.tobytes():
                return None
        return whole
    return None


def _scans(data: bytes) -> tuple[bool, bool]:
    """Whether a JPEG's scans, if none is cut, have all bits of all coefficients, and whether it has an end marker."""
    found, needed, place = 0, 0, 2
    while match := _MARKER.search(data, place):
        start = match.end() + 2
        place = match.end() + int.from_bytes(data[match.end() : start], "big")
        kind, body = match[1][0], data[start:place]
        if kind == 0xD9:
            return True, True
        if kind in (0xC0, 0xC1, 0xC2, 0xC9, 0xCA) and len(body) >= 6:
            needed = 64 * body[5]  # components, of 64 coefficients each
        elif kind == 0xDA and len(body) >= 6:  # otherwise it is cut
            low, high, shift = body[-3:]  # the band of coefficients; how many bits later scans add
            found += 0 if shift & 15 else body[0] * (high - low + 1)
    return found == needed, False


def _mend_png(image: ImageFile, data: bytes) -> None:
    """Correct what Pillow makes of PNG metadata: ImageMagick's hexadecimal profiles, and transparent colours."""
    for key, text in list(image.info.items()):
        kind = _PNG_PROFILES.get(str(key).lower().removeprefix("raw profile type "))
        if kind and isinstance(text, str):
            with suppress(ValueError):
                profile = bytes.fromhex("".join(text.split("\n")[3:]))
                image.info.setdefault("xmp" if b"ns.adobe.com/xap" in profile[:40] else kind, profile)
    # Pillow leaves a transparent colour at the file's depth, and the pixels have 8 bits.
    transparent, depth = image.info.get("transparency"), data[24]
    if isinstance(transparent, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    elif image.mode == "L" and isinstance(transparent, int) and depth < 8:
        image.info["transparency"] = transparent * 255 // (2**depth - 1)


def _orientation(image: ImageFile, name: str, notes: list[str]) -> Any:
    try:
        return image.getexif().get(Base.Orientation, 1)
    except Exception:  # malformed EXIF is no reason to refuse a good image
        notes.append(f"the orientation written in {name} could not be read")
        return 1
