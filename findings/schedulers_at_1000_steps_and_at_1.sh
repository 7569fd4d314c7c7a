#!/usr/bin/env bash
# Versions: diffusers 0.42.1, torch 2.14.1 (CPU), Python 3.11 to 3.13.
#
# Guess: a schedule of 1000 training steps can be sampled in 1000 steps, by any scheduler, and in one step, which begins
# at the noisiest time step.
#
# Behaviour at 1000 steps (a denoiser that halves its input stands for the U-Net):
#   - DPM-Solver++ and UniPC with their own spacing ("linspace") visit one time step twice, and the result is NaN:
#     after the whole run, without a warning; 999 steps are fine. With "leading", as Stable Diffusion's files have
#     it, they raise inside `step`.
#   - DDIM, PNDM and DDPM with `steps_offset` 1, as Stable Diffusion's files have it, raise: they index one past the end.
# At 1 step DDIM, DDPM and Euler begin at time step 0, the least noisy one, with "leading" and also with
# "linspace" (of one point), so pure noise comes back almost unchanged; only "trailing" begins at 999.
#
# Output seen: see EXPECTED below.
#
# Why it matters: sweeps over the number of steps, and "as many as in training" as the reference, are what
# papers do; few-step previews are what interfaces do. Refuse counts that a scheduler cannot do, and use
# trailing spacing for few steps.
set -euo pipefail
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    diffusers==0.42.1 torch==2.14.1 numpy==2.4.6 2>/dev/null

cat > "$work/probe.py" <<'PROBE'
import diffusers
import torch

SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def run(name, count, **options):
    scheduler = getattr(diffusers, name).from_config({**SCHEDULE, **options})
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    try:
        scheduler.set_timesteps(count)
        times = scheduler.timesteps.tolist()
        latents = latents * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            latents = scheduler.step(0.5 * scheduler.scale_model_input(latents, t), t, latents).prev_sample
    except (IndexError, AssertionError) as error:
        return f"raises {type(error).__name__}"
    twice = len(times) - len(set(times))
    return f"begins at {round(times[0])}, {twice} visited twice, finite {bool(torch.isfinite(latents).all())}"


for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
    for spacing in ("linspace", "leading", "trailing"):
        for count in (999, 1000):
            print(f"{name} {spacing} {count}: {run(name, count, timestep_spacing=spacing)}")
for name in ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler"):
    options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    for offset in (0, 1):
        print(f"{name} leading+{offset} 1000: {run(name, 1000, steps_offset=offset, **options)}")
for name in ("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"):
    for spacing in ("leading", "linspace", "trailing"):
        print(f"{name} {spacing} 1: {run(name, 1, timestep_spacing=spacing)}")
PROBE

cat > "$work/expected" <<'EXPECTED'
DPMSolverMultistepScheduler linspace 999: begins at 999, 0 visited twice, finite True
DPMSolverMultistepScheduler linspace 1000: begins at 999, 1 visited twice, finite False
DPMSolverMultistepScheduler leading 999: begins at 999, 0 visited twice, finite True
DPMSolverMultistepScheduler leading 1000: raises IndexError
DPMSolverMultistepScheduler trailing 999: begins at 999, 0 visited twice, finite True
DPMSolverMultistepScheduler trailing 1000: begins at 999, 0 visited twice, finite True
UniPCMultistepScheduler linspace 999: begins at 999, 0 visited twice, finite True
UniPCMultistepScheduler linspace 1000: begins at 999, 1 visited twice, finite False
UniPCMultistepScheduler leading 999: begins at 999, 0 visited twice, finite True
UniPCMultistepScheduler leading 1000: raises AssertionError
UniPCMultistepScheduler trailing 999: begins at 999, 0 visited twice, finite True
UniPCMultistepScheduler trailing 1000: begins at 999, 0 visited twice, finite True
DDIMScheduler leading+0 1000: begins at 999, 0 visited twice, finite True
DDIMScheduler leading+1 1000: raises IndexError
DDPMScheduler leading+0 1000: begins at 999, 0 visited twice, finite True
DDPMScheduler leading+1 1000: raises IndexError
PNDMScheduler leading+0 1000: begins at 999, 1 visited twice, finite True
PNDMScheduler leading+1 1000: raises IndexError
DDIMScheduler leading 1: begins at 0, 0 visited twice, finite True
DDIMScheduler linspace 1: begins at 0, 0 visited twice, finite True
DDIMScheduler trailing 1: begins at 999, 0 visited twice, finite True
DDPMScheduler leading 1: begins at 0, 0 visited twice, finite True
DDPMScheduler linspace 1: begins at 0, 0 visited twice, finite True
DDPMScheduler trailing 1: begins at 999, 0 visited twice, finite True
EulerDiscreteScheduler leading 1: begins at 0, 0 visited twice, finite True
EulerDiscreteScheduler linspace 1: begins at 0, 0 visited twice, finite True
EulerDiscreteScheduler trailing 1: begins at 999, 0 visited twice, finite True
EXPECTED

cd "$work"
venv/bin/python probe.py 2>stderr | tee seen || { cat stderr; exit 1; }
diff expected seen && echo "as described"
