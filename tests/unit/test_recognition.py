"""What is no photo is refused with its name and what helps; what looks like one is read by its content."""

import numpy as np
import pytest
from PIL import Image

from e4t_cli.errors import InputError
from e4t_cli.images.loading import open_image
from tests.image_files import encoded, png, tiff

REST = b"\0" * 99
REFUSED = {
    "JPEG XL": [b"\xff\x0a" + REST, b"\0\0\0\x0cJXL \r\n\x87\n" + REST],
    "an SVG drawing": [
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"<?xml version='1.0'?>\n<!-- made by hand -->\n<svg/>",
        b'<?xml version="1.0"?><!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "svg11.dtd"><svg></svg>',
    ],
    "a PDF": [b"%PDF-1.7\n"],
    "PostScript": [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\nshowpage\n"],
    "a Photoshop document": [b"8BPS\0\1" + REST],
    "a GIMP document": [b"gimp xcf v011\0" + REST],
    "a raw file of a camera": [
        b"\0\0\0\x18ftypcrx " + REST,
        b"FUJIFILMCCD-RAW 0201" + REST,
        b"IIU\0\x18\0\0\0" + REST,
        tiff(np.zeros((64, 64)), 1, tags=[(254, [1])]),  # as in NEF and ARW: the first image is a small preview
        tiff(np.zeros((64, 64)), 1, tags=[(50706, [1, 4, 0, 0])]),  # DNG
    ],
    "an HDR image": [b"v/1\x01" + REST, b"#?RADIANCE\n" + REST, b"II\xbc\x01" + REST],
    "a video": [b"\0\0\0\x18ftypqt  " + REST, b"\0\0\0\x18ftypisom" + REST, b"\x1aE\xdf\xa3" + REST],
    "a web page": [b"<!DOCTYPE html>\n<html>", b"\n<html lang='en'>"],
    "a pointer of git-lfs": [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"],
}


@pytest.mark.parametrize(("what", "data"), [(what, data) for what, found in REFUSED.items() for data in found])
def test_other_kinds_of_files_are_named(what, data):
    with pytest.raises(InputError) as caught:
        open_image(data)
    assert caught.value.exit_code == 3
    assert f"is {what}" in caught.value.message and caught.value.hint


def test_a_known_format_that_cannot_be_opened_is_named():
    for data, what in {
        encoded(Image.new("RGB", (64, 64)), "TIFF")[:20]: "a TIFF file",
        b"\x89PNG\r\n\x1a\n" + REST: "a PNG file",
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + REST: "a HEIC",
        b"\xff\xd8\xff\xe0" + b"\0" * 8: "a JPEG file",
    }.items():
        with pytest.raises(InputError, match=what) as caught:
            open_image(data)
        assert caught.value.hint


def test_the_content_decides_not_the_name(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(Image.new("RGB", (64, 64), "teal"), "WEBP", lossless=True))
    assert open_image(path).image.getpixel((5, 5)) == (0, 128, 128)


def test_avif_in_a_general_container_needs_no_heic_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pi_heif", None)
    data = bytearray(encoded(Image.new("RGB", (64, 64), "teal"), "AVIF"))
    data[8:12] = b"mif1"  # with avif among the compatible brands
    assert b"avif" in data[16:32]
    assert np.abs(np.array(open_image(bytes(data)).image.getpixel((5, 5))) - (0, 128, 128)).max() <= 2


@pytest.mark.parametrize(("transfer", "pale"), [(16, True), (18, True), (13, False), (1, False)])
def test_hdr_screenshots_are_noted(transfer, pale):
    data = png(np.full((64, 64, 3), 90), 2, 8, [(b"cICP", bytes((9, transfer, 0, 1)))])
    avif = bytearray(encoded(Image.new("RGB", (64, 64), (90, 90, 90)), "AVIF"))
    start = avif.index(b"nclx")
    avif[start + 6 : start + 8] = bytes((0, transfer))
    for one in (data, bytes(avif)):
        assert any("HDR" in note for note in open_image(one).notes) == pale
