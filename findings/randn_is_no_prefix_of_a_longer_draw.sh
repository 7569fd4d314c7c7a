#!/usr/bin/env bash
# Versions: torch 2.14.1 (CPU), Python 3.11 to 3.13.
#
# Guess: a seeded CPU generator is a stream, so `randn(n)` gives the first n numbers of `randn(m)`,
# and the noise of a batch is that of its images drawn one after another.
#
# Behaviour: both hold only where the count is a multiple of 16.
#   - Fewer than 16 numbers come from another algorithm: none is equal.
#   - Otherwise, if n is no multiple of 16, the last 16 numbers are drawn anew, so up to 16 differ from
#     the longer draw and all that the same generator gives afterwards is shifted.
#   - The latents of a batch (2, 4, 9, 9), 324 numbers an image, are those of two single draws in less
#     than half of their values; those of (2, 4, 8, 8), 256 an image, in all.
#
# Output seen: see EXPECTED below.
#
# Why it matters: "the same seed gives the same image alone and in a batch" is tested at 512 or 768
# pixels, where every latent has a multiple of 16 numbers, and fails in silence at other sizes, in
# small test models, for vectors (a word embedding of 768 is safe, a conditioning of 6 is not),
# and for prior noise that is drawn per batch. Draw each image with a generator of its own.
set -euo pipefail
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 numpy 2>/dev/null

cat > "$work/probe.py" <<'PROBE'
import torch


def draw(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


for count in (6, 15, 16, 24, 32, 260, 768):
    (short,), (long,) = draw((count,)), draw((4 * count,))
    print(f"randn({count}): {int((short == long[:count]).sum())} of {count} begin randn({4 * count})")
for side in (8, 9, 16, 64, 65):
    (batch,), singles = draw((2, 4, side, side)), draw(*[(4, side, side)] * 2)
    same = torch.stack([one == other for one, other in zip(batch, singles)])
    print(f"latents of side {side}: image 1 equal {bool(same[0].all())}, image 2 equal {bool(same[1].all())}")
PROBE

cat > "$work/expected" <<'EXPECTED'
randn(6): 0 of 6 begin randn(24)
randn(15): 0 of 15 begin randn(60)
randn(16): 16 of 16 begin randn(64)
randn(24): 8 of 24 begin randn(96)
randn(32): 32 of 32 begin randn(128)
randn(260): 244 of 260 begin randn(1040)
randn(768): 768 of 768 begin randn(3072)
latents of side 8: image 1 equal True, image 2 equal True
latents of side 9: image 1 equal False, image 2 equal False
latents of side 16: image 1 equal True, image 2 equal True
latents of side 64: image 1 equal True, image 2 equal True
latents of side 65: image 1 equal False, image 2 equal False
EXPECTED

cd "$work"
venv/bin/python probe.py 2>stderr | tee seen || { cat stderr; exit 1; }
diff expected seen && echo "as described"
