#!/usr/bin/env bash
# Versions: diffusers 0.42.1, torch 2.14.1 (CPU), Python 3.11 to 3.13.
#
# Guess: `set_timesteps(n)` with "trailing" spacing gives n time steps from 999 downward, all of them at least 0.
#
# Behaviour: for 62 of the numbers 1 to 1000 (61, 103, 121, 122 …, below 100 just 61) it gives n + 1, and the last one is -1: a
# floating-point step of 1000 / n is added up n + 1 times before it reaches 0. The U-Net is then evaluated at t = -1, which its
# sinusoidal embedding accepts, and the step at -1 reads the last entry of the noise table: the noisiest.
# All schedulers that share the formula do it.
#
# Output seen: see EXPECTED below.
#
# Why it matters: trailing spacing is the recommended one ("Common diffusion noise schedules and sample steps are flawed"). Sweeps
# over the number of steps, and progress that counts n steps, meet an extra one; nothing is raised by some of the schedulers.
# Check `len(timesteps) == n` and `timesteps.min() >= 0`.
set -euo pipefail
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    diffusers==0.42.1 torch==2.14.1 numpy==2.4.6 2>/dev/null

cat > "$work/probe.py" <<'PROBE'
import diffusers

NAMES = ("DDIM", "DDPM", "EulerDiscrete", "DPMSolverMultistep")
for name in NAMES:
    scheduler = getattr(diffusers, f"{name}Scheduler")(timestep_spacing="trailing")
    wrong = []
    for count in range(1, 1001):
        scheduler.set_timesteps(count)
        if len(scheduler.timesteps) != count:
            wrong.append((count, len(scheduler.timesteps) - count, round(float(scheduler.timesteps[-1]))))
    print(f"{name}: {len(wrong)} of 1000 numbers of steps: {wrong[:3]} …")
PROBE

cat > "$work/expected" <<'EXPECTED'
DDIM: 62 of 1000 numbers of steps: [(61, 1, -1), (103, 1, -1), (121, 1, -1)] …
DDPM: 62 of 1000 numbers of steps: [(61, 1, -1), (103, 1, -1), (121, 1, -1)] …
EulerDiscrete: 62 of 1000 numbers of steps: [(61, 1, -1), (103, 1, -1), (121, 1, -1)] …
DPMSolverMultistep: 62 of 1000 numbers of steps: [(61, 1, -1), (103, 1, -1), (121, 1, -1)] …
EXPECTED

cd "$work"
venv/bin/python probe.py 2>stderr | tee seen || { cat stderr; exit 1; }
diff expected seen && echo "as described"
