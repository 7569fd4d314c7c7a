"""Work that a card is shown once, and then does again on other numbers by itself.

A step of tuning is over 5,000 kernels. Where the processor takes longer to start them than the card
to run them, the card waits. A CUDA graph is the list of those kernels and of the addresses they
read and write; played back, it is started as one.

What can be recorded is a function of tensors whose work is the same every time: no decision and no
number of the host's changes between calls but through its arguments, nothing is read back, and
what it reads or changes beside its arguments stays where it is. `test_cuda_graphs_invariants.py`
holds a step of tuning and of drawing to that without a card, by playing back a list of operations.

Not the default: no card was at hand to measure it on. `E4T_CUDA_GRAPHS=1` turns it on, and
`make bench` on a card prints both.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from e4t_cli.devices import free_memory

MIN_CALLS = 4
"""Calls from which on recording can pay: the first two are made without, or nearly so."""

Work = Callable[[], Tensor]


class GraphCapture(Protocol):
    """What records; a test has one for the CPU."""

    def warm_up(self, work: Work) -> Tensor:
        """Do the work once, in the way that recording it asks for."""
        ...

    def record(self, work: Work) -> tuple[Callable[[], object], Tensor]:
        """Return what plays the work back, and the tensor that has its result each time.

        Raises:
            RuntimeError: it cannot be recorded.
        """
        ...


class CudaGraphCapture:
    """Records on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def warm_up(self, work: Work) -> Tensor:
        # On a stream of its own, as torch asks: what libraries set up in their first call, such
        # as choosing among algorithms, must be over before a recording begins.
        with torch.cuda.device(self.device):
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                result = work()
            current.wait_stream(stream)
            result.record_stream(current)
        return result

    def record(self, work: Work) -> tuple[Callable[[], object], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Only what this thread does belongs to it: others may be loading weights meanwhile.
        with (
            torch.cuda.device(self.device),
            torch.cuda.graph(graph, capture_error_mode="thread_local"),
        ):
            result = work()
        return graph.replay, result


def graph_capture_for(device: torch.device) -> GraphCapture | None:
    """Return what records on a device, None where nothing does or nobody asked for it."""
    wanted = os.environ.get("E4T_CUDA_GRAPHS", "") == "1"
    return CudaGraphCapture(device) if wanted and device.type == "cuda" else None


class CudaGraphRunner:
    """A function of tensors: done at the first call, recorded at the second, then played back.

    Args:
        work: takes tensors without gradients and returns one, under the conditions above.
        device: where its arguments are.
        calls: how many there will be; where they are few nothing is recorded.
        on_trouble: told in a sentence that it could not be recorded; the work is done as ever.
    """

    def __init__(
        self,
        work: Callable[..., Tensor],
        device: torch.device,
        *,
        calls: int,
        on_trouble: Callable[[str], None] | None = None,
    ) -> None:
        self.work, self.device, self.on_trouble = work, device, on_trouble
        self.recorder = graph_capture_for(device) if calls >= MIN_CALLS else None
        self.forget()

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self.recorder is None:
            return self.work(*inputs)
        if not self._inputs:
            # Later calls bring their numbers to these addresses.
            self._inputs = [value.clone() for value in inputs]
            return self.recorder.warm_up(self._once)
        for own, value in zip(self._inputs, inputs, strict=True):
            own.copy_(value)
        if self._play is None and (reason := self._record(self.recorder)):
            return self._without(reason)
        assert self._play is not None and self._result is not None
        self._play()
        return self._result.clone()  # the next call writes where this result is

    def forget(self) -> None:
        """Let go of the recording and of the memory it works in."""
        self._inputs: list[Tensor] = []
        self._play: Callable[[], object] | None = None
        self._result: Tensor | None = None

    def _once(self) -> Tensor:
        return self.work(*self._inputs)

    def _record(self, recorder: GraphCapture) -> str:
        """Record the work; returns why it could not be, "" if it could."""
        try:
            self._play, self._result = recorder.record(self._once)
        except RuntimeError as error:
            # Nothing was done yet, only listed. Memory that ran out is among the reasons, since a
            # recording keeps its own; as long as there is the error, it keeps that memory, too.
            return str(error).partition("\n")[0] or type(error).__name__
        return ""

    def _without(self, reason: str) -> Tensor:
        inputs = self._inputs
        self.recorder = None
        self.forget()
        free_memory(self.device)
        if self.on_trouble:
            self.on_trouble(f"steps cannot be recorded here, and are made one by one: {reason}")
        return self.work(*inputs)
