"""Times calls on a device, and names it: shared by the benchmarks that run in one process."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from benchmarks.workload import Workload
from e4t_cli.nn.precision import PrecisionPolicy
from e4t_cli.system_memory import GB
from e4t_cli.training.memory import plan_tuning
from e4t_cli.training.tuning import TuningOptions, tune

VRAM = ("6", "8", "12", "16", "24")


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call; on a CPU its CPU time, which other programs hardly change."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    wait(device)
    begun = clock()
    call()
    wait(device)
    return clock() - begun


def peak_tflops(device: torch.device) -> float:
    """Return the TFLOP/s of a large matrix multiplication in the dtype of tuning."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = [seconds(lambda: a @ b, device) for _ in range(8)][3:]
    return 2 * side**3 / statistics.median(times) / 1e12


@contextmanager
def cuda_graphs(enabled: bool) -> Iterator[None]:
    """Enable or disable CUDA graphs in a `with` block, whatever E4T_CUDA_GRAPHS is."""
    before = os.environ.get("E4T_CUDA_GRAPHS", "")
    os.environ["E4T_CUDA_GRAPHS"] = "1" if enabled else "0"
    try:
        yield
    finally:
        os.environ["E4T_CUDA_GRAPHS"] = before


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """One tuning step within a `--vram`; sizes in GB, the measured ones 0 on a CPU."""

    method: str
    vram: str
    plan: str
    predicted: float
    allocated: float = 0.0
    reserved: float = 0.0


def memory_rows(workload: Workload) -> Iterator[MemoryRow]:
    """Tune one step within each `--vram`; on a GPU the memory is also measured."""
    model, device = workload.model, workload.model.device
    half = PrecisionPolicy.resolve(device).half
    for method in ("full", "lora"):
        config = workload.pack.tuning.replace(steps=1, method=method)
        for vram in VRAM:
            plan = plan_tuning(model, workload.pack, config, vram=vram, half=half)
            found = {"method": method, "vram": vram, "plan": plan.summary(), "predicted": plan.peak / GB}
            if device.type != "cuda":
                yield MemoryRow(**found)
                continue
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            tune(model, workload.pack, workload.photo, config, options=TuningOptions(plan=plan))
            allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            yield MemoryRow(**found, allocated=allocated / GB, reserved=reserved / GB)
