#!/usr/bin/env bash
# Versions: safetensors 0.8.0, numpy 2.4.6, Python 3.11 to 3.13.
#
# Guess: the same tensors and the same metadata, saved twice, are the same file; its SHA-256 identifies the model.
#
# Behaviour: with two or more keys of metadata the header lists them in another order at nearly every call, so 20 saves in one
# process give several different files. Tensors, offsets and the keys of tensors are in a fixed order. Without metadata, or
# with one key, all saves are equal.
#
# Output seen: see EXPECTED below.
#
# Why it matters: LoRA files carry a dozen keys (`ss_*`, `modelspec.*`). Build caches, deduplication, "is this upload the one I have?",
# and tests that compare files by hash see another file each time. Compare the data behind the header (what web interfaces
# call AutoV3) and the sorted header, or write the header yourself.
set -euo pipefail
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    safetensors==0.8.0 numpy==2.4.6 2>/dev/null

cat > "$work/probe.py" <<'PROBE'
import hashlib

import numpy
from safetensors.numpy import save

tensors = {f"lora_unet_{i}.alpha": numpy.full((4,), i, numpy.float32) for i in range(8)}
for keys in (0, 1, 2, 12):
    metadata = {f"ss_key_{i}": str(i) for i in range(keys)}
    files = [save(tensors, metadata or None) for _ in range(20)]
    hashes = {hashlib.sha256(file).hexdigest() for file in files}
    # The first eight bytes are the length of the header.
    data = {file[8 + int.from_bytes(file[:8], "little") :] for file in files}
    several = "one file" if len(hashes) == 1 else "several files"
    print(f"{keys} keys of metadata, 20 saves: {several}, {len(data)} data")
PROBE

cat > "$work/expected" <<'EXPECTED'
0 keys of metadata, 20 saves: one file, 1 data
1 keys of metadata, 20 saves: one file, 1 data
2 keys of metadata, 20 saves: several files, 1 data
12 keys of metadata, 20 saves: several files, 1 data
EXPECTED

cd "$work"
venv/bin/python probe.py 2>stderr | tee seen || { cat stderr; exit 1; }
diff expected seen && echo "as described"
