"""Converts decoded images of every mode to 8-bit sRGB: deep greys, transparency and colour profiles."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from PIL import Image, ImageCms
from PIL.ExifTags import IFD
from PIL.ImageFile import ImageFile

from e4t_cli.errors import InputError

# A photo whose every pixel is less opaque than that, 5 %, is invisible.
MIN_OPACITY = 13
# Rounded corners of a screenshot, or a faint alpha all over: the mean opacity, 98 %, of what is no cut-out.
MAX_OPACITY = 250
_WHITE_IS_ZERO, _UNSIGNED, _SIGNED = 0, 1, 2  # values of TIFF's PhotometricInterpretation and SampleFormat
_SRGB_PRIMARIES = (0.43607, 0.22249, 0.01392, 0.38515, 0.71687, 0.09708, 0.14307, 0.06061, 0.71410)
_ADOBE_PRIMARIES = (0.60974, 0.31111, 0.01947, 0.20528, 0.62567, 0.06087, 0.14919, 0.06322, 0.74457)
_SPACES = {"GRAY": "L", "RGB ": "RGB", "CMYK": "CMYK", "Lab ": "LAB"}  # of profiles, and the modes they describe


def to_srgb(
    image: ImageFile, name: str, notes: list[str], *, halve: bool = False
) -> tuple[Image.Image, Image.Image | None]:
    """Return an RGB image on white, and its alpha (mode L) if parts of it are transparent.

    Args:
        image: loaded, of any mode.
        name: for messages.
        notes: sentences for the user are added to it.
        halve: reduce to half the width and height.

    Raises:
        InputError: nothing in it is visible, or its values have no meaning as colours.
    """
    profile = image.info.get("icc_profile") or _stated_profile(image)
    colours, alpha = _separated(image, name)
    if halve:
        if colours.mode == "LAB":  # whose a and b have a sign, which a mean of bytes would miss
            colours, profile = _apply_profile(colours, profile, name, notes), None
        colours, alpha = _halved(colours, alpha)
    colours = _apply_profile(colours, profile, name, notes)
    # Onto white: hidden colours do not show through, and metadata is dropped.
    canvas = Image.new("RGB", colours.size, "white")
    canvas.paste(colours, mask=alpha)
    if alpha is None:
        return canvas, None
    opacities = alpha.histogram()
    if not any(opacities[MIN_OPACITY:]):
        message = f"{name} is transparent everywhere"
        raise InputError(message, hint="save it without transparency, if there is an image behind it")
    mean = sum(value * count for value, count in enumerate(opacities)) / sum(opacities)
    return canvas, alpha if mean < MAX_OPACITY else None


def _separated(image: ImageFile, name: str) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours in mode L, RGB, CMYK or LAB, and the alpha: profiles do not cover it."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _eight_bit_grey(image, name)
    if image.mode in ("LA", "La") or (image.mode in ("L", "1") and "transparency" in image.info):
        grey = image.convert("LA")
        return grey.getchannel("L"), grey.getchannel("A")
    if image.mode in ("RGBA", "PA", "RGBa") or "transparency" in image.info:
        full = image.convert("RGBA")
        return full.convert("RGB"), full.getchannel("A")
    if image.mode == "1":
        return image.convert("L"), None
    if image.mode == "L" and getattr(image, "tag_v2", {}).get(339) == (_SIGNED,):
        raise InputError(f"{name} has signed 8-bit values", hint="export it as JPEG or PNG")
    return (image if image.mode in ("RGB", "L", "CMYK", "LAB") else image.convert("RGB")), None


def _eight_bit_grey(image: ImageFile, name: str) -> tuple[Image.Image, Image.Image | None]:
    """Scale 16-bit, 32-bit and floating greys to 8 bits; Pillow's own conversion would clip."""
    import numpy as np

    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    stored = np.asarray(image)
    if image.mode == "I" and tags.get(258, (0,))[0] == 32 and tags.get(339, (_UNSIGNED,))[0] == _UNSIGNED:
        stored = stored.view(np.uint32)  # Pillow takes the upper half for negative
    values = stored.astype(np.float32)  # 64 megapixels stay under 0.3 GB
    if not np.isfinite(values).all():
        raise InputError(f"{name} contains values that are not finite")
    low, high = _range(image, tags, float(values.min()), float(values.max()), name)
    scaled = np.clip(np.rint((values - low) * (255.0 / max(high - low, 1e-12))), 0, 255).astype(np.uint8)
    if tags.get(262) == _WHITE_IS_ZERO:
        scaled = 255 - scaled
    key, alpha = image.info.get("transparency"), None
    if isinstance(key, int):
        alpha = Image.fromarray(np.where(stored == key, 0, 255).astype(np.uint8))
    return Image.fromarray(scaled), alpha


def _range(image: ImageFile, tags: Mapping[int, Any], low: float, high: float, name: str) -> tuple[float, float]:
    """Return the values of black and white in a deep grey image with values from `low` to `high`."""
    if image.mode.startswith("I;16"):
        return 0.0, 2.0 ** tags.get(258, (16,))[0] - 1
    if image.format == "PPM" and image.mode == "I":
        return 0.0, 65535.0  # Pillow has scaled them
    if high >= 2**31:
        return 0.0, 2.0**32 - 1
    if low < 0 or high > 65535:
        return low, high
    if image.mode == "F" and 1.1 < high < 32:
        message = f"{name} is an HDR image: its values reach {high:.3g}, where 1 or 255 would be white"
        raise InputError(message, hint="export it as JPEG or PNG")
    # The file does not state its range: the smallest usual one that holds all values.
    if image.mode == "F":
        return 0.0, next(top for top in (1.0, 255.0, 65535.0) if high <= max(top, 1.1))
    signed = tags.get(258, (32,))[0] == 16 and tags.get(339, (_UNSIGNED,))[0] == _SIGNED
    ranges = (32767.0,) if signed else (255.0, 65535.0)
    return 0.0, next(top for top in ranges if high <= top)


def _stated_profile(image: ImageFile) -> bytes | None:
    """Return a profile of what a file says of its colours elsewhere: a camera's EXIF, or the gamma of a PNG."""
    gamma = image.info.get("gamma")
    if isinstance(gamma, float) and gamma > 0 and abs(2.2 * gamma - 1) > 0.05 and "srgb" not in image.info:
        return _rgb_profile(_SRGB_PRIMARIES, 1 / gamma)
    if "exif" in image.info:
        with suppress(Exception):  # malformed
            exif = image.getexif()
            if exif.get_ifd(IFD.Exif).get(0xA001) == 2 or exif.get_ifd(IFD.Interop).get(1) == "R03":
                return _rgb_profile(_ADOBE_PRIMARIES, 563 / 256)
    return None


def _rgb_profile(primaries: tuple[float, ...], gamma: float) -> bytes:
    """Return an ICC profile: XYZ of red, green and blue, adapted to D50, and an exponent."""
    white, numbers = (0.9642, 1.0, 0.8249), struct.Struct(">4s4x3i")
    triples = [white, *(primaries[start : start + 3] for start in (0, 3, 6))]
    places = dict(zip((b"wtpt", b"rXYZ", b"gXYZ", b"bXYZ"), range(4), strict=True))
    body = b"".join(numbers.pack(b"XYZ ", *(round(65536 * value) for value in triple)) for triple in triples)
    curve = struct.pack(">4s4xIH2x", b"curv", 1, min(round(256 * gamma), 65535))
    text = struct.pack(">4s4xI6s79x3x", b"desc", 6, b"photo")
    start = 128 + 4 + 12 * 8
    entries = [(name, start + 20 * place, 20) for name, place in places.items()]
    entries += [(name, start + 80, 14) for name in (b"rTRC", b"gTRC", b"bTRC")] + [(b"desc", start + 96, 97)]
    table = struct.pack(">I", len(entries)) + b"".join(struct.pack(">4sII", *entry) for entry in entries)
    content = table + body + curve + text
    head = struct.pack(">I4xI4s4s4s12x4s28x", 128 + len(content), 0x02400000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    return head + numbers.pack(b"", *(round(65536 * value) for value in white))[8:] + b"\0" * 48 + content


def _halved(colours: Image.Image, alpha: Image.Image | None) -> tuple[Image.Image, Image.Image | None]:
    if alpha is None:
        return colours.reduce(2), None
    # Hidden colours do not mix with visible ones: Pillow multiplies by alpha first.
    both = Image.merge("RGBA", (*colours.convert("RGB").split(), alpha)).reduce(2)
    return both.convert("RGB") if colours.mode == "RGB" else both.getchannel("R"), both.getchannel("A")


def _apply_profile(image: Image.Image, profile: bytes | None, name: str, notes: list[str]) -> Image.Image:
    srgb = ImageCms.createProfile("sRGB")
    try:
        if profile:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(source):
                described = _SPACES.get(source.profile.xcolor_space, "")
                if described == "RGB" and image.mode == "L":
                    image = image.convert("RGB")
                return ImageCms.profileToProfile(image, source, srgb, outputMode="RGB") or image
        elif image.mode == "LAB":
            return ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), srgb, outputMode="RGB") or image
    except (ImageCms.PyCMSError, OSError, ValueError):
        notes.append(f"the colour profile in {name} could not be read and is left out")
    return image.convert("RGB")
