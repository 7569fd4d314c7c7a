#!/usr/bin/env bash
# Versions: torch 2.14.1 (CPU, x86-64, seen on AMD EPYC), safetensors 0.8.0, Python 3.11 to 3.13.
#
# Guess: tensors that are equal in every bit give results that are equal in every bit, on one machine with
# one thread.
#
# Behaviour: not if they come from safetensors' load_file. What it returns lies at an address that is a
# multiple of 8 bytes, as the header before the data has a length that is one; torch allocates at
# multiples of 64. A linear layer on one row of float32 is computed in another order where its weight is
# not at a multiple of 16, and its last bits differ. The length of the header decides: a word more or
# less in the metadata, or another name of a tensor. A clone of the same tensors gives the bits of the
# original.
#
# Output seen: see EXPECTED below.
#
# Why it matters: a checkpoint that was loaded and saved again gives other pictures "to the last bit",
# although torch.equal says that all tensors are the same, and load_state_dict(assign=True), which
# diffusers and transformers use to save memory, keeps the mapped tensors. Time embeddings, pooled text and the
# token classifiers of a single prompt are such layers. Weights that are converted while they are
# loaded, as float16 to float32, are not affected: the conversion allocates.
set -euo pipefail
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.14.1 numpy safetensors==0.8.0 2>/dev/null

cat > "$work/probe.py" <<'PROBE'
import torch
from safetensors.torch import load_file, save_file
from torch import nn

torch.set_num_threads(1)
torch.set_grad_enabled(False)
source = torch.Generator().manual_seed(0)
layer, row = nn.Linear(257, 256), torch.randn(1, 257, generator=source)
layer.weight.copy_(torch.randn(256, 257, generator=source))
expected = layer(row)


def with_weights(state):
    other = nn.Linear(257, 256)
    other.load_state_dict(state, assign=True)
    return "equal" if torch.equal(other(row), expected) else "other last bits"


found = {}
for length in range(0, 64, 8):
    save_file(layer.state_dict(), "weights.safetensors", {"note": "x" * length})
    state = load_file("weights.safetensors")
    assert all(torch.equal(value, layer.state_dict()[name]) for name, value in state.items())
    clones = {name: value.clone() for name, value in state.items()}
    found[state["weight"].data_ptr() % 64] = (with_weights(state), with_weights(clones))
for place, (mapped, cloned) in sorted(found.items()):
    print(f"weight at 64 n + {place:2}: {mapped}; cloned: {cloned}")
PROBE

cat > "$work/expected" <<'EXPECTED'
weight at 64 n +  0: equal; cloned: equal
weight at 64 n +  8: other last bits; cloned: equal
weight at 64 n + 16: equal; cloned: equal
weight at 64 n + 24: other last bits; cloned: equal
weight at 64 n + 32: equal; cloned: equal
weight at 64 n + 40: other last bits; cloned: equal
weight at 64 n + 48: equal; cloned: equal
weight at 64 n + 56: other last bits; cloned: equal
EXPECTED

cd "$work"
venv/bin/python probe.py 2>stderr | tee seen || { cat stderr; exit 1; }
diff expected seen && echo "as described"
