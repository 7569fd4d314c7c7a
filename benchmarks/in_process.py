"""Measures variants of tuning, interleaved in one process, with warm-up, medians and spread.

    python -m benchmarks                 Stable Diffusion 1.4 on a GPU, else a small model
    python -m benchmarks --size small    the small model on any device
    python -m benchmarks cold            photo → first image in a fresh process, on mini

The time of a step excludes the setup: the time of a run of one step is subtracted from that of a
run of several.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.processes import run
from benchmarks.timing import cuda_graphs, memory_rows, peak_tflops, seconds
from benchmarks.variants import VARIANTS
from benchmarks.workload import Workload, make_workload
from e4t_cli.devices import choose_device
from e4t_cli.models.denoiser import TunedModel
from e4t_cli.prompts import parse_prompt
from e4t_cli.sampling import sample
from e4t_cli.schedulers import SamplingConfig
from e4t_cli.training.tuning import tune

ROOT = Path(__file__).parent.parent


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):9.4f} s  ({min(values):.4f} … {max(values):.4f})"


def measure_variants(workload: Workload, names: list[str], steps: int, rounds: int) -> None:
    names, device = list(names), workload.model.device
    found: dict[str, list[float]] = {name: [] for name in names}
    for name in list(names):
        try:
            VARIANTS[name](workload, 1)  # warm-up
        except torch.OutOfMemoryError:
            print(f"  {name} does not fit into the memory of this GPU")
            names.remove(name)
            del found[name]
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for number in range(rounds):
        # A B C, then C B A, so that drift affects all of them equally.
        for name in names if number % 2 == 0 else reversed(names):
            short = seconds(lambda name=name: VARIANTS[name](workload, 1), device)
            long = seconds(lambda name=name: VARIANTS[name](workload, 1 + steps), device)
            found[name].append((long - short) / steps)
    print(f"\none step, median of {rounds} (min … max):")
    reference = statistics.median(found[names[0]])
    for name, values in found.items():
        ratio = statistics.median(values) / reference
        each = "16 samples" if name != "dreambooth" else "1 + 1 samples"
        print(f"  {name:12} {spread(values)}   × {ratio:5.2f}   {each}")


def measure_whole(workload: Workload, rounds: int) -> None:
    """Time end to end: all steps of tuning, sampling, and from a photo to its first image."""
    model, device = workload.model, workload.model.device
    config = workload.pack.tuning
    untuned = tune(model, workload.pack, workload.photo, config.replace(steps=0))
    prompt = parse_prompt("a photo of S*")

    def tuned_by(method: str) -> TunedModel:
        return tune(model, workload.pack, workload.photo, config.replace(method=method))

    def generate(tuned: TunedModel, count: int) -> None:
        seeds = list(range(count))
        list(sample(model, tuned, [prompt] * count, seeds, SamplingConfig(steps=20)))

    rows: dict[str, Callable[[], object]] = {
        f"{config.steps} steps, full": lambda: tuned_by("full"),
        f"{config.steps} steps, lora": lambda: tuned_by("lora"),
        "1 image, 20 steps": lambda: generate(untuned, 1),
        "8 images, 20 steps": lambda: generate(untuned, 8),
        "photo → first image, warm": lambda: generate(tuned_by("full"), 1),
    }
    modes = {"": False, ", CUDA graphs": True} if device.type == "cuda" else {"": False}
    print(f"\nend to end, median of {rounds}:")
    for row, work in rows.items():
        found: dict[str, list[float]] = {mode: [] for mode in modes}
        for number in range(1 + rounds):  # the first is a warm-up
            for mode, enabled in modes.items():
                with cuda_graphs(enabled):
                    took = seconds(work, device)
                if number:
                    found[mode].append(took)
        for mode, times in found.items():
            print(f"  {row + mode:38} {spread(times)}", flush=True)


def measure_memory(workload: Workload) -> None:
    """Tune one step within each `--vram`; print the predicted and the measured memory."""
    print("\npeak memory of one tuning step:")
    for row in memory_rows(workload):
        measured = f"; measured {row.reserved:.1f} GB" if row.reserved else ""
        print(f"  {row.method:9} --vram {row.vram:3} {row.plan}{measured}", flush=True)


def measure_cold(rounds: int) -> None:
    """Time whole processes on the base `mini`: imports, loading, tuning and one picture."""
    photo, found = ROOT / "examples" / "me.png", []
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "e4t_cli", "personalize", "face", str(photo), "S* on the beach",
            "--base", "mini", "--seed", "1", "-q", "-o", folder,
        ]  # fmt: skip
        for _ in range(rounds):
            found.append(run(command, {**os.environ, "E4T_TUNED_CACHE": "0"}, ROOT))
    peak = max(one.memory for one in found) / 2**20
    print(f"photo → first image, fresh process, mini: {spread([one.wall for one in found])}, {peak:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", help="see python -m benchmarks --against REV --help")
    parser.add_argument("what", nargs="?", choices=("all", "cold"), default="all")
    parser.add_argument("--size", choices=("sd14", "small"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if given.what == "cold":
        measure_cold(given.rounds)
        return
    device = choose_device(given.device)
    size = given.size or ("sd14" if device.type == "cuda" else "small")
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(
        f"{size} with random weights on {named}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"a matrix multiplication reaches {peak_tflops(device):.2f} TFLOP/s here")
    with tempfile.TemporaryDirectory() as folder:
        workload = make_workload(size, device, Path(folder))
        measure_variants(workload, given.variants, given.steps, given.rounds)
        measure_whole(workload, given.rounds)
        measure_memory(workload)
    print(f"\na matrix multiplication reached {peak_tflops(device):.2f} TFLOP/s at the end")


if __name__ == "__main__":
    main()
