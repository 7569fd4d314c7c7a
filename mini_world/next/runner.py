"""Runs stages that depend on each other, one or several at a time, each in a process of its own.

A stage starts when all that it needs is finished. Shared stages, the U-Net's, take all processes: they start when nothing else
can, under torchrun on a CPU with more than one process, and alone on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mini_world.next.stopping import STOP_AT, STOPPED

# glibc returns large tensors to the system and allocates them again at every step. With these settings it keeps them, and the
# U-Net trains 1.18 times faster on a CPU.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
PATIENCE = 120.0  # seconds that stages have to save and end
POLL = 0.2  # seconds


class StageFailed(Exception):
    """A stage ended with an error."""


@dataclass(frozen=True)
class Node:
    """A stage to the scheduler: what it needs, whether its result is kept, and whether it uses all processes."""

    needs: tuple[str, ...] = ()
    shipped: bool = True
    shared: bool = False


def needed(nodes: Mapping[str, Node], targets: list[str], finished: Callable[[str], bool]) -> list[str]:
    """The unfinished stages that the targets need, themselves among them, in the order of `nodes`.

    What only finished stages need is left out: a fresh clone with the VAE's result draws nothing for the VAE.
    """
    found: set[str] = set()

    def visit(name: str) -> None:
        if name in found or finished(name):
            return
        found.add(name)
        for below in nodes[name].needs:
            visit(below)

    for name in targets:
        visit(name)
    return [name for name in nodes if name in found]


def ready(nodes: Mapping[str, Node], waiting: list[str], running: list[str], slots: int) -> list[str]:
    """The stages that can start now, at most as many as there are free slots."""
    if any(nodes[name].shared for name in running) and slots > 1:
        return []
    open_ones = [name for name in waiting if not set(nodes[name].needs) & {*waiting, *running}]
    plain = [name for name in open_ones if not nodes[name].shared]
    if plain:
        return plain[: max(0, slots - len(running))]
    return open_ones[:1] if not running else []


@dataclass
class Runner:
    """Starts stages with `command(stage, processes)`; `slots` at a time.

    minutes: after which running stages save their states and end.
    """

    nodes: Mapping[str, Node]
    command: Callable[[str, int], list[str]]
    slots: int = 1
    minutes: float | None = None
    one_thread: bool = True
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(self, targets: list[str], finished: Callable[[str], bool]) -> bool:
        """Run all that is missing; returns whether everything is finished (False: the time was up).

        Raises:
            StageFailed: a stage failed; the others saved their states first.
            KeyboardInterrupt: likewise.
        """
        waiting = needed(self.nodes, targets, finished)
        end = time.time() + 60 * self.minutes if self.minutes is not None else float("inf")
        stopped = False
        try:
            while waiting or self.running:
                if not stopped and time.time() < end:
                    for name in ready(self.nodes, waiting, list(self.running), self.slots):
                        waiting.remove(name)
                        self._start(name, end)
                elif not self.running:
                    return False
                for name, process in list(self.running.items()):
                    code = process.poll()
                    if code is None:
                        continue
                    del self.running[name]
                    if code == STOPPED:
                        stopped = True
                    elif code or not finished(name):
                        raise StageFailed(f"the stage {name} failed with exit status {code}; all others can be resumed")
                if time.time() > end + PATIENCE:
                    self._stop()
                time.sleep(POLL)
        except BaseException:
            self._stop()
            raise
        return not stopped

    def _start(self, name: str, end: float) -> None:
        print(f"── {name}", file=sys.stderr, flush=True)
        shared = self.nodes[name].shared
        environment = KEEP_MEMORY | os.environ
        if self.slots > 1 and self.one_thread:
            environment["OMP_NUM_THREADS"] = "1"
        if end < float("inf"):
            environment[STOP_AT] = str(end)
        self.running[name] = subprocess.Popen(self.command(name, self.slots if shared else 1), env=environment)

    def _stop(self) -> None:
        """Ask all running stages to save and end; end them after a while."""
        for process in self.running.values():
            process.terminate()
        last = time.time() + PATIENCE
        for process in self.running.values():
            try:
                process.wait(max(0.1, last - time.time()))
            except subprocess.TimeoutExpired:
                process.kill()
        self.running.clear()
