"""Measure: arms interleaved in one process, warm-ups, medians and spread, and the ceiling beside.

    python -m benchmarks                 on a GPU the real Stable Diffusion 1.4, else a small one
    python -m benchmarks --size small    the small one anywhere
    python -m benchmarks cold            photo → first picture in a fresh process, on mini

Times of an arm are of its steps alone: a run of one step is taken off a run of several.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.arms import ARMS
from benchmarks.worlds import World, make_world
from e4t_cli.devices import GB, choose_device
from e4t_cli.models.denoiser import TunedModel
from e4t_cli.nn.precision import PrecisionPolicy
from e4t_cli.prompts import parse_prompt
from e4t_cli.sampling import SamplingConfig, sample
from e4t_cli.training.memory import plan_tuning
from e4t_cli.training.tuning import TuningOptions, tune

ROOT = Path(__file__).parent.parent


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return a work's seconds; on a CPU the processor's own, which other programs hardly touch."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    wait(device)
    begun = clock()
    work()
    wait(device)
    return clock() - begun


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):9.4f} s  ({min(values):.4f} … {max(values):.4f})"


def ceiling(device: torch.device) -> float:
    """Return TFLOP/s of a matrix product in the precision that tuning multiplies in."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = [seconds(lambda: a @ b, device) for _ in range(8)][3:]
    return 2 * side**3 / statistics.median(times) / 1e12


def measure_arms(world: World, names: list[str], steps: int, rounds: int) -> None:
    names, device = list(names), world.model.device
    found: dict[str, list[float]] = {name: [] for name in names}
    for name in list(names):
        try:
            ARMS[name](world, 1)  # warm-up
        except torch.OutOfMemoryError:
            print(f"  {name} does not fit into the memory of this card")
            names.remove(name)
            del found[name]
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for number in range(rounds):
        # A B C, then C B A: what drifts meets all of them alike.
        for name in names if number % 2 == 0 else reversed(names):
            short = seconds(lambda name=name: ARMS[name](world, 1), device)
            long = seconds(lambda name=name: ARMS[name](world, 1 + steps), device)
            found[name].append((long - short) / steps)
    print(f"\none step, median of {rounds} (least … most):")
    reference = statistics.median(found[names[0]])
    for name, values in found.items():
        ratio = statistics.median(values) / reference
        each = "16 samples" if name != "dreambooth" else "1 + 1 samples"
        print(f"  {name:12} {spread(values)}   × {ratio:5.2f}   {each}")


@contextmanager
def recording(wanted: bool) -> Iterator[None]:
    """Have steps recorded and played back, or not, whatever the environment says."""
    before = os.environ.get("E4T_CUDA_GRAPHS", "")
    os.environ["E4T_CUDA_GRAPHS"] = "1" if wanted else "0"
    try:
        yield
    finally:
        os.environ["E4T_CUDA_GRAPHS"] = before


def measure_whole(world: World, rounds: int) -> None:
    """Time what people wait for: all steps of a tuning, pictures, and a photo's first picture."""
    model, device = world.model, world.model.device
    config = world.pack.tuning
    untuned = tune(model, world.pack, world.photo, config.replace(steps=0))
    prompt = parse_prompt("a photo of S*")

    def learn(method: str) -> TunedModel:
        return tune(model, world.pack, world.photo, config.replace(method=method))

    def show(tuned: TunedModel, count: int) -> None:
        seeds = list(range(count))
        list(sample(model, tuned, [prompt] * count, seeds, SamplingConfig(steps=20)))

    rows: dict[str, Callable[[], object]] = {
        f"{config.steps} exact steps": lambda: learn("full"),
        f"{config.steps} steps, adapters": lambda: learn("lora"),
        "1 picture, 20 steps": lambda: show(untuned, 1),
        "8 pictures, 20 steps": lambda: show(untuned, 8),
        "photo → first picture, warm": lambda: show(learn("full"), 1),
    }
    ways = {"": False, ", recorded": True} if device.type == "cuda" else {"": False}
    print(f"\nfrom beginning to end, median of {rounds}:")
    for row, work in rows.items():
        found: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(1 + rounds):  # the first is a warm-up
            for way, wanted in ways.items():
                with recording(wanted):
                    took = seconds(work, device)
                if number:
                    found[way].append(took)
        for way, times in found.items():
            print(f"  {row + way:38} {spread(times)}", flush=True)


def measure_memory(world: World) -> None:
    """Tune one step within each `--vram`, and say what was predicted and what was taken."""
    model, device = world.model, world.model.device
    print("\npeak memory of one tuning step:")
    for method in ("full", "lora"):
        config = world.pack.tuning.replace(steps=1, method=method)
        for vram in ("6", "8", "12", "16", "24"):
            plan = plan_tuning(
                model, world.pack, config, vram=vram, half=PrecisionPolicy.resolve(device).half
            )
            line = f"  {method:9} --vram {vram:3} {plan.summary()}"
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                tune(model, world.pack, world.photo, config, options=TuningOptions(plan=plan))
                line += f"; measured {torch.cuda.max_memory_reserved() / GB:.1f} GB"
            print(line, flush=True)


def measure_cold(rounds: int) -> None:
    """Time whole processes on the base `mini`: imports, loading, tuning and one picture."""
    photo = ROOT / "examples" / "me.png"
    times = []
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "e4t_cli", "personalize", "face", str(photo), "S* on the beach",
            "--base", "mini", "--seed", "1", "-q", "-o", folder,
        ]  # fmt: skip
        for _ in range(rounds):
            begun = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - begun)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"photo → first picture, fresh process, mini: {spread(times)}, {peak:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("all", "cold"), default="all")
    parser.add_argument("--size", choices=("sd14", "small"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
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
    print(f"a matrix product reaches {ceiling(device):.2f} TFLOP/s here")
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(size, device, Path(folder))
        measure_arms(world, given.arms, given.steps, given.rounds)
        measure_whole(world, given.rounds)
        measure_memory(world)
    print(f"\na matrix product reached {ceiling(device):.2f} TFLOP/s at the end")


if __name__ == "__main__":
    main()
