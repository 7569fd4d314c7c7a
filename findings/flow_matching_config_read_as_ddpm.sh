#!/usr/bin/env bash
# Versions: diffusers 0.42.1, torch 2.14.1 (CPU), Python 3.11 to 3.13.
#
# Guess: `DDPMScheduler.from_pretrained` on the scheduler folder of a flow-matching model (FlowMatchEulerDiscreteScheduler in its
# `_class_name`) fails, or warns: the two share neither the loss nor the noise schedule.
#
# Behaviour: it returns a DDPM scheduler with linear betas from 0.0001 to 0.02 and epsilon prediction, all defaults; the class named in
# the file is not compared. `FlowMatchEulerDiscreteScheduler.compatibles` does not list DDPM, but nothing looks
# there. The other way round works as silently. Loading one with the class the file names, through a pipeline, is right.
#
# Output seen: see EXPECTED below.
#
# Why it matters: training scripts load `DDPMScheduler.from_pretrained(model, subfolder="scheduler")` as their first line. On
# a model of the newer kind they train towards the wrong target with a noise schedule that the model has never seen, to the end.
# Compare `_class_name` with `compatibles` first.
set -euo pipefail
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    diffusers==0.42.1 torch==2.14.1 numpy==2.4.6 2>/dev/null

cat > "$work/probe.py" <<'PROBE'
import logging

from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

log = []
handler = logging.Handler()
handler.emit = lambda record: log.append(record.getMessage())
logging.getLogger("diffusers").addHandler(handler)
logging.getLogger("diffusers.probe").warning("a warning is seen")

FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained("flow")
ddpm = DDPMScheduler.from_pretrained("flow")
print(f"DDPM from flow matching: betas {float(ddpm.betas[0]):g} to {float(ddpm.betas[-1]):g}, predicts {ddpm.config.prediction_type}")
DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).save_pretrained("ddpm")
flow = FlowMatchEulerDiscreteScheduler.from_pretrained("ddpm")
print(f"flow matching from DDPM: shift {flow.config.shift:g}, {len(flow.timesteps)} time steps")
print("DDPM is listed as compatible:", any(kind is DDPMScheduler for kind in flow.compatibles))
print("messages logged:", log)
PROBE

cat > "$work/expected" <<'EXPECTED'
DDPM from flow matching: betas 0.0001 to 0.02, predicts epsilon
flow matching from DDPM: shift 1, 1000 time steps
DDPM is listed as compatible: False
messages logged: ['a warning is seen']
EXPECTED

cd "$work"
venv/bin/python probe.py 2>stderr | tee seen || { cat stderr; exit 1; }
diff expected seen && echo "as described"
