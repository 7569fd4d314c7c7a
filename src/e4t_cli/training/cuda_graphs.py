"""Captures a function as a CUDA graph and replays it.

A step of tuning is over 3,000 operations; where the GPU waits for the CPU to launch them, a graph launches all as one.

A function of tensors can be captured whose work is the same every time: no branch and no Python value changes between
calls but through its arguments, nothing is read back, and what it reads or writes beside its arguments stays where it
is. `test_cuda_graphs_invariants.py` holds a step of tuning and of sampling to that by replaying a list of operations.

Not the default: no GPU was available to measure it on. `E4T_CUDA_GRAPHS=1` turns it on, `make bench` prints both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from e4t_cli.devices import captures_graphs, free_memory

MIN_CALLS = 4  # from which on a capture can pay: the first two run without a graph, or nearly so
Captured = Callable[[], Tensor]


class GraphCapture(Protocol):
    """Captures and replays; a test has one for the CPU."""

    def warm_up(self, work: Captured) -> Tensor:
        """Run the work once, as a capture requires."""

    def capture(self, work: Captured) -> tuple[Callable[[], object], Tensor]:
        """Return what replays the work, and the tensor that holds its result each time.

        Raises:
            RuntimeError: it cannot be captured.
        """


class CudaGraphCapture:
    """Captures on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def warm_up(self, work: Captured) -> Tensor:
        # On a side stream, as torch requires: what libraries set up in their first call must be over before a capture.
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                result = work()
            current.wait_stream(stream)
            result.record_stream(current)
        return result

    def capture(self, work: Captured) -> tuple[Callable[[], object], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Only the work of this thread: others may be loading weights meanwhile.
        with torch.cuda.device(self.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result


def graph_capture_for(device: torch.device) -> GraphCapture | None:
    """Return what captures on a device, None where nothing does or it is not turned on."""
    return CudaGraphCapture(device) if captures_graphs(device) else None


class CudaGraphRunner:
    """A function of tensors: run at the first call, captured at the second, then replayed.

    Args:
        work: takes tensors without gradients and returns one, under the conditions above.
        device: where its arguments are.
        calls: how many there will be; where they are few nothing is captured.
        on_trouble: called with a message if it could not be captured; the work is then run plainly.
    """

    def __init__(
        self, work: Callable[..., Tensor], device: torch.device, *, calls: int,
        on_trouble: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        self.work, self.device, self.on_trouble = work, device, on_trouble
        self.graph = graph_capture_for(device) if calls >= MIN_CALLS else None
        self._inputs: list[Tensor] = []
        self._captured: tuple[Callable[[], object], Tensor] | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self.graph is None:
            return self.work(*inputs)
        if not self._inputs:
            # Later calls copy their values to these addresses.
            self._inputs = [value.clone() for value in inputs]
            return self.graph.warm_up(lambda: self.work(*self._inputs))
        for captured, value in zip(self._inputs, inputs, strict=True):
            captured.copy_(value)
        if self._captured is None:
            try:
                self._captured = self.graph.capture(lambda: self.work(*self._inputs))
            except RuntimeError as error:
                # Nothing was run yet. Memory that ran out is among the reasons, since a graph keeps its own; as long
                # as the error exists, it keeps that memory, too.
                reason = str(error).partition("\n")[0] or type(error).__name__
        if self._captured is None:
            return self._without(reason)
        replay, result = self._captured
        replay()
        return result.clone()  # the next call writes where this result is

    def forget(self) -> None:
        """Free the graph and the memory it works in."""
        self._inputs, self._captured = [], None

    def _without(self, reason: str) -> Tensor:
        inputs, self.graph = self._inputs, None
        self.forget()
        free_memory(self.device)
        if self.on_trouble:
            self.on_trouble(f"no CUDA graph could be captured, steps run one by one: {reason}")
        return self.work(*inputs)
