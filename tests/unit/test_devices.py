"""What is asked of the system about memory."""

import subprocess
import sys

import pytest

from e4t_cli.devices import keep_freed_memory

FAULTS = """
import resource, numpy
from e4t_cli.devices import keep_freed_memory
if {keep}:
    keep_freed_memory()
def step():
    for _ in range(2):
        tensors = [numpy.ones(1 << 20) for _ in range(12)]
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*, keep):
    code = FAULTS.format(keep=keep)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_kept():
    """Pages that were had once are not asked for again."""
    if not keep_freed_memory():
        pytest.skip("another allocator")
    assert faults(keep=True) * 4 < faults(keep=False)
