#!/usr/bin/env bash
# Versions: torch 2.14.1 (CPU, Linux, its own libgomp), Python 3.11 to 3.13; two cores or more.
#
# Guess: two threads that share one core, because another program has the other one, take about as
# long as one thread.
#
# Behaviour: 20 to 100 times as long. The threads of GNU's OpenMP wait at the end of each parallel loop by spinning.
# libgomp spins briefly where it has more threads than cores, but it counts the cores as it is
# loaded, and never looks at the load. Here both threads are put on one core after `import torch`, as a busy
# machine does: each loop waits until the spinning thread's time slice is over. OMP_WAIT_POLICY=PASSIVE ends that,
# and can be set in os.environ before the import.
#
# Output seen: see EXPECTED below.
#
# Why it matters: a small model (a few thousand short loops a second) takes 70 s in place of 3 beside a package
# installation or a second training, by whatever it shares the cores with, at full load for nothing.
# On a free machine PASSIVE costs some percent.
set -euo pipefail
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 numpy 2>/dev/null

cat > "$work/probe.py" <<'PROBE'
import os
import subprocess
import sys

LOOP = """
import os, sys, time
os.environ["OMP_NUM_THREADS"] = sys.argv[1]
if sys.argv[2]:
    os.environ["OMP_WAIT_POLICY"] = sys.argv[2]
import torch
assert torch.get_num_threads() == int(sys.argv[1])
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
torch.set_grad_enabled(False)
layer, x = torch.nn.Conv2d(32, 32, 3, padding=1), torch.randn(4, 32, 16, 16)
for _ in range(5):
    layer(x)
begun = time.process_time()
for _ in range(40):
    layer(x)
print(time.process_time() - begun)
"""
environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}


def cpu_seconds(threads, policy):
    command = [sys.executable, "-c", LOOP, str(threads), policy]
    runs = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(3)]
    return min(float(run.stdout) for run in runs)


one = cpu_seconds(1, "")
for policy in ("", "PASSIVE"):
    times = cpu_seconds(2, policy) / one
    print(f"{policy or 'as it is'}: {times:.1f} times", file=sys.stderr)
    said = "more than 10 times" if times > 10 else "less than 4 times" if times < 4 else "in between"
    print(f"two threads on one core, waiting {policy or 'as usual'}: {said} the CPU time of one")
PROBE

cat > "$work/expected" <<'EXPECTED'
two threads on one core, waiting as usual: more than 10 times the CPU time of one
two threads on one core, waiting PASSIVE: less than 4 times the CPU time of one
EXPECTED

cd "$work"
venv/bin/python probe.py 2>stderr | tee seen || { cat stderr; exit 1; }
diff expected seen && echo "as described"
