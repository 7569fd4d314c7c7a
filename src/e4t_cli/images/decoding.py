"""From a picture file's bytes to what the eye would see: upright, 8-bit, sRGB.

Orientation, transparency, 16-bit greys and colour profiles are turned into plain pixels; what
cannot be used is refused in one sentence. Metadata stays behind.
"""

from __future__ import annotations

import io
import warnings
from typing import NamedTuple

from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from e4t_cli.errors import InputError, printable

MAX_PIXELS = 64_000_000
MIN_SIDE = 64
# Formats of pictures that people have. Left out on purpose: those whose decoders run other
# programs (EPS) or that nobody photographs in.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "HEIF")
_HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}


class Decoded(NamedTuple):
    """RGB, sentences about what was done to it, and the transparency if there is any."""

    image: Image.Image
    notes: list[str]
    alpha: Image.Image | None


def decode(data: bytes, name: str) -> Decoded:
    """Turn a file's bytes into an upright 8-bit sRGB picture without metadata.

    Args:
        data: of the file.
        name: what messages call it.

    Raises:
        InputError: it is not a picture, or damaged, or too large, or too small.
    """
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
            if width * height > MAX_PIXELS:  # known from the header; nothing is decoded yet
                raise Image.DecompressionBombError
            if min(width, height) < MIN_SIDE:
                raise InputError(
                    f"{name} is {width}×{height}: {MIN_SIDE} pixels a side are the least"
                )
            frames = getattr(picture, "n_frames", 1)
            # A photo in MPO brings depth or brightness maps as further frames: not worth a note.
            if frames > 1 and picture.format != "MPO":
                notes.append(f"{name} has {frames} frames; the first is used")
            picture.seek(0)
            picture.load()  # `verify` would not notice a truncated JPEG
            return _upright_rgb(picture, name, notes)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise InputError(
            f"{name} has more than {MAX_PIXELS // 10**6} megapixels", hint="make it smaller first"
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


def _upright_rgb(picture: Image.Image, name: str, notes: list[str]) -> Decoded:
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
    if alpha is not None and alpha.getextrema()[0] == 255:
        alpha = None  # a channel that says nothing
    return Decoded(sheet, notes, alpha)


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
