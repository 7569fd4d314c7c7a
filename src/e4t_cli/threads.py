"""CPU threads of torch: how many, and how they wait for each other. Both are decided before torch is imported.

After each parallel loop the threads of OpenMP wait for the slowest one, by spinning for milliseconds. With another
program busy on one of two cores, the slowest is one that is not running, and the others burn its core's time while it
waits for its turn: tuning took 20 times as long. So there is a thread for each core that is free, and after a tenth of
a millisecond they wait asleep.
"""

from __future__ import annotations

import os
import time
from collections.abc import MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from e4t_cli.cgroups import cgroup_folders

VARIABLE = "OMP_NUM_THREADS"  # an explicit number, of the user or of a launcher as torchrun
# For GNU's runtime, in torch's wheels for Linux, in turns of a loop, and for LLVM's and Intel's, in those for other
# systems, in milliseconds. Asleep at once (OMP_WAIT_POLICY=PASSIVE), the loops of a small base are slower: on two
# quiet cores `time` of the demo's command was 15.7 s, with 3,000 turns 13.1 s, with GNU's default of 300,000 13.6 s
# (one run each).
WAITING = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "1"}
SHORTEST = 0.1  # seconds that a load is measured over: the kernel counts in hundredths
FREE_ENOUGH = 0.65  # the share of a core that has to be free for a thread on it
_ROOT = Path("/")


def usable_cores(root: Path = _ROOT) -> set[int]:
    """Return the cores on which this process may run; as many as the control groups' quotas allow."""
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
    else:
        cores = list(range(os.cpu_count() or 1))
    quotas = [len(cores)]
    for version, folder in cgroup_folders("cpu", root):
        with suppress(OSError, ValueError, ZeroDivisionError):  # "max", -1, or the root, which has no quota
            if version == 2:
                quota, period = (int(one) for one in (folder / "cpu.max").read_text(encoding="ascii").split())
            else:
                names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                quota, period = (int((folder / name).read_text(encoding="ascii")) for name in names)
            if quota > 0:
                quotas.append(round(quota / period))
    return set(cores[: max(1, min(quotas))])


@dataclass(frozen=True)
class Load:
    """A reading of the kernel's counters, to be compared with a later one.

    Args:
        at: when it was read, in seconds of the monotonic clock.
        own: the seconds that this process has used of all cores.
        busy: the seconds that all processes have used of each core.
    """

    at: float
    own: float
    busy: dict[int, float]

    @classmethod
    def read(cls, root: Path = _ROOT) -> Load:
        """Read the counters of now; `busy` is empty where the system has none.

        The time of processes with a nice value is not counted: they make room for this one.
        """
        busy: dict[int, float] = {}
        with suppress(OSError, ValueError, IndexError, AttributeError):
            ticks = os.sysconf("SC_CLK_TCK")
            for line in (root / "proc/stat").read_text(encoding="ascii").splitlines():
                name, *counters = line.split()
                if name.startswith("cpu") and name != "cpu":
                    user, _nice, system, _idle, _iowait, irq, softirq, steal = (int(one) for one in counters[:8])
                    busy[int(name[3:])] = (user + system + irq + softirq + steal) / ticks
        return cls(at=time.monotonic(), own=time.process_time(), busy=busy)

    def others_until(self, later: Load, cores: set[int]) -> float:
        """Return how many of the cores other processes kept busy between two readings; 0 if it was too short."""
        seconds = later.at - self.at
        if seconds < SHORTEST:
            return 0.0
        known = cores & self.busy.keys() & later.busy.keys()
        used = sum(max(0.0, later.busy[core] - self.busy[core]) for core in known)
        return max(0.0, used - (later.own - self.own)) / seconds


def free_threads(cores: int, others: float) -> int:
    """Return the number of threads for `cores`, of which other processes keep `others` busy."""
    return max(1, int(cores - others + 1 - FREE_ENOUGH))


def set_waiting(environment: MutableMapping[str, str] | None = None) -> None:
    """Have OpenMP's threads wait asleep after a short time, unless the user has set how."""
    environment = os.environ if environment is None else environment
    if not any(name in environment for name in (*WAITING, "OMP_WAIT_POLICY")):
        environment.update(WAITING)


def set_threads(
    wanted: int = 0, since: Load | None = None, environment: MutableMapping[str, str] | None = None, root: Path = _ROOT
) -> int:
    """Set the number of threads for libraries that are imported later, and return it; 0 is the libraries' own.

    Where all of the machine's cores are free they decide themselves: they know which cores are one core's two halves.

    Args:
        wanted: the user's number; 0 leaves the environment's, else there is one thread for each core that is free.
        since: an earlier reading; None takes all usable cores for free.
        environment: that of this process by default.
        root: the folder with the system's /proc and /sys.
    """
    environment = os.environ if environment is None else environment
    given = environment.get(VARIABLE, "")
    if not wanted and given.isdecimal() and int(given):
        return int(given)
    if not wanted:
        cores = usable_cores(root)
        others = since.others_until(Load.read(root), cores) if since is not None else 0.0
        wanted = free_threads(len(cores), others)
        if wanted >= (os.cpu_count() or 1):
            return 0
    environment[VARIABLE] = str(wanted)
    return wanted
