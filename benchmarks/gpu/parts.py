"""The parts of the GPU benchmark that run in one process; each keeps every figure as soon as it has it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.checkouts import ROOT
from benchmarks.gpu.results import Results
from benchmarks.timing import cuda_graphs, memory_rows, peak_tflops, seconds
from benchmarks.workload import Workload, make_workload
from e4t_cli.models.denoiser import TunedModel
from e4t_cli.prompts import parse_prompt
from e4t_cli.sampling import generate_latents, sample
from e4t_cli.schedulers import SamplingConfig
from e4t_cli.training.memory import Plan
from e4t_cli.training.tuning import TuningOptions, tune

TESTS = "tests/invariants/test_gpu_invariants.py"
PROMPT = parse_prompt("a photo of S*")
STEPS, STEPS_OF_REHEARSAL = SamplingConfig(steps=20), SamplingConfig(steps=4)


class Run:
    """A part in progress.

    Args:
        results: where the figures go.
        workload: the base, domain weights for it, and a photo.
        tiny: whether this is a rehearsal.
    """

    def __init__(self, results: Results, workload: Workload, *, tiny: bool) -> None:
        self.results, self.workload, self.tiny = results, workload, tiny
        self.device, self.rounds, self.warm_up = workload.model.device, 1 if tiny else 5, 0 if tiny else 1
        self.sampling = STEPS_OF_REHEARSAL if tiny else STEPS
        self.config = workload.pack.tuning.replace(steps=4) if tiny else workload.pack.tuning

    def tuned(self, method: str = "full", steps: int | None = None, **options: Any) -> TunedModel:
        work, config = self.workload, self.config.replace(method=method)
        config = config if steps is None else config.replace(steps=steps)
        return tune(work.model, work.pack, work.photo, config, options=TuningOptions(**options) if options else None)

    def drawn(self, tuned: TunedModel, count: int) -> object:
        return list(sample(self.workload.model, tuned, [PROMPT] * count, list(range(count)), self.sampling))

    def latents(self, tuned: TunedModel, count: int) -> list[Tensor]:
        model = self.workload.model
        return [generate_latents(model, tuned, [PROMPT] * count, list(range(count)), self.sampling).cpu()]

    def time(self, key: str, work: Callable[[], object]) -> None:
        """Time a call without and with CUDA graphs, alternating; the figures are kept after each round."""
        found: dict[bool, list[float]] = {False: [], True: []}
        for number in range(self.warm_up + self.rounds):
            for graphs in (False, True):
                with cuda_graphs(graphs):
                    took = seconds(work, self.device)
                if number >= self.warm_up:
                    found[graphs].append(took)
                    self.results.times(f"{key}, graphs" if graphs else key, found[graphs])

    def compare(self, key: str, work: Callable[[], list[Tensor]]) -> None:
        """Keep how far results are apart: of two runs one by one, and of one with CUDA graphs."""
        with cuda_graphs(False):
            first = work()
            self.results.put("figures", f"{key}, twice", difference(first, work()))
        with cuda_graphs(True):
            self.results.put("figures", f"{key}, graphs differ", difference(first, work()))


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest absolute difference; NaN, which JSON lacks, is 1e30."""
    largest = 0.0
    for a, b in zip(one, other, strict=True):
        apart = (a.float() - b.float()).abs().max().item() if a.numel() else 0.0
        largest = max(largest, apart if apart == apart else 1e30)
    return largest


def weights(tuned: TunedModel) -> list[Tensor]:
    both = [*tuned.unet.state_dict().values(), *tuned.encoder.state_dict().values()]
    return [value.cpu() for value in both]


def facts(run: Run) -> None:
    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "none"

    device = run.device
    about = {
        "date": datetime.now(UTC).date().isoformat(), "rehearsal": run.tiny or device.type == "cpu",
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, no GPU",
        "cores": os.cpu_count(), "python": platform.python_version(),
        "cuda": torch.version.cuda or "none", "tflops": round(peak_tflops(device), 3),
        "model": "a small model" if run.tiny else "Stable Diffusion 1.4 with random weights",
        **{name: installed(name) for name in ("torch", "diffusers", "transformers", "triton")},
    }  # fmt: skip
    for key, value in about.items():
        run.results.put("facts", key, value)


def tuning(run: Run) -> None:
    for method in ("full", "lora"):
        run.time(f"tune {method}", lambda method=method: run.tuned(method))
    for method in ("full", "lora"):
        run.compare(f"tune {method}", lambda method=method: weights(run.tuned(method)))


def drawing(run: Run) -> None:
    tuned = run.tuned(steps=0)
    for count in (8, 1):
        run.time(f"draw {count}", lambda count=count: run.drawn(tuned, count))
    for count in (8, 1):
        run.compare(f"draw {count}", lambda count=count: run.latents(tuned, count))


def warm(run: Run) -> None:
    run.time("warm", lambda: run.drawn(run.tuned(), 1))


def memory(run: Run) -> None:
    if run.device.type == "cuda":
        run.results.put("facts", "model_gb", round(torch.cuda.memory_allocated(run.device) / 2**30, 2))
    for row in memory_rows(run.workload):
        run.results.put("figures", f"memory {row.method} {row.vram}", asdict(row))


def compiled(run: Run) -> None:
    """Compile the U-Net's blocks that repeat; the compilation is timed apart."""
    # The rehearsal runs the same calls without a compiler.
    backend = {"backend": "eager"} if run.tiny else {}
    with cuda_graphs(False):
        tuned = run.tuned(steps=0)
        tuned.unet.compile_repeated_blocks(**backend)

        def draw() -> object:
            return run.drawn(tuned, 8)

        run.results.times("draw 8, compiling", [seconds(draw, run.device)])
        run.results.times("draw 8, compiled", [seconds(draw, run.device) for _ in range(run.rounds)])
        # The U-Net itself is tuned: a copy of it would be one that is not compiled.
        run.workload.model.unet.compile_repeated_blocks(**backend)

        def retune() -> object:
            return run.tuned(consume=True, plan=Plan(micro_batch=run.workload.pack.tuning.batch_size))

        run.results.times("tune full, compiling", [seconds(retune, run.device)])
        run.results.times("tune full, compiled", [seconds(retune, run.device) for _ in range(min(run.rounds, 3))])


def cold(run: Run) -> None:
    from benchmarks.gpu.cold import measure

    measure(run.results, run.workload, rounds=1 if run.tiny else 3, warm_up=run.warm_up)


def gpu_tests(run: Run) -> None:
    """Run the tests that need a GPU; a rehearsal runs them on the CPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", TESTS]
    environment = {**os.environ, "E4T_TEST_DEVICE": str(run.device)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    last = [line for line in done.stdout.splitlines() if re.search(r"\d+ (passed|failed|skipped|error)", line)]
    run.results.put("figures", "tests", last[-1].strip("= ") if last else f"pytest ended with {done.returncode}")


PARTS: dict[str, Callable[[Run], None]] = {
    "facts": facts, "tune": tuning, "draw": drawing, "warm": warm, "cold": cold, "memory": memory,
    "tests": gpu_tests, "compile": compiled,
}  # fmt: skip


def run_part(name: str, results: Results, device: str, *, tiny: bool) -> None:
    """Measure one part."""
    with tempfile.TemporaryDirectory(prefix="e4t-bench-") as folder:
        small = tiny or name in ("facts", "tests")
        workload = make_workload("small" if small else "sd14", torch.device(device), Path(folder))
        run = Run(results, workload, tiny=tiny)
        PARTS[name](run)
