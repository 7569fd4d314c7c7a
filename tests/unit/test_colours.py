"""Colours of every mode in every format: the mean of a region is within 2 of 255 of the sRGB truth, or code 3."""

import numpy as np
import pytest
from PIL import Image, ImageCms

from e4t_cli.errors import InputError
from e4t_cli.images.loading import open_image
from tests.image_files import encoded, grey_profile, png, tiff

RED, BLUE, DARK, LIGHT, WHITE = (200, 40, 30), (30, 60, 200), 51, 204, 255
HALF = np.repeat([[False] * 40 + [True] * 40], 64, axis=0)  # (64, 80): False on the left


def halves(left, right, top=255):
    """Return an array whose left and right halves are two colours, of which `top` is the largest value."""
    left, right = (np.array(one) * top / 255 for one in (left, right))
    chosen = HALF if left.ndim == 0 else HALF[..., None]
    return np.where(chosen, right, left)


def image(mode, left, right):
    found = Image.new(mode, (80, 64), left)
    found.paste(right, (40, 0, 80, 64))
    return found


def seen(data):
    """Return the mean colours of the left and the right half."""
    pixels = np.asarray(open_image(data).image, dtype=float)
    assert pixels.shape == (64, 80, 3)
    return pixels[:, 4:36].mean((0, 1)), pixels[:, 44:76].mean((0, 1))


def srgb(light):
    """Return the sRGB value, 0 to 255, of linear light from 0 to 1."""
    return 255 * (12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055)


TWO, GREY = halves(RED, BLUE), halves(DARK, LIGHT)
RGBA = halves((*RED, 255), (*BLUE, 128))
OVER_WHITE = tuple(value * 128 / 255 + 127 for value in BLUE)
GREYS = (DARK, LIGHT)
COLOURS = (RED, BLUE)
NEGATIVE = (LIGHT, DARK)


def key(*values):
    return [(b"tRNS", b"".join(int(value).to_bytes(2, "big") for value in values))]


def planes(pixels):
    """Return a TIFF with one 16-bit plane for each channel: the same bytes in another order, read in rows."""
    apart = np.moveaxis(pixels, -1, 0).reshape(pixels.shape)
    return tiff(apart, 2, 16, tags=[(284, [2])])


GREY_TABLE = {
    **{f"png grey {depth}": (png(GREY * (2**depth - 1) // 255, 0, depth), GREYS) for depth in (4, 8)},
    "png grey 16": (png(GREY * 257, 0, 16), GREYS),
    "png grey 4, transparent": (png(halves(3, 12), 0, 4, key(3)), (WHITE, LIGHT)),
    "png grey 2, transparent": (png(halves(1, 2), 0, 2, key(1)), (WHITE, 170)),
    "png grey 8, transparent": (png(GREY, 0, 8, key(DARK)), (WHITE, LIGHT)),
    "png grey 16, transparent": (png(GREY * 257, 0, 16, key(DARK * 257)), (WHITE, LIGHT)),
    "png grey 16, another grey transparent": (png(GREY * 257, 0, 16, key(DARK * 257 + 1)), GREYS),
    "png grey and alpha 16": (png(halves((DARK, 255), (LIGHT, 0)) * 257, 4, 16), (DARK, WHITE)),
    "jpeg 2000 grey 16": (encoded(Image.fromarray((GREY * 257).astype(np.uint16)), "JPEG2000"), GREYS),
    "pgm 10": (b"P5 80 64 1023\n" + np.rint(halves(DARK, LIGHT, 1023)).astype(">u2").tobytes(), GREYS),
    "pgm 16, dark": (b"P5 80 64 65535\n" + halves(10, 200).astype(">u2").tobytes(), (0, 1)),
    "pfm": (b"Pf\n80 64\n-1.0\n" + halves(DARK, LIGHT, 1).astype("<f4").tobytes(), GREYS),
    "pfm, HDR": (b"Pf\n80 64\n-1.0\n" + halves(DARK, LIGHT, 4).astype("<f4").tobytes(), None),
}
for order in "<>":
    for depth in (4, 8, 16):
        top = 2**depth - 1
        if (depth, order) != (16, ">"):
            GREY_TABLE[f"tiff {depth}{order}, white is zero"] = (
                tiff(np.rint(halves(DARK, LIGHT, top)), 0, depth, order=order), NEGATIVE,
            )  # fmt: skip
        GREY_TABLE[f"tiff {depth}{order}"] = (tiff(np.rint(halves(DARK, LIGHT, top)), 1, depth, order=order), GREYS)
    GREY_TABLE[f"tiff float{order}"] = (tiff(halves(DARK, LIGHT, 1), 1, 32, 3, order), GREYS)
    GREY_TABLE[f"tiff float{order}, white is zero"] = (tiff(halves(DARK, LIGHT, 1), 0, 32, 3, order), NEGATIVE)
    GREY_TABLE[f"tiff signed 16{order}"] = (tiff(halves(DARK, LIGHT, 32767), 1, 16, 2, order), GREYS)
    GREY_TABLE[f"tiff signed 8{order}"] = (tiff(halves(DARK, LIGHT, 127), 1, 8, 2, order), None)
    for size in (16, 64):
        GREY_TABLE[f"tiff float {size}{order}"] = (tiff(halves(DARK, LIGHT, 1), 1, size, 3, order), None)
GREY_TABLE |= {
    "tiff 12": (tiff(halves(DARK, LIGHT, 4095), 1, 12), GREYS),
    "tiff 16>, white is zero": (tiff(GREY * 257, 0, 16, order=">"), None),
    "tiff unsigned 32": (tiff(halves(DARK, LIGHT, 2**32 - 1), 1, 32), GREYS),
    "tiff unsigned 32, white is zero": (tiff(halves(DARK, LIGHT, 2**32 - 1), 0, 32), None),
    "tiff float, HDR": (tiff(halves(DARK, LIGHT, 5), 1, 32, 3), None),
    "tiff float, just over 1": (tiff(halves(DARK, 255, 1.02), 1, 32, 3), (52, 255)),
    "tiff grey and alpha": (tiff(halves((DARK, 255), (LIGHT, 0)), 1, tags=[(338, [2])]), (DARK, WHITE)),
    "tiff grey and alpha 16": (tiff(halves((DARK, 255), (LIGHT, 0)) * 257, 1, 16, tags=[(338, [2])]), None),
}

COLOUR_TABLE = {
    "png rgb 8": (png(TWO, 2), COLOURS),
    "png rgb 16": (png(TWO * 257, 2, 16), COLOURS),
    "png rgb 8, transparent": (png(TWO, 2, 8, key(*RED)), (WHITE, BLUE)),
    "png rgb 16, transparent": (png(TWO * 257, 2, 16, key(*(257 * one for one in RED))), (WHITE, BLUE)),
    "png rgba 8": (png(RGBA, 6), (RED, OVER_WHITE)),
    "png rgba 16": (png(RGBA * 257, 6, 16), (RED, OVER_WHITE)),
    "png palette": (png(HALF, 3, 1, [(b"PLTE", bytes((*RED, *BLUE)))]), COLOURS),
    "png palette, transparent": (
        png(HALF, 3, 4, [(b"PLTE", bytes((*RED, *BLUE))), (b"tRNS", b"\xff\x80")]), (RED, OVER_WHITE),
    ),
    "tiff rgb 16": (tiff(TWO * 257, 2, 16), COLOURS),
    "tiff rgb 16, Motorola": (tiff(TWO * 257, 2, 16, order=">"), COLOURS),
    "tiff rgb 16, planes": (planes(TWO * 257), None),
    "tiff rgb float": (tiff(TWO / 255, 2, 32, 3), None),
    "tiff rgba": (tiff(RGBA, 2, tags=[(338, [2])]), (RED, OVER_WHITE)),
    "tiff rgba 16": (tiff(RGBA * 257, 2, 16, tags=[(338, [2])]), (RED, OVER_WHITE)),
    "tiff rgba, multiplied by alpha": (
        tiff(halves((*RED, 255), (15, 30, 100, 128)), 2, tags=[(338, [1])]), (RED, OVER_WHITE),
    ),
    "tiff rgb and an extra channel": (tiff(RGBA, 2, tags=[(338, [0])]), COLOURS),
    "tiff cmyk": (tiff(halves((0, 200, 200, 0), (200, 0, 0, 55)), 5), ((255, 55, 55), (43, 200, 200))),
    "tiff cmyk 16": (
        tiff(halves((0, 200, 200, 0), (200, 0, 0, 55)) * 257, 5, 16), ((255, 55, 55), (43, 200, 200)),
    ),
    # L* 50.2, a* 60 or -30, b* 40: L* has 255 steps, a* and b* are signed bytes.
    "tiff lab": (tiff(halves((128, 60, 40), (128, 226, 40)), 8), ((214, 60, 56), (80, 132, 44))),
    "tiff lab 16": (tiff(halves((128, 60, 40), (128, 226, 40)) * 257, 8, 16), None),
    "tiff ycbcr": (
        tiff(halves((128, 60, 196), (128, 128, 128)), 6, tags=[(530, [1, 1])]), ((223, 103, 8), (128, 128, 128)),
    ),
    "bmp rgba": (encoded(image("RGBA", (*RED, 255), (*BLUE, 255)), "BMP"), COLOURS),
    "bmp, alpha never written": (encoded(image("RGBA", (*RED, 0), (*BLUE, 0)), "BMP"), COLOURS),
    "gif": (encoded(image("RGB", RED, BLUE), "GIF"), COLOURS),
    "gif, transparent": (encoded(image("RGBA", (*RED, 255), (*BLUE, 0)), "GIF"), (RED, WHITE)),
    "ppm 10": (b"P6 80 64 1023\n" + np.rint(halves(RED, BLUE, 1023)).astype(">u2").tobytes(), COLOURS),
    **{f"{kind} rgb": (encoded(image("RGB", RED, BLUE), kind), COLOURS)
       for kind in ("JPEG", "WEBP", "AVIF", "TIFF", "JPEG2000")},
    **{f"{kind} rgba": (encoded(image("RGBA", (*RED, 255), (*BLUE, 128)), kind), (RED, OVER_WHITE))
       for kind in ("PNG", "WEBP", "AVIF", "TIFF", "JPEG2000")},
}  # fmt: skip


@pytest.mark.parametrize("row", [*GREY_TABLE, *COLOUR_TABLE])
def test_I4_colours(row):
    data, expected = (GREY_TABLE | COLOUR_TABLE)[row]
    if expected is None:
        with pytest.raises(InputError) as caught:
            open_image(data)
        assert caught.value.exit_code == 3 and caught.value.hint
        return
    for found, truth in zip(seen(data), expected, strict=True):
        assert np.abs(found - truth).max() <= 2


PROFILED = {
    "L": image("L", DARK, LIGHT),
    "LA": image("LA", (DARK, 255), (LIGHT, 255)),
    "LA, half transparent": image("LA", (DARK, 255), (LIGHT, 128)),
    "I;16": Image.fromarray((GREY * 257).astype(np.uint16)),
    "1": image("1", 0, 1),
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("mode", PROFILED)
def test_I10_grey_profiles_are_applied(mode, kind):
    """The values are linear light: 0.2 of white is 124 in sRGB."""
    data = encoded(PROFILED[mode], kind, icc_profile=grey_profile(1.0))
    assert open_image(data).notes == ()
    left, right = (0, 255) if mode == "1" else (srgb(DARK / 255), srgb(LIGHT / 255))
    if "half" in mode:
        right = right * 128 / 255 + 127
    for found, truth in zip(seen(data), (left, right), strict=True):
        assert np.abs(found - truth).max() <= 2


def test_I10_adobe_rgb_of_cameras_is_told_by_exif():
    """In place of a profile, cameras write the interoperability index R03 and a colour space that is not sRGB."""
    colours = np.array([RED, BLUE, (120, 120, 120)])
    adobe = np.array([[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]])
    ours = np.array([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]])
    light = np.clip(((colours / 255) ** (563 / 256)) @ adobe @ np.linalg.inv(ours), 0, 1)
    for index in ("R03", "R98"):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0xA001] = 65535
        exif.get_ifd(0x8769)[0xA005] = {1: index}
        for colour, expected in zip(colours, light, strict=True):
            data = encoded(Image.new("RGB", (64, 64), tuple(colour.tolist())), "WEBP", lossless=True, exif=exif)
            truth = [srgb(value) for value in expected] if index == "R03" else colour
            assert np.abs(np.array(open_image(data).image.getpixel((9, 9))) - truth).max() <= 2


@pytest.mark.parametrize(
    ("gamma", "left"), [(1.0, srgb(DARK / 255)), (1 / 1.8, srgb((DARK / 255) ** 1.8)), (0.45455, DARK)]
)
def test_I10_the_gamma_of_a_png_is_applied(gamma, left):
    chunk = (b"gAMA", round(100000 * gamma).to_bytes(4, "big"))
    for pixels, kind in ((GREY, 0), (halves((DARK,) * 3, (LIGHT,) * 3), 2)):
        found, _ = seen(png(pixels, kind, 8, [chunk]))
        assert np.abs(found - left).max() <= 2
        found, _ = seen(png(pixels, kind, 8, [(b"sRGB", b"\0"), chunk]))
        assert np.abs(found - DARK).max() <= 1


def test_I10_profiles_of_colours_on_greys_and_of_greys_on_colours():
    wide = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes().replace(
        "sRGB".encode("utf-16-be"), "mine".encode("utf-16-be")
    )  # fmt: skip
    for mode in ("L", "LA"):
        data = encoded(PROFILED[mode], icc_profile=wide)
        assert open_image(data).notes == ()
        assert np.abs(np.array(seen(data)) - [[DARK] * 3, [LIGHT] * 3]).max() <= 2
    data = encoded(image("RGB", RED, BLUE), icc_profile=grey_profile(1.0))
    assert "colour profile" in open_image(data).notes[0]
    assert np.abs(np.array(seen(data)) - [RED, BLUE]).max() <= 2


def test_what_is_nearly_all_opaque_is_no_cut_out():
    """The corners of a screenshot, or an alpha of 254 all over, are not the mask of the photo."""
    corners = Image.new("RGBA", (80, 64), (*RED, 255))
    for corner in ((0, 0), (76, 0), (0, 60), (76, 60)):
        corners.paste((0, 0, 0, 0), (*corner, corner[0] + 4, corner[1] + 4))
    for original in (corners, Image.new("RGBA", (80, 64), (*RED, 254))):
        opened = open_image(encoded(original))
        assert opened.alpha is None
        assert np.abs(np.array(opened.image.getpixel((40, 30))) - RED).max() <= 1
    assert open_image(encoded(corners)).image.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_images_of_pillow_keep_their_transparency(mode):
    original = image("RGBA", (90, 90, 90, 255), (60, 60, 60, 128))
    original = original.convert(mode) if mode[:2] != "La" else original.convert("LA").convert("La")
    opened = open_image(original)
    assert np.abs(np.array(opened.image.getpixel((60, 30))) - (60 * 128 / 255 + 127)).max() <= 2
    assert opened.alpha.getpixel((60, 30)) == 128


@pytest.mark.parametrize("value", [0, 1, 12])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_what_is_transparent_everywhere_is_refused(mode, value):
    if mode in ("RGBA", "LA"):
        data = encoded(Image.new(mode, (64, 64), (90,) * (len(mode) - 1) + (value,)))
    elif mode == "P":
        data = encoded(Image.new("P", (64, 64), 0), transparency=bytes([value]))
    else:
        data = encoded(Image.new(mode, (64, 64), (90,) * 3 if mode == "RGB" else 90),
                       transparency=(90,) * 3 if mode == "RGB" else 90)  # fmt: skip
    with pytest.raises(InputError, match="transparent everywhere") as caught:
        open_image(data)
    assert caught.value.exit_code == 3
    # One visible pixel in ten is a photo of something small.
    some = Image.new("RGBA", (64, 64), (90, 90, 90, value))
    some.paste((200, 40, 30, 255), (0, 0, 20, 20))
    assert open_image(encoded(some)).alpha is not None
