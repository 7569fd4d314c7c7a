"""Runs stages that depend on each other, one or several at a time, each in a process of its own.

A stage starts when all that it needs is finished. Shared stages, the U-Net's, start when nothing else can, as several processes
on a CPU that each compute their part of every batch, and as one on a GPU.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mini_world.next.stopping import STOP_AT

# glibc returns large tensors to the system and allocates them again at every step. With these settings it keeps them, and the
# U-Net trains 1.18 times faster on a CPU.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
STOPPED = 75  # exit status of a stage that saved its state: `mini_world.next.loop.UNFINISHED`, without importing torch
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
    if any(nodes[name].shared for name in running):
        return []
    open_ones = [name for name in waiting if not set(nodes[name].needs) & {*waiting, *running}]
    plain = [name for name in open_ones if not nodes[name].shared]
    if plain:
        return plain[: max(0, slots - len(running))]
    return open_ones[:1] if not running else []


@dataclass
class Runner:
    """Runs stages with `command(stage)`, `slots` at a time.

    split: whether a shared stage runs as `slots` processes.
    minutes: after which running stages save their states and end.
    """

    nodes: Mapping[str, Node]
    command: Callable[[str], list[str]]
    slots: int = 1
    split: bool = True
    minutes: float | None = None
    running: dict[str, list[subprocess.Popen[bytes]]] = field(default_factory=dict)

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
                stopped = stopped or time.time() >= end
                if stopped and not self.running:
                    return False
                if not stopped:
                    for name in ready(self.nodes, waiting, list(self.running), self.slots):
                        waiting.remove(name)
                        self._start(name, end)
                for name in list(self.running):
                    stopped = self._look_after(name, finished) or stopped
                if time.time() > end + PATIENCE:
                    self._stop()
                time.sleep(POLL)
        except BaseException:
            self._stop()
            raise
        return not stopped or not needed(self.nodes, targets, finished)

    def _look_after(self, name: str, finished: Callable[[str], bool]) -> bool:
        """Note whether a running stage has ended; returns whether it was stopped before its end."""
        codes = [process.poll() for process in self.running[name]]
        failed = [code for code in codes if code not in (None, 0, STOPPED)]
        if None in codes and not failed:
            return False
        if failed:
            raise StageFailed(f"the stage {name} failed with exit status {failed[0]}; all others can be resumed")
        del self.running[name]
        if STOPPED in codes:
            return True
        if not finished(name):
            raise StageFailed(f"the stage {name} ended without a result")
        return False

    def _start(self, name: str, end: float) -> None:
        print(f"── {name}", file=sys.stderr, flush=True)
        count = self.slots if self.nodes[name].shared and self.split else 1
        environment = KEEP_MEMORY | os.environ
        if self.slots > 1 and self.split:
            environment["OMP_NUM_THREADS"] = "1"
        if end < float("inf"):
            environment[STOP_AT] = str(end)
        if count > 1:
            environment |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        command = self.command(name)
        self.running[name] = []
        for rank in range(count):
            own = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {})
            self.running[name].append(subprocess.Popen(command, env=own))

    def _stop(self) -> None:
        """Ask all running stages to save and end; end them after a while."""
        processes = [process for group in self.running.values() for process in group]
        for process in processes:
            process.terminate()
        last = time.time() + PATIENCE
        for process in processes:
            try:
                process.wait(max(0.1, last - time.time()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.running.clear()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
