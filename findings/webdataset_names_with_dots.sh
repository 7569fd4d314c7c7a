#!/usr/bin/env bash
# Versions: webdataset 1.0.2, Pillow 13.0.0, Python 3.11 to 3.13.
#
# Guess: a picture in a tar shard is a sample of its own, its key is the name without the suffix, and
# its column is the suffix, as `os.path.splitext` would say.
#
# Behaviour: the key ends at the FIRST dot of the name, and all the rest is the column. Pictures
# that a phone or a program named with dots (a date, a version, "x.1.png") therefore
#   - share one key, so that several pictures become one sample with a column each, and
#   - have no column "png": `to_tuple("png")` or a rename of "png" passes over them. With the usual
#     handler that ignores bad samples nothing is said, and with mixed names just a part is missing.
# `decode("pil")` looks at the last suffix instead and does decode them, under the odd column.
#
# Output seen: see EXPECTED below ("used" counts what a pipeline that asks for "png" receives).
#
# Why it matters: training sets of personalization are small and named by people. A shard of 120
# good pictures can train on none of them, or on half. Read the members of a shard one by one (group by
# the last suffix yourself), or rename pictures before packing them.
set -euo pipefail
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check webdataset==1.0.2 Pillow==13.0.0 numpy==2.4.6 2>/dev/null

cat > "$work/probe.py" <<'PROBE'
import io
import tarfile

import webdataset
from PIL import Image

PICTURE = io.BytesIO()
Image.new("RGB", (8, 8), "teal").save(PICTURE, "PNG")


def shard(path, names):
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(PICTURE.getvalue())
            tar.addfile(member, io.BytesIO(PICTURE.getvalue()))


def columns(sample):
    return sorted(name for name in sample if not name.startswith("__"))


for label, names in [
    ("plain", ["one.png", "two.png"]),
    ("dates", ["IMG_2024.05.01_03.png", "IMG_2024.05.01_04.png"]),
    ("mixed", ["one.png", "dog.v2.png"]),
]:
    path = f"{label}.tar"
    shard(path, names)
    samples = list(webdataset.WebDataset(path, shardshuffle=False))
    keep_going = webdataset.ignore_and_continue
    decoded = webdataset.WebDataset(path, shardshuffle=False).decode("pil")
    used = list(decoded.to_tuple("png", handler=keep_going))
    print(f"{label}: {len(names)} pictures, {len(samples)} samples {[columns(one) for one in samples]}, {len(used)} used")
PROBE

cat > "$work/expected" <<'EXPECTED'
plain: 2 pictures, 2 samples [['png'], ['png']], 2 used
dates: 2 pictures, 1 samples [['05.01_03.png', '05.01_04.png']], 0 used
mixed: 2 pictures, 2 samples [['png'], ['v2.png']], 1 used
EXPECTED

cd "$work"
venv/bin/python probe.py 2>stderr | tee seen || { cat stderr; exit 1; }
diff expected seen && echo "as described"
