"""Recognizes the format of an image file and opens its header; what is refused is named."""

from __future__ import annotations

import io
import re
import struct

from PIL import Image
from PIL.ImageFile import ImageFile

from e4t_cli.errors import InputError

# Formats of photos. Left out on purpose: those whose decoders run other programs (EPS).
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "PPM", "JPEG2000")
_HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"}
_AVIF_BRANDS = {b"avif", b"avis"}
_KNOWN = "JPEG, PNG, WebP, AVIF, HEIC, GIF, TIFF, BMP and PPM are"
_AS_IMAGE = "export it as JPEG or PNG"
_AS_8_BITS = "save it again as JPEG or PNG, with 8 bits"
_RAW = "a raw file of a camera"
# What files that are none of these begin with, and what helps.
_OTHERS = (
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL", _AS_IMAGE),
    (rb"\s*(<\?xml.*?)?(<!--.*?)?(<!DOCTYPE svg.*?)?<svg", "an SVG drawing", _AS_IMAGE),
    (rb"%PDF", "a PDF", _AS_IMAGE),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript", _AS_IMAGE),
    (rb"8BPS", "a Photoshop document", _AS_IMAGE),
    (rb"gimp xcf", "a GIMP document", _AS_IMAGE),
    (rb"....ftypcrx |FUJIFILMCCD-RAW|IIR[OS]\x08|IIU\0", _RAW, _AS_IMAGE),
    (rb"v/1\x01|#\?RADIANCE|II\xbc", "an HDR image", _AS_IMAGE),
    (rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", "a video", "save one of its frames as JPEG or PNG"),
    (rb"\s*<(!DOCTYPE html|html)", "a web page", "download the image itself, not the page around it"),
    (rb"version https://git-lfs", "a pointer of git-lfs", "git lfs pull fetches the image"),
)


def open_header(data: bytes, name: str) -> ImageFile:
    """Open a file of an image, of which nothing is decoded yet.

    Pillow's own `open` has a limit of 179 megapixels and a warning below that for the whole process.

    Raises:
        InputError: it is in no known format, or a needed package is missing.
        Exception: any, from hostile bytes.
    """
    Image.init()
    recognized = ""
    factories = [(known, *Image.OPEN[known]) for known in _FORMATS if known in Image.OPEN]
    if _is_heic(data):
        try:
            from pi_heif import HeifImageFile
        except ImportError:
            message = f"{name} is a HEIC image, which needs one more package"
            raise InputError(message, hint="pip install 'e4t[heic]'") from None
        factories = [("HEIC", HeifImageFile, None)]
    for known, factory, accept in factories:
        if accept is not None and accept(data[:16]) is not True:
            continue
        recognized = known
        try:
            image = factory(io.BytesIO(data), "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # as Pillow's `open` catches them
            continue
        if known == "TIFF":
            _check_tiff(image, data, name)
        return image
    if recognized:
        message = f"{name} is a {recognized} file that cannot be read: damaged, or of a rare kind"
        raise InputError(message, hint=_AS_8_BITS)
    for start, what, hint in _OTHERS:
        if re.match(start, data[:2000], re.DOTALL | re.IGNORECASE):
            raise InputError(f"{name} is {what}, not an image in a known format", hint=hint)
    raise InputError(f"{name} is not an image in a known format", hint=_KNOWN)


def _is_heic(data: bytes) -> bool:
    if data[4:8] != b"ftyp":
        return False
    size = min(int.from_bytes(data[:4], "big"), 256)
    brands = {data[8:12], *(data[start : start + 4] for start in range(16, size, 4))}
    return data[8:12] in _HEIC_BRANDS and not brands & _AVIF_BRANDS


def has_hdr_transfer(data: bytes) -> bool:
    """Whether a PNG, AVIF or HEIC has the values of an HDR screen (PQ or HLG), which look pale as sRGB."""
    found = re.search(rb"cICP.(.)|nclx..\0(.)", data[:8192], re.DOTALL)
    return found is not None and (found[1] or found[2]) in (b"\x10", b"\x12")


def _check_tiff(image: ImageFile, data: bytes, name: str) -> None:
    """Refuse what Pillow reads wrongly: planes of 16 bits as 8, the small preview in DNG, NEF and ARW as the photo."""
    tags = getattr(image, "tag_v2", {})
    new_subfile_type, dng_version = tags.get(254, 0), tags.get(50706)
    if dng_version or data[8:10] == b"CR" or (isinstance(new_subfile_type, int) and new_subfile_type & 1):
        raise InputError(f"{name} is {_RAW}: only a small preview in it can be read", hint=_AS_IMAGE)
    if tags.get(284) == 2 and tags.get(258, (8,))[0] > 8 and image.tile and image.tile[0].codec_name == "raw":
        raise InputError(f"{name} is a TIFF with its 16-bit channels apart, which cannot be read", hint=_AS_8_BITS)
