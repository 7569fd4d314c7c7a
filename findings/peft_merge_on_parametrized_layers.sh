#!/usr/bin/env bash
# Versions: peft 0.21.2, torch 2.14.1 (CPU), Python 3.11 to 3.13.
#
# Guess: merge_and_unload() either folds a LoRA into the layer's weight or raises. A layer whose
# weight is a torch.nn.utils.parametrize parametrization (weight offsets, weight normalisation,
# orthogonal weights) is still an nn.Linear, and get_peft_model() accepts it.
#
# Behaviour: with the adapter active, the outputs are right; merge_and_unload() then returns a model
# without the LoRA, and raises and logs nothing. peft adds the change to `weight.data`; the `weight` of a
# parametrized layer is computed at each access, so the sum is written to a temporary tensor.
# Removing the parametrization first (remove_parametrizations(..., leave_parametrized=True)) helps.
#
# Output seen: see EXPECTED below.
#
# Why it matters: weight_norm in torch is such a parametrization, and so are the weight offsets of
# encoder-based tuning. Who merges "for speed" before an export exports the base model, with a
# plausible file size, and finds out by looking at images.
set -euo pipefail
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.14.1 numpy peft==0.21.2 2>/dev/null

cat > "$work/probe.py" <<'PROBE'
import logging
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize

logging.basicConfig(level=logging.DEBUG)
warnings.simplefilter("error", UserWarning)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.to_q(x)


def outcome(prepare):
    torch.manual_seed(0)
    net = Net()
    prepare(net)
    config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    model = get_peft_model(net, config)
    x = torch.randn(3, 4)
    with torch.no_grad():
        adapted = model(x)
        with model.disable_adapter():
            plain = model(x)
        merged = model.merge_and_unload()(x)
    assert not torch.allclose(adapted, plain)
    if torch.allclose(merged, adapted, atol=1e-5):
        return "holds the LoRA"
    return "is the model without the LoRA" if torch.equal(merged, plain) else "is neither"


def first_removed(net):
    parametrizations.weight_norm(net.to_q)
    parametrize.remove_parametrizations(net.to_q, "weight", leave_parametrized=True)


for name, prepare in (
    ("plain nn.Linear", lambda net: None),
    ("weight_norm", lambda net: parametrizations.weight_norm(net.to_q)),
    ("weight_norm, removed", first_removed),
):
    print(f"{name:22}merged {outcome(prepare)}")
PROBE

cat > "$work/expected" <<'EXPECTED'
plain nn.Linear       merged holds the LoRA
weight_norm           merged is the model without the LoRA
weight_norm, removed  merged holds the LoRA
EXPECTED

"$work/venv/bin/python" "$work/probe.py" 2> "$work/log" | tee "$work/seen"
diff "$work/expected" "$work/seen" && echo "as described"
