#!/usr/bin/env bash
# Versions: pi-heif 1.4.0 reads, pillow-heif 1.4.0 writes, Pillow 13.0.0, Python 3.11 to 3.13.
#
# Guess: a just opened image stands at frame 0, so `image.seek(0)` changes nothing.
#
# Behaviour: a HEIC with several images opens at its PRIMARY image, wherever that is stored, and `tell()` says its index; `seek(0)` leaves it
# for the first one stored. Code that rewinds for animated GIFs and multi-page TIFFs takes another picture than every viewer shows.
#
# Output seen: see EXPECTED below.
#
# Why it matters: phones store bursts, edited and original versions in one file and mark one as primary. A loader that calls
# `seek(0)` to be safe learns a face from a picture that its owner did not choose. Decode without seeking.
set -euo pipefail
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    pi-heif==1.4.0 pillow-heif==1.4.0 Pillow==13.0.0 2>/dev/null

cat > "$work/probe.py" <<'PROBE'
import pi_heif
import pillow_heif
from PIL import Image

colours = ["red", "lime", "blue"]
file = pillow_heif.HeifFile()
for colour in colours:
    file.add_from_pillow(Image.new("RGB", (64, 64), colour))
pi_heif.register_heif_opener()
for primary in range(3):
    file.save("images.heic", primary_index=primary)
    image = Image.open("images.heic")
    at = image.tell()
    opened = [round(value / 255) for value in image.convert("RGB").getpixel((9, 9))]
    image.seek(0)
    rewound = [round(value / 255) for value in image.convert("RGB").getpixel((9, 9))]
    print(f"primary {primary}: opens at {at} showing {opened}, after seek(0) {rewound}")
PROBE

cat > "$work/expected" <<'EXPECTED'
primary 0: opens at 0 showing [1, 0, 0], after seek(0) [1, 0, 0]
primary 1: opens at 1 showing [0, 1, 0], after seek(0) [1, 0, 0]
primary 2: opens at 2 showing [0, 0, 1], after seek(0) [1, 0, 0]
EXPECTED

cd "$work"
venv/bin/python probe.py 2>stderr | tee seen || { cat stderr; exit 1; }
diff expected seen && echo "as described"
