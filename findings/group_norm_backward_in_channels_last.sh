#!/usr/bin/env bash
# Versions: torch 2.14.1 (CPU, x86-64, seen on AMD EPYC), Python 3.11 to 3.13.
#
# Guess: channels_last, which PyTorch recommends for convolutional networks on CPUs, is never much slower.
#
# Behaviour: the backward pass of GroupNorm takes 5 to 11 times as long in channels_last in float32, and 20 to
# 29 times in bfloat16 (one thread). Its forward pass takes as long in both.
#
# Output seen: see EXPECTED below.
#
# Why it matters: U-Nets and VAEs of diffusion models have a GroupNorm before each convolution. Training the VAE
# of a small base in channels_last took 1.3 times as long as without, although its convolutions gained 15 %.
# Sampling, which has no backward pass, gains. Use channels_last for inference, and measure before training.
set -euo pipefail
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 numpy 2>/dev/null

cat > "$work/probe.py" <<'PROBE'
import sys
import time

import torch
from torch import nn

torch.set_num_threads(1)


def fastest(work):
    times = []
    for _ in range(12):
        begun = time.process_time()
        work()
        times.append(time.process_time() - begun)
    return min(times)


def measured(layout, dtype):
    norm = nn.GroupNorm(8, 32).to(dtype)
    x, gradient = (torch.randn(16, 32, 64, 64).to(dtype, memory_format=layout) for _ in range(2))
    x.requires_grad_()
    y, inputs = norm(x), [x, norm.weight, norm.bias]
    with torch.no_grad():
        forward = fastest(lambda: norm(x))
    return forward, fastest(lambda: torch.autograd.grad(y, inputs, gradient, retain_graph=True))


for dtype in (torch.float32, torch.bfloat16):
    plain, last = (measured(layout, dtype) for layout in (torch.contiguous_format, torch.channels_last))
    for name, before, after in zip(("forward", "backward"), plain, last):
        ratio = after / before
        print(f"{dtype} {name}: {ratio:.1f} times", file=sys.stderr)
        said = "more than 3 times as long" if ratio > 3 else "less than twice as long" if ratio < 2 else "in between"
        print(f"{str(dtype):15} {name:9}in channels_last: {said}")
PROBE

cat > "$work/expected" <<'EXPECTED'
torch.float32   forward  in channels_last: less than twice as long
torch.float32   backward in channels_last: more than 3 times as long
torch.bfloat16  forward  in channels_last: less than twice as long
torch.bfloat16  backward in channels_last: more than 3 times as long
EXPECTED

cd "$work"
venv/bin/python probe.py 2>stderr | tee seen || { cat stderr; exit 1; }
diff expected seen && echo "as described"
