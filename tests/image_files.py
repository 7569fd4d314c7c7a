"""Writes image files that Pillow reads and cannot write, or writes in one way only."""

import io
import struct
import zlib


def encoded(image, kind="PNG", **options):
    """Return the bytes of a file as Pillow writes it."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(pixels, colour_type, depth=8, chunks=()):
    """Return a PNG.

    Args:
        pixels: (height, width) or (height, width, channels) integers.
        colour_type: as the PNG specification counts: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA.
        depth: bits a channel.
        chunks: pairs of name and content, before the pixels.
    """
    height, width = pixels.shape[:2]

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + row for row in _packed(pixels, depth, ">"))
    head = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, body) for kind, body in parts)


def tiff(pixels, photometric, depth=8, sample_format=1, order="<", tags=()):
    """Return an uncompressed TIFF of one strip.

    Args:
        pixels: (height, width) or (height, width, channels), integers or floats.
        photometric: 0 white is zero, 1 black is zero, 2 RGB, 5 CMYK, 6 YCbCr, 8 CIELab.
        depth: bits a sample.
        sample_format: 1 unsigned, 2 signed, 3 floating.
        order: "<" as Intel writes it, ">" as Motorola does.
        tags: pairs of number and values (16 bits each), besides the usual ones.
    """
    height, width = pixels.shape[:2]
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    strip = b"".join(_packed(pixels, depth, order, "uif"[sample_format - 1]))
    fields = {256: [width], 257: [height], 258: [depth] * channels, 259: [1], 262: [photometric], 273: [0]}
    fields |= {277: [channels], 278: [height], 279: [len(strip)], 339: [sample_format] * channels} | dict(tags)
    values = {number: struct.pack(f"{order}{len(found)}{'I' if number in (273, 279) else 'H'}", *found)
              for number, found in sorted(fields.items())}  # fmt: skip
    directory, beyond = b"", b""
    after = 8 + 2 + 12 * len(values) + 4
    for number, value in values.items():
        if number == 273:
            value = struct.pack(f"{order}I", after + sum(len(one) for one in values.values() if len(one) > 4))
        kind = 4 if number in (273, 279) else 3
        directory += struct.pack(f"{order}HHI", number, kind, len(fields[number]))
        if len(value) > 4:
            directory += struct.pack(f"{order}I", after + len(beyond))
            beyond += value
        else:
            directory += value.ljust(4, b"\0")
    start = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8)
    return start + struct.pack(f"{order}H", len(values)) + directory + b"\0" * 4 + beyond + strip


def _packed(pixels, depth, order, kind="u"):
    import numpy as np

    for row in pixels:
        if depth < 8:
            bits = np.unpackbits(row.astype(np.uint8).reshape(-1, 1), axis=1)[:, -depth:]
            yield np.packbits(bits.reshape(-1)).tobytes()
        elif depth == 12:
            pairs = row.reshape(-1, 2).astype(int)
            first, second = pairs[:, 0], pairs[:, 1]
            three = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1)
            yield three.astype(np.uint8).tobytes()
        else:
            yield row.astype(f"{order}{kind}{depth // 8}").tobytes()


def grey_profile(gamma):
    """Return an ICC profile of greys with a curve that is a power, as scanners and Photoshop write it."""

    def padded(body):
        return body + b"\0" * (-len(body) % 4)

    words = b"grey"
    parts = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(words) + 1) + words + b"\0" * 79,
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061),
        b"kTRC": b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)),
    }
    table, body, offset = struct.pack(">I", len(parts)), b"", 128 + 4 + 12 * len(parts)
    for name, content in parts.items():
        table += name + struct.pack(">II", offset + len(body), len(content))
        body += padded(content)
    head = struct.pack(">I4sI4s4s4s", offset + len(body), b"\0" * 4, 0x02400000, b"scnr", b"GRAY", b"XYZ ")
    head += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + b"\0" * 28
    head += struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + body
