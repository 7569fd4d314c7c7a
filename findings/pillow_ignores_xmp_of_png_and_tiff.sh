#!/usr/bin/env bash
# Versions: Pillow 13.0.0, Python 3.11 to 3.13.
#
# Guess: `image.save(path, xmp=packet)` writes the XMP packet, or raises for a format that has no place for it;
# and an image that is opened and saved in its own format keeps it.
#
# Behaviour: JPEG, WebP and AVIF write it. PNG and TIFF, which both have a place for XMP and whose XMP Pillow reads
# (`info["xmp"]`), ignore the argument in silence, as do GIF and JPEG 2000. Saving an opened image again loses
# the packet in every format unless it is passed by hand. For PNG a text chunk with the keyword
# "XML:com.adobe.xmp" (`PngInfo.add_itxt`) is what readers look for, and Pillow reads it back as XMP; for TIFF it
# is tag 700.
#
# Output seen: see EXPECTED below.
#
# Why it matters: the mark of generated images (IPTC's digital source type, which laws on AI ask for) is XMP,
# and generated images are PNG. A program that passes `xmp=` believes that its images are marked.
set -euo pipefail
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check Pillow==13.0.0 2>/dev/null

cat > "$work/probe.py" <<'PROBE'
import io

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2

PACKET = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><mark/></x:xmpmeta>'


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file


def has_mark(file):
    return PACKET in file.getvalue() or bytes(Image.open(file).info.get("xmp", b"")) == PACKET


image = Image.new("RGB", (16, 16), "teal")
for kind in ("JPEG", "WEBP", "AVIF", "PNG", "TIFF", "GIF", "JPEG2000"):
    file = saved(image, kind, xmp=PACKET)
    print(f"{kind:8} xmp= written: {has_mark(file)}, kept by open and save: {has_mark(saved(Image.open(file), kind))}")
text, tags = PngInfo(), ImageFileDirectory_v2()
text.add_itxt("XML:com.adobe.xmp", PACKET.decode())
tags[700] = PACKET
print("PNG      by its text chunk:", has_mark(saved(image, "PNG", pnginfo=text)))
print("TIFF     by its tag:", has_mark(saved(image, "TIFF", tiffinfo=tags)))
PROBE

cat > "$work/expected" <<'EXPECTED'
JPEG     xmp= written: True, kept by open and save: False
WEBP     xmp= written: True, kept by open and save: False
AVIF     xmp= written: True, kept by open and save: False
PNG      xmp= written: False, kept by open and save: False
TIFF     xmp= written: False, kept by open and save: False
GIF      xmp= written: False, kept by open and save: False
JPEG2000 xmp= written: False, kept by open and save: False
PNG      by its text chunk: True
TIFF     by its tag: True
EXPECTED

cd "$work"
venv/bin/python probe.py 2>stderr | tee seen || { cat stderr; exit 1; }
diff expected seen && echo "as described"
