"""One process or many: who this one is, and the few things that processes tell each other.

`accelerate launch` and torchrun start the same program several times and say so in the
environment. Every process then holds the whole model, takes its own positions of the global batch
and exchanges gradients, so that all of them hold the same weights after each step.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from e4t_cli.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among all that train together; by default it is alone.

    Args:
        rank: which one it is, 0 … count - 1. The first one reports and saves.
        count: how many there are.
        device: what this one works on; None leaves the choice to whoever loads the model.
    """

    rank: int = 0
    count: int = 1
    device: torch.device | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def positions(self, batch_size: int) -> range:
        """Return this process's places in the global batch of `count * batch_size` samples."""
        return range(self.rank * batch_size, (self.rank + 1) * batch_size)

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return a module whose backward pass averages gradients over all processes."""
        if self.count == 1:
            return module
        cuda = self.device is not None and self.device.type == "cuda"
        return DistributedDataParallel(
            module, device_ids=[self.device] if cuda else None, broadcast_buffers=False
        )

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over all processes."""
        if self.count > 1:
            distributed.all_reduce(values)
            values = values / self.count
        return values

    def any(self, flag: bool) -> bool:
        """Whether it holds in any process; all of them have to ask."""
        if self.count == 1:
            return flag
        found = torch.tensor(float(flag), device=self.device)
        distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
        return bool(found.item())

    def check_same(self, number: int, what: str) -> None:
        """Make sure that all processes hold the same number.

        Raises:
            UsageError: they do not.
        """
        if self.count == 1:
            return
        ends = torch.tensor([number, -number], device=self.device)
        distributed.all_reduce(ends, op=distributed.ReduceOp.MAX)
        if ends[0] != -ends[1]:
            raise UsageError(
                f"the processes differ in {what}: {-int(ends[1])} and {int(ends[0])}",
                hint="give all of them the same folder, on a disk that they share",
            )


def launched() -> bool:
    """Whether a launcher has started this program as one of several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def join_processes(device: str = "auto") -> Iterator[Processes]:
    """Meet the other processes that a launcher has started, if it has.

    Args:
        device: "cpu" for the CPU, anything else for the graphics card of this process where the
            machine has them. Processes meet through NCCL on cards and gloo on CPUs.
    """
    if not launched():
        yield Processes()
        return
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    try:
        yield Processes(
            rank=state.process_index, count=state.num_processes, device=torch.device(state.device)
        )
    finally:
        state.destroy_process_group()
