#!/usr/bin/env bash
# Versions: Pillow 13.0.0, numpy 2.4.6, Python 3.11 to 3.13.
#
# Guess: `convert("RGBA")` of a PNG makes transparent what the file's tRNS chunk says; black is black in a TIFF whatever its bit depth.
#
# Behaviour: `info["transparency"]` keeps the number of the file's bit depth while the pixels are scaled to 8 bits, so for greys of 2 and 4
# bits and for RGB of 16 bits no pixel matches and nothing becomes transparent; for greys of 16 bits it is dropped. TIFFs with
# PhotometricInterpretation 0 (zero is white) are inverted on reading at 8 bits and are not at 16 bits.
#
# Output seen: see EXPECTED below.
#
# Why it matters: scans (16-bit TIFFs, zero is white) arrive as negatives, and cut-outs (PNG with one transparent colour) with their
# background colour, in training sets as in single photographs, without a warning.
set -euo pipefail
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    Pillow==13.0.0 numpy==2.4.6 2>/dev/null

cat > "$work/probe.py" <<'PROBE'
import io
import struct
import zlib

from PIL import Image


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(depth, colour, row, transparent):
    """Two pixels, the first of the transparent colour."""
    head = struct.pack(">IIBBBBB", 2, 1, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", head), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(bits, sample):
    """One white pixel: zero is white."""
    data = sample.to_bytes(bits // 8, "little")
    tags = [(256, 1), (257, 1), (258, bits), (259, 1), (262, 0), (273, 8), (277, 1), (278, 1), (279, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    place = 8 + len(data) + len(data) % 2
    return struct.pack("<2sHI", b"II", 42, place) + data.ljust(place - 8, b"\0") + struct.pack("<H", len(tags)) + entries + bytes(4)


grey = struct.pack(">H", 3)
for name, file in [
    ("PNG grey 8", png(8, 0, bytes([3, 200]), grey)),
    ("PNG grey 4", png(4, 0, bytes([0x3C]), grey)),
    ("PNG grey 2", png(2, 0, bytes([0b11_01_0000]), grey)),
    ("PNG grey 16", png(16, 0, struct.pack(">HH", 1000, 51400), struct.pack(">H", 1000))),
    ("PNG RGB 8", png(8, 2, bytes([3, 3, 3, 9, 9, 9]), grey * 3)),
    ("PNG RGB 16", png(16, 2, struct.pack(">6H", 1000, 1000, 1000, 9, 9, 9), struct.pack(">H", 1000) * 3)),
]:
    alpha = list(Image.open(io.BytesIO(file)).convert("RGBA").getchannel("A").tobytes())
    print(f"{name:12} alpha {alpha}, right: [0, 255]")
for bits in (8, 16):
    image = Image.open(io.BytesIO(tiff(bits, 0)))
    print(f"TIFF zero is white, {bits} bits: mode {image.mode}, white reads as {image.getpixel((0, 0))}")
PROBE

cat > "$work/expected" <<'EXPECTED'
PNG grey 8   alpha [0, 255], right: [0, 255]
PNG grey 4   alpha [255, 255], right: [0, 255]
PNG grey 2   alpha [255, 255], right: [0, 255]
PNG grey 16  alpha [255, 255], right: [0, 255]
PNG RGB 8    alpha [0, 255], right: [0, 255]
PNG RGB 16   alpha [255, 255], right: [0, 255]
TIFF zero is white, 8 bits: mode L, white reads as 255
TIFF zero is white, 16 bits: mode I;16, white reads as 0
EXPECTED

cd "$work"
venv/bin/python probe.py 2>stderr | tee seen || { cat stderr; exit 1; }
diff expected seen && echo "as described"
