#!/usr/bin/env bash
# Versions: diffusers 0.42.1, torch 2.14.1 (CPU), Python 3.11 to 3.13.
#
# Guess: `Other.from_config(scheduler.config)` swaps the sampler and keeps the noise schedule, as the
# documentation advises; two configs of one scheduler that differ only in a default that one of
# them writes out are the same config.
#
# Behaviour: a value that the file writes out travels to the other class, a default of the first class
# does not: the other class takes its own default. `timestep_spacing` is "leading" for DDIM and PNDM
# and "linspace" for Euler, Heun, DPM-Solver++ and UniPC. So a folder that says
# `"timestep_spacing": "leading"` and one that leaves it out, both loaded as DDIM with equal time steps,
# give DPM-Solver++ other time steps (at 4 steps 800 … 200 against 999 … 250), and other pictures.
# `scheduler.config.timestep_spacing` reads "leading" for both. The list of defaults, which decides, is in
# `config._use_default_values`, and `save_pretrained` does not keep it.
#
# Output seen: see EXPECTED below.
#
# Why it matters: saving a pipeline writes every default out (`save_pretrained`), so re-saving a model changes
# what DPM-Solver++ draws from it, and a fingerprint or a test over `config` sees no difference. Pass
# `timestep_spacing=` whenever the class is swapped.
set -euo pipefail
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    diffusers==0.42.1 torch==2.14.1 numpy==2.4.6 2>/dev/null

cat > "$work/probe.py" <<'PROBE'
import json
from pathlib import Path

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def steps(scheduler):
    scheduler.set_timesteps(4)
    return [round(float(t)) for t in scheduler.timesteps]


def folder(name, config):
    Path(name).mkdir()
    Path(name, "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler", **config}))
    return name


folder("silent", SCHEDULE)
folder("written", {**SCHEDULE, "timestep_spacing": "leading"})
DDIMScheduler.from_pretrained("silent").save_pretrained("resaved")
for name in ("silent", "written", "resaved"):
    ddim = DDIMScheduler.from_pretrained(name)
    swapped = [steps(kind.from_config(ddim.config)) for kind in (DPMSolverMultistepScheduler, EulerDiscreteScheduler)]
    print(f"{name:8} {ddim.config.timestep_spacing} DDIM {steps(ddim)} DPM++ {swapped[0]} Euler {swapped[1]}")
PROBE

cat > "$work/expected" <<'EXPECTED'
silent   leading DDIM [750, 500, 250, 0] DPM++ [999, 749, 500, 250] Euler [999, 666, 333, 0]
written  leading DDIM [750, 500, 250, 0] DPM++ [800, 600, 400, 200] Euler [750, 500, 250, 0]
resaved  leading DDIM [750, 500, 250, 0] DPM++ [800, 600, 400, 200] Euler [750, 500, 250, 0]
EXPECTED

cd "$work"
venv/bin/python probe.py 2>stderr | tee seen || { cat stderr; exit 1; }
diff expected seen && echo "as described"
