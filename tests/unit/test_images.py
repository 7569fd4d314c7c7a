"""Reading image files: rows I1-I10 and I12 of the reliability table; I11 is in tests/domains."""

import base64
import hashlib
import io
import os
import random
import struct
import sys
import warnings
import zlib
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw, ImageFile
from PIL.PngImagePlugin import PngInfo

from e4t_cli.errors import E4TError, InputError, ResourceError, UsageError
from e4t_cli.images import decoding
from e4t_cli.images.loading import center_square, image_sha256, open_image, open_mask, prepare_image
from e4t_cli.registry.config import TuningConfig
from e4t_cli.registry.domain import Domain, PreparationTarget, PreparedImage
from tests.image_files import encoded


def gradient(width=80, height=70):
    """An image in which every corner differs, with smooth changes that JPEG keeps."""
    x = np.linspace(0, 200, width)[None, :] + np.zeros((height, 1))
    y = np.linspace(0, 180, height)[:, None] + np.zeros((1, width))
    return Image.fromarray(np.stack([x, y, 220 - x], axis=-1).astype(np.uint8))


def largest_difference(a, b):
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


# ---- what comes in ---------------------------------------------------------------------------


def test_path_bytes_file_and_stdin_are_one(tmp_path, monkeypatch):
    data = encoded(gradient())
    path = tmp_path / "ich & ü.png"
    path.write_bytes(data)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    for source in (path, str(path), data, io.BytesIO(data), "-"):
        opened = open_image(source)
        assert largest_difference(opened.image, gradient()) == 0
        assert opened.sha256 == hashlib.sha256(data).hexdigest()
        assert opened.notes == ()


def test_I9_files_that_are_no_image(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for name, message in {
        "empty.png": "is empty",
        "text.png": "not an image",
        ".": "is a folder",
        "fifo": "not a plain file",
    }.items():
        with pytest.raises(InputError, match=message):
            open_image(tmp_path / name)
    for wrong in (tmp_path / "missing.png", "nul\0byte.png"):
        with pytest.raises(UsageError):
            open_image(wrong)
    with pytest.raises(UsageError, match="not fetched") as caught:
        open_image("https://example.org/me.jpg")
    assert caught.value.hint == "curl -L -o photo.jpg 'https://example.org/me.jpg'"


def test_formats_that_run_programs_are_not_opened():
    with pytest.raises(InputError, match="not an image"):
        open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\nshowpage\n")


def test_escape_sequences_in_names_are_escaped(tmp_path):
    path = tmp_path / "\x1b[31m.png"
    path.write_bytes(b"?")
    with pytest.raises(InputError) as caught:
        open_image(path)
    assert "\x1b" not in str(caught.value)


# 96×64 pixels: red above green on the left half, blue on the right one.
HEIC = base64.b85decode(
    "0000SW^{RQXk}?*00000ZE0pPXk}?*ZE0a<00042ZDn*}000000000XXk=`10000000000aA{+70000000000000"
    "0000000B57=IV*mgE07O6l0RRC200001dH?|c00000006}R001LtX>Mi!000000RR916=`l}WdZ;I000310BCk&F"
    "#rGn01j|zbZr0t000010002iX>f9I0002DX>en20001ZXm(>m0RwOV0058x000009`FGC{rLC*01pFT0096PKmiN"
    "^|NjGU00093kN^M!000939=ZZRVE_RDD?$MQ18@KU0|1Z!00RI30{|YNFo6Y@>PacCZUPz%2mk;B0LTCU0{{p>Vg"
    "LaE2SfqEa<C#m0000JV{dG7ZewhC0096E00w{n000zeb8uw<00000003YB002M$000nhX?SS>000032nYxO000+h"
    "aBX1#00000000310R({p0|Wp70L^V=VRQfh0Kq5$uL<Dd_S)IYs{jAvN&o-f(0LEoCOSwZKmM9_o%{y-|MgfarL@"
    "oJaI-a?ccFUv5y1=H(z#g&a<&6dLX$N85kgDM8L!jLT+YUQu?Z|cf-*nyPyhbxpP}7qf89Sd%AbMoQYLw@H<+JKy"
    "0F<C<ES~$^IEWGSL#vYd>+5QdoSume!l0yCW+4fr3;5g?5W=a3heJrd8XLK_*3t-yM43{enDh(rEu?Ou}Q(Yx?(w"
    "H|Hysz9lh5FPK7)"
)


# Three images of 96×64, red, blue and green, of which the second is the primary one; written with pillow-heif 1.8.1,
# `HeifFile.save(buffer, quality=90, primary_index=1)`.
HEIC_OF_THREE = base64.b85decode(
    "0000SW^{RQXk}?*00000ZE0pPXk}?*ZE0a<0006$ZDn*}000000000XXk=`10000000000aA{+70000000000000"
    "0000000MrmwsV*mgE07O6l0{{U400002VgLaE00000001EX0ssI200M&m0RR9100000Apipa00002qyPZ`000000"
    "01Wd002#CX>Mi!000000{{R36=`l}WdZ;I000310BCk&F#rGn02OI&W@Q2Z00002003xqV=({#000$fZf0cy0000"
    "00{{SMc4ILB0000EaA|aH0000000IC20dQ$>a&Q0u0YhnUV{ZTe0C;G2V?zN0Z~y=RkN^Mx0018F0Q~*<_y7P817"
    "H9F02n|43<3ZD18@KU0|1Z!00RI30{|Yn0zhE^0RSsP0RaPW00093kN^M!000939-uIR1(xbbDXwk;8Vm>k00RKX"
    "000932tZ;00RRU?0l{*xB0vBD025<xY;ta6Y<K_x01W^JfB*mh6lrsCWdHyG00000U;qFBKmY&$5O8UDX#fBK00R"
    "gJ2mk;8cxZNGLjePD0001x0000003PrF{Qda&000jIU;qIC7(f9G0ssF4Z~y=U0FVFx0{{R603NymKw$s@04qWP0"
    "RwOV00RJ!0009300RIXpb#KoWxA3|Yny<Eg8~2m0{}7r00RI55MlrU00%??!E&%7KmY&$6lrsCWdHyG00000fB*m"
    "hU;qFBC24SNVE_OC000000{{U8fdT^r00IPo0s{m90|bQv1_S^A0C8<(VRQfh039d+uLd|;{QWohmIwd;vW$8k=%"
    "6aA#3nxX%J+T%0012*0j~x)TKxSt`gRBTAK>(V|LgFouMn8~-z(kt0000ZC;_hqI9mMuH}ZJj|Ni!K|NnBIs=PvD"
    "?(%hN^KPEy1FsA"
)


def test_I7_heic_names_the_package_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    with pytest.raises(InputError, match="HEIC") as caught:
        open_image(HEIC)
    assert caught.value.hint == "pip install 'e4t[heic]'"


def test_I7_heic_is_read_with_the_extra():
    pytest.importorskip("pi_heif")
    opened = open_image(HEIC).image
    assert opened.size == (96, 64)
    for place, colour in {
        (20, 12): (200, 40, 40),
        (20, 50): (40, 180, 60),
        (70, 30): (40, 40, 200),
    }.items():
        assert all(abs(a - b) < 25 for a, b in zip(opened.getpixel(place), colour, strict=True))
    with pytest.raises(InputError):
        open_image(HEIC[:300])


def test_I7_the_primary_image_of_a_heic_is_read():
    pytest.importorskip("pi_heif")
    opened = open_image(HEIC_OF_THREE)
    assert largest_difference(opened.image, Image.new("RGB", (96, 64), (30, 60, 200))) <= 2
    assert opened.notes == ("the image has 3 images; the main one is used",)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_I1_truncated(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    with pytest.raises(InputError):
        open_image(data[: len(data) * 2 // 3])


JPEGS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_blocks": 1},
    "rows and restart markers": {"progressive": True, "restart_marker_rows": 1},
    "own tables": {"optimize": True, "quality": 30},
    "not subsampled": {"subsampling": 0},
}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_I1_a_jpeg_is_whole_or_refused_wherever_it_is_cut(mode, options):
    data = encoded(PATTERN.convert(mode), "JPEG", **options)
    whole = open_image(data)
    for tail in (b"", b"\0" * 40):
        opened = open_image(data[:-2] + tail)
        assert largest_difference(opened.image, whole.image) == 0
        assert opened.notes == ("the image lacks its end marker; no pixel is missing",)
    scans = [at for at in range(len(data) // 3, len(data)) if data[at : at + 2] == b"\xff\xda"]
    for end in (*range(len(data) - 45, len(data)), *scans):
        for tail in (b"", b"\0" * 4000):  # also of a download whose length was set before
            try:
                opened = open_image(data[:end] + tail)
            except InputError as error:
                assert "truncated" in error.message
            else:
                assert largest_difference(opened.image, whole.image) == 0


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "AVIF"])
def test_I1_downloads_that_are_not_finished_are_noticed(kind):
    """Programs that set the length first leave zeros, which decoders take for pixels."""
    data = encoded(PATTERN, kind)
    whole = open_image(data)
    for end in range(len(data) // 4, len(data) - 8, len(data) // 20):
        try:
            opened = open_image(data[:end] + b"\0" * 2000)
        except InputError:
            continue
        assert "download" in opened.notes[0]
    opened = open_image(data + b"\0" * 60)  # padded
    assert opened.notes == () and largest_difference(opened.image, whole.image) == 0
    if kind == "PNG":
        assert largest_difference(open_image(data + b"\0" * 5000).image, whole.image) == 0


def test_I1_what_follows_the_first_image_of_an_mpo_may_be_missing():
    """As when a messenger strips the depth or gain map of a phone's photo."""
    data = encoded(gradient(), "MPO", save_all=True, append_images=[gradient(64, 64)])
    first = data.index(b"\xff\xd9") + 2
    for end in (len(data), len(data) - 200, first):
        opened = open_image(data[:end])
        assert opened.notes == ()
        assert largest_difference(opened.image, gradient()) <= 12


def test_damaged_bytes_give_an_image_or_an_input_error():
    """Three hundred damaged files of every format: nothing but InputError comes out."""
    rng = random.Random(0)
    options = {"icc_profile": swapped_profile(), "exif": Image.Exif()}
    options["exif"][0x0112] = 6
    sound = [
        encoded(gradient(), kind, **(options if kind in ("JPEG", "PNG", "WEBP") else {}))
        for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM")
    ]
    refused = 0
    for _ in range(300):
        data = bytearray(rng.choice(sound))
        reach = min(len(data), rng.choice((60, 400, 10**6)))
        for _ in range(rng.choice((1, 3, 20))):
            data[rng.randrange(reach)] = rng.randrange(256)
        try:
            opened = open_image(bytes(data))
        except InputError:
            refused += 1
        else:
            assert opened.image.mode == "RGB"
    assert 0 < refused < 300


def png_header(width, height):
    """A PNG that declares a size and holds nothing."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [16_001, 20_000, 2**31 - 1])
def test_I2_bombs_are_known_by_their_header(side):
    with pytest.raises(InputError, match="256 megapixels"):
        open_image(png_header(side, side))


PATTERN = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 12, 3), dtype=np.uint8)).resize((96, 80))


MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "L", "RGBA", "P", "I;16", "1"),
    "TIFF": ("RGB", "L", "RGBA", "CMYK", "P", "LAB", "I;16", "1"),
    "WEBP": ("RGB", "RGBA"),
}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
def test_I2_photos_of_many_megapixels_are_halved(kind, mode, monkeypatch):
    """As those of 64 to 256 megapixels are, here with a limit a test can afford."""
    image = PATTERN.convert("L" if mode in ("I;16", "1") else "RGB")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    elif mode == "LAB":
        to_lab = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
        image = ImageCms.profileToProfile(image, *to_lab, outputMode="LAB")
    image = image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(image, kind, exif=exif, **({"quality": 100} if kind == "JPEG" else {}))
    whole = open_image(data)
    assert whole.image.size == (80, 96) and whole.notes == ()
    monkeypatch.setattr(decoding, "MAX_DECODED", 96 * 80 - 1)
    opened = open_image(data)
    assert opened.image.size == (40, 48)
    # Of TIFF, Pillow tells the size that it has after the orientation is applied.
    sizes = "80×96 to 40×48" if kind == "TIFF" else "96×80 to 48×40"
    assert opened.notes == (f"the image was reduced from {sizes}",)
    expected = np.asarray(whole.image.reduce(2), dtype=int)
    assert np.abs(np.asarray(opened.image) - expected).mean() < (4 if kind == "JPEG" else 1)


def test_I2_hidden_colours_do_not_mix_in_when_halved(monkeypatch):
    original = Image.new("RGBA", (80, 80), (255, 0, 0, 0))
    original.paste((0, 0, 255, 255), (0, 0, 41, 80))
    monkeypatch.setattr(decoding, "MAX_DECODED", 80 * 80 - 1)
    opened = open_image(encoded(original))
    assert opened.image.getpixel((20, 9)) == (127, 127, 255)
    assert opened.alpha.getpixel((20, 9)) == 128 and opened.alpha.size == (40, 40)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(12_000, 9_000), (16_384, 12_288)])
def test_I2_photos_of_phones_with_108_and_200_megapixels(size):
    opened = open_image(encoded(Image.new("L", size, 90), "JPEG"))
    assert opened.image.size == (size[0] // 2, size[1] // 2)
    assert opened.image.getextrema() == ((90, 90),) * 3


def test_I2_too_little_memory_has_a_code_of_its_own(monkeypatch):
    def load(self):
        raise MemoryError

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(ResourceError, match="not enough memory"):
        open_image(encoded(gradient()))


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (1, 5000), (5000, 63)])
def test_I3_too_small(size):
    with pytest.raises(InputError, match="64 pixels a side"):
        open_image(encoded(Image.new("RGB", size)))


# ---- colours ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "RGBA", "LA"])
def test_I4_modes(mode):
    original = gradient().convert("L" if mode in ("1", "LA") else "RGB").convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    opened = open_image(encoded(original, kind)).image
    assert opened.mode == "RGB"
    assert largest_difference(opened, original.convert("RGB")) == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_I4_transparency_shows_white_not_hidden_colours(mode):
    original = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    original.paste((0, 0, 255, 255), (0, 0, 32, 64))
    original.paste((0, 0, 0, 128), (32, 32, 64, 64))
    opened = open_image(encoded(original.convert(mode))).image
    assert opened.getpixel((60, 5)) == (255, 255, 255)
    assert all(abs(value - 127) <= 1 for value in opened.getpixel((60, 60)))


def test_I4_transparent_palette():
    original = Image.new("P", (64, 64), 1)
    original.putpalette([10, 20, 30, 200, 100, 50])
    original.paste(0, (0, 0, 32, 64))
    opened = open_image(encoded(original, transparency=0)).image
    assert opened.getpixel((5, 5)) == (255, 255, 255)
    assert opened.getpixel((60, 5)) == (200, 100, 50)


RAMP = np.tile(np.linspace(0.0, 1.0, 80), (64, 1))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ((RAMP * 65535).astype(np.uint16), "PNG"),
        ((RAMP * 65535).astype(np.uint16), "TIFF"),
        ((RAMP * 65535).astype(np.int32), "TIFF"),
        ((RAMP * 255).astype(np.int32), "TIFF"),
        ((RAMP * 2e9).astype(np.int32), "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
        ((RAMP * 255).astype(np.float32), "TIFF"),
        ((RAMP * 2 - 1).astype(np.float32), "TIFF"),
    ],
    ids=["u16-png", "u16-tiff", "i32-16bit", "i32-8bit", "i32-wide", "f-unit", "f-255", "f-signed"],
)
def test_I5_deep_greys_are_scaled_not_clipped(values, kind):
    opened = np.asarray(open_image(encoded(Image.fromarray(values), kind)).image) / 255
    assert np.abs(opened - RAMP[..., None]).max() <= 1 / 255


def test_I5_greys_that_are_not_finite():
    values = RAMP.astype(np.float32)
    values[3, 3] = np.nan
    with pytest.raises(InputError, match="not finite"):
        open_image(encoded(Image.fromarray(values), "TIFF"))


def swapped_profile():
    """An ICC profile that differs from sRGB: red and green change places."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = data.index(b"rXYZ"), data.index(b"gXYZ")
    data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
    for start in range(len(data) - 8):  # its description would say "sRGB", in UTF-16
        if data[start : start + 8] == "sRGB".encode("utf-16-be"):
            data[start : start + 8] = "swap".encode("utf-16-be")
    return bytes(data)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_I10_colour_profiles_are_applied(mode):
    original = Image.new(mode, (64, 64), (200, 30, 60, 255)[: len(mode)])
    opened = open_image(encoded(original, icc_profile=swapped_profile()))
    assert opened.notes == ()
    assert largest_difference(opened.image, Image.new("RGB", (64, 64), (30, 200, 60))) <= 2


# Colorants of Display P3 and of sRGB in an ICC profile: XYZ, adapted to D50, of red, green, blue.
P3 = [[0.51512, 0.24120, -0.00105], [0.29198, 0.69225, 0.04189], [0.15710, 0.06657, 0.78407]]
SRGB = [[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]]


def display_p3():
    """An ICC profile as a phone writes it: the curve of sRGB with the primaries of P3."""
    data = bytearray(swapped_profile())
    for number in range(struct.unpack(">I", data[128:132])[0]):
        tag, offset, _ = struct.unpack(">4sII", data[132 + 12 * number : 144 + 12 * number])
        if tag in (b"rXYZ", b"gXYZ", b"bXYZ"):
            values = [round(x * 65536) for x in P3[b"rgb".index(tag[:1])]]
            data[offset + 8 : offset + 20] = struct.pack(">3i", *values)
    return bytes(data)


@pytest.mark.parametrize("colour", [(200, 100, 50), (90, 160, 110), (128, 128, 128)])
def test_I10_display_p3_becomes_srgb(colour):
    light = np.array(colour) / 255
    light = np.where(light <= 0.04045, light / 12.92, ((light + 0.055) / 1.055) ** 2.4)
    light = light @ np.array(P3) @ np.linalg.inv(np.array(SRGB))
    expected = np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.abs(light) ** (1 / 2.4) - 0.055)
    for kind in ("PNG", "JPEG"):
        opened = open_image(encoded(Image.new("RGB", (64, 64), colour), kind, icc_profile=display_p3()))
        assert opened.notes == ()
        assert np.abs(np.array(opened.image.getpixel((9, 9))) - 255 * expected).max() <= 3
    if len(set(colour)) > 1:
        assert np.abs(255 * expected - np.array(colour)).max() > 5  # the difference would be visible


def test_I4_cmyk_jpegs_as_printers_make_them():
    original = Image.new("CMYK", (64, 64), (0, 200, 200, 10))
    opened = open_image(encoded(original, "JPEG", quality=95)).image
    red, green, blue = opened.getpixel((9, 9))
    assert red > 200 and green < 90 and blue < 90


def test_I3_panoramas_are_accepted():
    opened = open_image(encoded(Image.new("RGB", (6000, 70), "teal"), "JPEG"))
    assert opened.image.size == (6000, 70)
    prepared = prepare_image(domain_with(None), opened.image, PreparationTarget(size=512, base="sd14"))
    assert prepared.image.size == (512, 512)
    assert "6000×70, smaller than the 512 pixels" in prepared.notes[0]


def test_I4_what_is_opaque_is_remembered():
    original = Image.new("RGBA", (64, 80), (10, 20, 30, 255))
    assert open_image(encoded(original)).alpha is None
    original.paste((0, 0, 0, 0), (0, 0, 64, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # held sideways: the alpha is turned with the image
    alpha = open_image(encoded(original, exif=exif)).alpha
    assert alpha.size == (80, 64)
    assert alpha.getpixel((75, 30)) == 0 and alpha.getpixel((30, 30)) == 255


def test_I10_srgb_profile_changes_nothing_and_a_broken_one_is_noted():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert largest_difference(open_image(encoded(gradient(), icc_profile=srgb)).image, gradient()) == 0
    opened = open_image(encoded(gradient(), icc_profile=b"no profile"))
    assert "colour profile" in opened.notes[0]
    assert largest_difference(opened.image, gradient()) == 0


# ---- geometry, frames, metadata --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_I8_all_orientations_give_the_same_pixels(kind):
    upright = gradient()
    # How a camera held that way stores the image: the inverse of the tag's rotation.
    stored = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    for tag, turns in stored.items():
        original = upright
        for turn in turns:
            original = original.transpose(turn)
        exif = Image.Exif()
        exif[0x0112] = tag
        exif[0x010F] = "a camera with a serial number"
        options = {"quality": 95} if kind == "JPEG" else {}
        opened = open_image(encoded(original, kind, exif=exif, **options)).image
        assert opened.size == upright.size
        assert largest_difference(opened, upright) <= (12 if kind == "JPEG" else 0)
        assert not opened.info
        assert not dict(opened.getexif())


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
ROTATED = Image.Exif()
ROTATED[0x0112] = 6
ROTATED = ROTATED.tobytes()


def raw_profile(kind, content):
    """Metadata as ImageMagick writes it into PNG: hexadecimal text."""
    lines = [content.hex()[start : start + 72] for start in range(0, 2 * len(content), 72)]
    info = PngInfo()
    info.add_text(
        f"Raw profile type {kind}", f"\n{kind.lower()}\n{len(content):8}\n" + "\n".join(lines) + "\n", zip=True
    )
    return {"pnginfo": info}


def in_text(key, content):
    info = PngInfo()
    info.add_itxt(key, content.decode())
    return {"pnginfo": info}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {"exif": ROTATED}),
        ("PNG", raw_profile("exif", ROTATED)),
        ("PNG", raw_profile("APP1", ROTATED)),
        ("PNG", raw_profile("APP1", b"http://ns.adobe.com/xap/1.0/\0" + XMP)),
        ("PNG", raw_profile("xmp", XMP)),
        ("PNG", in_text("XML:com.adobe.xmp", XMP)),
        ("JPEG", {"xmp": XMP}),
        ("WEBP", {"exif": ROTATED}),
        ("WEBP", {"xmp": XMP}),
        ("AVIF", {"exif": ROTATED}),
        ("TIFF", {"exif": ROTATED}),
        ("TIFF", {"exif": ROTATED, "compression": "tiff_lzw"}),
    ],
)
def test_I8_the_orientation_is_read_wherever_it_is_written(kind, options):
    stored = gradient().transpose(Image.Transpose.ROTATE_90)
    opened = open_image(encoded(stored, kind, **options))
    assert opened.image.size == (80, 70) and opened.notes == ()
    assert np.abs(np.asarray(opened.image, int) - np.asarray(gradient(), int)).mean() < 3


def test_I10_colour_profiles_of_imagemagick_are_applied():
    data = encoded(Image.new("RGB", (64, 64), (200, 30, 60)), **raw_profile("icc", swapped_profile()))
    assert largest_difference(open_image(data).image, Image.new("RGB", (64, 64), (30, 200, 60))) <= 2


def test_decoding_changes_no_state_of_the_process():
    """Filters of warnings and Pillow's limits are the same for all threads."""
    before = list(warnings.filters), Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    seen = []

    class Watched(list):
        def insert(self, *values):
            seen.append(values)

    warnings.filters = Watched(warnings.filters)
    try:
        open_image(encoded(gradient(), "JPEG")[:-2])
        open_image(HEIC) if find_spec("pi_heif") else None
    finally:
        warnings.filters = before[0]
    assert not seen
    assert (list(warnings.filters), Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == before


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_I6_first_frame_with_a_note(kind):
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    opened = open_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert largest_difference(opened.image, frames[0]) <= (2 if kind == "AVIF" else 0)
    assert "3 frames" in opened.notes[0]


def test_center_square():
    original = Image.new("RGB", (200, 100), "black")
    ImageDraw.Draw(original).rectangle((50, 0, 149, 99), fill="white")
    square = center_square(original, 64)
    assert square.size == (64, 64)
    assert square.getpixel((32, 32)) == (255, 255, 255)
    exact = gradient(64, 64)
    assert image_sha256(center_square(exact, 64)) == image_sha256(exact)


def test_pixels_have_a_hash_of_their_own():
    assert image_sha256(gradient()) == image_sha256(open_image(encoded(gradient())).image)
    assert image_sha256(gradient(80, 70)) != image_sha256(gradient(70, 80))


def test_masks_must_have_the_proportions_of_the_image():
    mask = encoded(Image.new("L", (160, 140), 255))
    assert open_mask(mask, gradient()).mode == "L"
    with pytest.raises(InputError, match="proportions"):
        open_mask(mask, Image.new("RGB", (80, 80)))


# ---- preparation -----------------------------------------------------------------------------

TARGET = PreparationTarget(size=64, base="mini")


def domain_with(prepare):
    config = TuningConfig(steps=1, base_learning_rate=1e-6, reg_weight=0)
    return Domain(name="dog", descriptor="dog", tuning=config, prepare=prepare)


def test_default_preparation():
    prepared = prepare_image(domain_with(None), gradient(), TARGET)
    assert prepared.image.size == (64, 64)
    assert prepared.mask is None
    assert prepared.notes == ()
    large = PreparationTarget(size=512, base="sd14")
    assert "scaled up" in prepare_image(domain_with(None), gradient(), large).notes[0]


@pytest.mark.parametrize(
    ("width", "height", "kept"),
    [(0, 0, False), (6, 6, False), (7, 6, True), (64, 64, True)],  # 40.96 pixels are 1 %
)
def test_I12_masks_under_a_hundredth_are_left_out(width, height, kept):
    def prepare(image, target):
        mask = Image.new("L", (64, 64))
        mask.paste(255, (0, 0, width, height))
        return PreparedImage(image=center_square(image, 64), mask=mask)

    prepared = prepare_image(domain_with(prepare), gradient(), TARGET)
    assert (prepared.mask is not None) == kept
    assert bool(prepared.notes) != kept


def test_no_mask_asked_no_mask_given():
    def prepare(image, target):
        return PreparedImage(image=center_square(image, 64), mask=Image.new("L", (64, 64), 255))

    assert prepare_image(domain_with(prepare), gradient(), TARGET).mask is not None
    bare = PreparationTarget(size=64, base="mini", mask=None)
    assert prepare_image(domain_with(prepare), gradient(), bare).mask is None


def test_a_preparation_that_breaks_the_contract_is_named():
    def wrong_size(image, target):
        return PreparedImage(image=Image.new("RGB", (32, 32)))

    def wrong_type(image, target):
        return image

    def fails(image, target):
        return 1 / 0

    for prepare in (wrong_size, wrong_type, fails):
        with pytest.raises(E4TError, match="domain 'dog'") as caught:
            prepare_image(domain_with(prepare), gradient(), TARGET)
        assert __name__ in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
