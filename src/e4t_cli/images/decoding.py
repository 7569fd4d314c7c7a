"""Decodes an image file to upright 8-bit sRGB pixels without metadata.

Orientation, transparency, 16-bit greys and colour profiles are applied.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass

from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from e4t_cli.errors import InputError, printable

MAX_PIXELS, MIN_SIDE = 64_000_000, 64
# Formats of photos. Left out on purpose: those whose decoders run other programs (EPS).
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "HEIF")
_HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}


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
        InputError: it is not an image, or damaged, or too large, or too small.
    """
    if not data:
        raise InputError(f"{name} is empty")
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS:
        try:
            import pi_heif
        except ImportError:
            message = f"{name} is a HEIC image, which needs one more package"
            raise InputError(message, hint="pip install 'e4t[heic]'") from None
        pi_heif.register_heif_opener()
    Image.init()
    formats = [known for known in _FORMATS if known in Image.OPEN]
    notes: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata
            # Pillow only warns between 89 and 179 megapixels.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=formats)
            width, height = image.size
            if width * height > MAX_PIXELS:  # known from the header; nothing is decoded yet
                raise Image.DecompressionBombError
            if min(width, height) < MIN_SIDE:
                raise InputError(f"{name} is {width}×{height}: {MIN_SIDE} pixels a side are the minimum")
            frames = getattr(image, "n_frames", 1)
            # The further frames of a photo in MPO are depth or brightness maps: not worth a note.
            if frames > 1 and image.format != "MPO":
                notes.append(f"{name} has {frames} frames; the first is used")
            image.seek(0)
            image.load()  # `verify` does not detect a truncated JPEG
            upright, alpha = _upright_rgb(image, name, notes)
        return OpenedImage(upright, tuple(notes), hashlib.sha256(data).hexdigest(), alpha)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        message = f"{name} has more than {MAX_PIXELS // 10**6} megapixels"
        raise InputError(message, hint="make it smaller first") from None
    except UnidentifiedImageError:
        hint = "JPEG, PNG, WebP, AVIF, GIF, TIFF, BMP and PPM are"
        raise InputError(f"{name} is not an image in a known format", hint=hint) from None
    except InputError:
        raise
    except Exception as error:  # hostile bytes make decoders raise any exception
        raise InputError(f"{name} is damaged: {printable(str(error), limit=120)}") from error


def _upright_rgb(image: Image.Image, name: str, notes: list[str]) -> tuple[Image.Image, Image.Image | None]:
    profile = image.info.get("icc_profile")
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # malformed EXIF is no reason to refuse a good image
        notes.append(f"the orientation written in {name} could not be read")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bit_grey(image, name)
    alpha = None
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    if image.mode not in ("RGB", "L", "CMYK", "LAB"):
        image = image.convert("RGB")  # colours only: the profile does not cover alpha
    image = _to_srgb(image, profile, name, notes)
    # Onto white: hidden colours do not show through, and metadata is dropped.
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, mask=alpha)
    opaque = alpha is None or alpha.getextrema()[0] == 255
    return canvas, None if opaque else alpha


def _eight_bit_grey(image: Image.Image, name: str) -> Image.Image:
    """Scale 16-bit, 32-bit and floating greys to 8 bits; Pillow's own conversion would clip."""
    import numpy as np

    values = np.asarray(image, dtype=np.float32)  # 64 megapixels stay under 0.3 GB
    if not np.isfinite(values).all():
        raise InputError(f"{name} contains values that are not finite")
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16"):
        low, high = 0.0, 65535.0
    elif low >= 0 and high <= 65535:
        # The file does not state its range: the smallest usual one that holds all values.
        ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        low, high = 0.0, next(top for top in ranges if high <= top)
    return Image.fromarray(np.rint((values - low) * (255.0 / max(high - low, 1e-12))).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None, name: str, notes: list[str]) -> Image.Image:
    srgb = ImageCms.createProfile("sRGB")
    try:
        if profile:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(source):
                return ImageCms.profileToProfile(image, source, srgb, outputMode="RGB") or image
        elif image.mode == "LAB":
            return ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), srgb, outputMode="RGB") or image
    except (ImageCms.PyCMSError, OSError, ValueError):
        notes.append(f"the colour profile in {name} could not be read and is left out")
    return image.convert("RGB")
