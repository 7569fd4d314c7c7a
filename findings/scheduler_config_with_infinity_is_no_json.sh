#!/usr/bin/env bash
# Versions: diffusers 0.42.1, torch 2.14.1, Python 3.11 to 3.13.
#
# Guess: scheduler_config.json, which save_pretrained writes, is JSON.
#
# Behaviour: not for the DPM-Solver family. A default of theirs is lambda_min_clipped=-inf, and Python's
# json writes it as -Infinity, which is no JSON (RFC 8259, section 6): Python reads it back, other
# readers refuse the whole file.
#
# Output seen: see EXPECTED below.
#
# Why it matters: DPMSolverMultistepScheduler is what most people replace a base's scheduler by. A base that they
# save is then unreadable for programs in JavaScript, Rust or Go, for jq, and for a hub that indexes
# configs. Leave defaults out, or write allow_nan=False and find out at home.
set -euo pipefail
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.14.1 numpy diffusers==0.42.1 2>/dev/null

cat > "$work/probe.py" <<'PROBE'
import json
from pathlib import Path

import diffusers

NAMES = (
    "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "UniPCMultistepScheduler",
)
for name in NAMES:
    getattr(diffusers, name)().save_pretrained(name)
    strange = []
    text = (Path(name) / "scheduler_config.json").read_text()
    json.loads(text, parse_constant=strange.append)
    lines = [line.strip().rstrip(",") for line in text.splitlines() if any(word in line for word in strange)]
    print(f"{name:30}{'; '.join(lines) or 'JSON'}")
PROBE

cat > "$work/expected" <<'EXPECTED'
DDIMScheduler                 JSON
DDPMScheduler                 JSON
DPMSolverMultistepScheduler   "lambda_min_clipped": -Infinity
DPMSolverSinglestepScheduler  "lambda_min_clipped": -Infinity
EulerDiscreteScheduler        JSON
PNDMScheduler                 JSON
SASolverScheduler             "lambda_min_clipped": -Infinity
UniPCMultistepScheduler       JSON
EXPECTED

cd "$work"
venv/bin/python probe.py 2>stderr | tee seen || { cat stderr; exit 1; }
diff expected seen && echo "as described"
