#!/usr/bin/env bash
# Versions: torch 2.14.1, torchvision 0.29.1, diffusers 0.42.1, Python 3.11 to 3.13.
#
# Guess: a program that never calls torch.compile does not load its compiler: torch itself loads
# torch._dynamo at the first use.
#
# Behaviour: `import torchvision` loads it (torchvision/ops/roi_align.py needs one function of
# torch._dynamo.utils), and so does `import diffusers`, without any model (diffusers/utils/torch_utils.py takes
# allow_in_graph). With it come sympy and parts of torch._inductor: about a thousand modules, as many
# again as torch has. timm and open_clip import torchvision, so they load it too. Meanwhile the garbage
# collector, which finds nothing to free among what an import makes, runs more than a thousand times.
#
# Output seen: see EXPECTED below.
#
# Why it matters: it is a quarter of the start of every command line and of every worker of a data loader
# that starts anew, some 150 MB of memory included. gc.disable() around the imports takes off another 10 to 20 %
# of their CPU time; to avoid the compiler, import torchvision and diffusers only where they are used.
set -euo pipefail
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.14.1 numpy torchvision==0.29.1 diffusers==0.42.1 2>/dev/null

cat > "$work/probe.py" <<'PROBE'
import subprocess
import sys

COUNT = """
import gc, sys, time
spent, begun, runs = 0.0, 0.0, 0

def count(phase, info):
    global spent, begun, runs
    if phase == "start":
        begun = time.process_time()
    else:
        spent, runs = spent + time.process_time() - begun, runs + 1

gc.callbacks.append(count)
before = time.process_time()
{code}
share = spent / (time.process_time() - before)
tops = [".".join(name.split(".")[:2]) for name in sys.modules]
for name in ("torch._dynamo", "torch._inductor"):
    print(f"  {{name:16}}{{'loaded' if name in tops else 'not loaded'}}")
print(f"  sympy           {{'loaded' if 'sympy' in sys.modules else 'not loaded'}}")
print("  modules         ", "over" if len(sys.modules) > 1700 else "under", " 1,700", sep="")
print(len(sys.modules), runs, f"{{share:.0%}} in the garbage collector", file=sys.stderr)
if "diffusers" in sys.modules:
    print("  collections     over 500:", runs > 500)
    print("  their CPU time  over 5 %:", share > 0.05)
"""
for code in ("import torch", "import torchvision", "import diffusers"):
    print(code, flush=True)
    subprocess.run([sys.executable, "-c", COUNT.format(code=code)], check=True)
PROBE

cat > "$work/expected" <<'EXPECTED'
import torch
  torch._dynamo   not loaded
  torch._inductor not loaded
  sympy           not loaded
  modules         under 1,700
import torchvision
  torch._dynamo   loaded
  torch._inductor loaded
  sympy           loaded
  modules         over 1,700
import diffusers
  torch._dynamo   loaded
  torch._inductor loaded
  sympy           loaded
  modules         over 1,700
  collections     over 500: True
  their CPU time  over 5 %: True
EXPECTED

cd "$work"
venv/bin/python probe.py 2>stderr | tee seen || { cat stderr; exit 1; }
diff expected seen && echo "as described"
