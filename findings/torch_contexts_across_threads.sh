#!/usr/bin/env bash
# Versions: torch 2.14.1 (CPU), Python 3.11 to 3.13.
#
# Guess: a `with` block of torch belongs to the thread that entered it, as torch.no_grad(),
# torch.autocast() and torch.inference_mode() do. A server may then train one model in one thread
# and sample another in a second thread.
#
# Behaviour: three context managers set state of the whole process, and a fourth shares a cache.
#   - torch.nn.utils.parametrize.cached(): while any thread is inside, every parametrized weight of
#     every model in the process is cached. A thread that never entered it, and that changes a
#     parameter of its own model, reads the weight from before the change, without an error.
#   - torch.nn.attention.sdpa_kernel(...): the flags of the attention backends are global, so the
#     block of one thread selects the kernel, and with it the last bits, of all others; and of two
#     blocks that overlap, the one that ends first resets the other.
#   - torch.autocast(): the mode belongs to the thread, but the cache of weights that were cast is one
#     for the process, and the end of any thread's outermost block empties it. A second use of a weight
#     in another thread's block then casts it again: two nodes in the autograd graph in place of
#     one, so its gradient is rounded in another order, and the bits depend on the other thread.
#   - torch.random.fork_rng(): the generator that it saves and restores is the one that the other
#     threads draw from.
#
# Output seen: see EXPECTED below ("crosses" = the second thread saw the first one's block).
#
# Why it matters: LoRA and weight-offset training uses parametrize; exactness tests select the MATH
# attention kernel; both are ordinary in a process that serves several users. Results are wrong or
# not reproducible only under load, and no warning says so.
set -euo pipefail
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 numpy 2>/dev/null

cat > "$work/probe.py" <<'PROBE'
import threading

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, weight):
        return weight * self.factor


class InAnotherThread:
    """Holds a context manager open in a second thread for the length of a `with` block."""

    def __init__(self, context, then=lambda: None):
        self.context, self.then = context, then
        self.inside, self.leave = threading.Event(), threading.Event()

    def work(self):
        with self.context():
            self.then()
            self.inside.set()
            self.leave.wait()

    def __enter__(self):
        self.thread = threading.Thread(target=self.work)
        self.thread.start()
        self.inside.wait()

    def __exit__(self, *error):
        self.leave.set()
        self.thread.join()


def show(name, crosses):
    print(f"{name:24}{'crosses' if crosses else 'stays in its thread'}")


layer = nn.Linear(4, 4, bias=False)
parametrize.register_parametrization(layer, "weight", Scale())
with InAnotherThread(parametrize.cached), torch.no_grad():
    before = layer.weight.clone()
    layer.parametrizations.weight[0].factor.mul_(2)  # this thread's own model
    stale = torch.equal(layer.weight, before)
with torch.no_grad():
    assert torch.equal(layer.weight, 2 * before)
show("parametrize.cached()", stale)

plain = torch.backends.cuda.flash_sdp_enabled()
with InAnotherThread(lambda: sdpa_kernel(SDPBackend.MATH)):
    show("sdpa_kernel(MATH)", torch.backends.cuda.flash_sdp_enabled() != plain)

with InAnotherThread(lambda: torch.random.fork_rng(devices=[]), lambda: torch.manual_seed(7)):
    show("random.fork_rng()", torch.initial_seed() == 7)

class CountCasts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].shape == (64, 64):
            self.count += 1
        return function(*args, **(kwargs or {}))


def bfloat16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


weight, x = torch.randn(64, 64, requires_grad=True), torch.randn(8, 64)
with bfloat16(), CountCasts() as casts:
    functional.linear(x, weight)
    with InAnotherThread(bfloat16):
        pass  # the other thread's block has ended here
    functional.linear(x, weight)
show("autocast(), its cache", casts.count == 2)

with InAnotherThread(torch.no_grad):
    show("no_grad()", not torch.is_grad_enabled())
with InAnotherThread(bfloat16):
    show("autocast(), the mode", torch.is_autocast_enabled("cpu"))
with InAnotherThread(torch.inference_mode):
    show("inference_mode()", torch.is_inference_mode_enabled())
PROBE

cat > "$work/expected" <<'EXPECTED'
parametrize.cached()    crosses
sdpa_kernel(MATH)       crosses
random.fork_rng()       crosses
autocast(), its cache   crosses
no_grad()               stays in its thread
autocast(), the mode    stays in its thread
inference_mode()        stays in its thread
EXPECTED

"$work/venv/bin/python" "$work/probe.py" | tee "$work/seen"
diff "$work/expected" "$work/seen" && echo "as described"
