"""The training loop for every network of `mini`: resumable to the same bits, with one loss or several opposing ones.

A training is one or several `Objective`s, each with its own modules, loss and optimizer, which are stepped in turn: an
autoencoder and the discriminator that it is trained against are two.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from e4t_cli.files import write_atomically
from e4t_cli.nn.precision import PrecisionPolicy, half_precision
from e4t_cli.temporary import sweep
from mini_world.loop import default_device, process_rank, random_rows
from mini_world.next.optimizers import adamw
from mini_world.next.state import read_state, write_state

__all__ = ["Objective", "Unfinished", "default_device", "limit_time", "process_rank", "random_rows", "train", "train_objectives"]

LOG_EVERY = 50  # steps
UNFINISHED = 75  # the exit code of a stopped training: EX_TEMPFAIL of sysexits.h, "run it again"

Loss = Callable[[int, torch.Generator], dict[str, Tensor]]
_deadline: float | None = None


class Unfinished(SystemExit):
    """The training was stopped and its state saved; the same call goes on. Ends the process with code 75."""

    def __init__(self, message: str) -> None:
        super().__init__(UNFINISHED)
        self.message = message

    def __str__(self) -> str:
        return self.message


def limit_time(minutes: float | None) -> None:
    """Stop every training of this process once `minutes` have passed from now, with its state saved; None: no limit."""
    global _deadline
    _deadline = None if minutes is None else time.monotonic() + 60 * minutes


@dataclass
class Objective:
    """Modules and the loss that trains them.

    `loss(step, generator)` returns the terms of the loss, whose sum is minimized. All its random numbers must come from the
    generator, which is seeded by step and process. While it runs, the parameters of all other objectives are frozen. `start`:
    its first step. `average`: the decay of an exponential moving average of the parameters, which replaces them at the end.
    `optimizer` makes one or several optimizers of named parameters and a peak learning rate.
    """

    modules: Mapping[str, nn.Module]
    loss: Loss
    learning_rate: float
    start: int = 0
    warm_up: int = 100
    average: float | None = None
    clip: float = 1.0
    optimizer: Callable[[dict[str, nn.Parameter], float], list[torch.optim.Optimizer]] = adamw
    # Set by the loop.
    bundle: nn.ModuleDict = field(init=False, repr=False)
    parameters: dict[str, nn.Parameter] = field(init=False, repr=False)
    optimizers: list[torch.optim.Optimizer] = field(init=False, repr=False)
    shadow: dict[str, Tensor] = field(init=False, repr=False)
    peak: list[list[float]] = field(init=False, repr=False)
    sums: dict[str, Tensor] = field(init=False, repr=False)

    def prepare(self, device: torch.device) -> None:
        self.bundle = nn.ModuleDict(self.modules).to(device)
        if device.type == "cuda":  # on the CPU, GroupNorm's backward pass is ten times slower in this format
            self.bundle.to(memory_format=torch.channels_last)
        self.bundle.train()
        self.parameters = {name: p for name, p in self.bundle.named_parameters() if p.requires_grad}
        self.optimizers = self.optimizer(self.parameters, self.learning_rate)
        self.peak = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.shadow = {name: p.detach().clone() for name, p in self.parameters.items()} if self.average else {}
        self.sums = {}

    def tensors(self) -> dict[str, Tensor]:
        """The state: weights, moving average, the optimizers' tensors, and the sums for the log."""
        state = {f"weights.{name}": value for name, value in self.bundle.state_dict().items()}
        state |= {f"average.{name}": value for name, value in self.shadow.items()}
        for number, optimizer in enumerate(self.optimizers):
            for index, values in optimizer.state_dict()["state"].items():
                for name, value in values.items():
                    state[f"optimizer.{number}.{index}.{name}"] = torch.as_tensor(value)
        return state | {f"sums.{name}": torch.as_tensor(value) for name, value in self.sums.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "average": {}, "optimizer": {}, "sums": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.bundle.load_state_dict(parts["weights"])
        for name, value in parts["average"].items():
            self.shadow[name].copy_(value)
        self.sums = {name: value.to(device) for name, value in parts["sums"].items()}
        states: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.optimizers]
        for name, value in parts["optimizer"].items():
            number, index, key = name.split(".", 2)
            states[int(number)].setdefault(int(index), {})[key] = value
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})

    def step(self, step: int, steps: int, generator: torch.Generator, agree: Callable[[list[Tensor]], None]) -> None:
        """One step of the optimizers; `agree` averages the gradients over the processes."""
        done = (step - self.start) / max(1, steps - self.start)
        factor = min(1.0, (step - self.start + 1) / self.warm_up) * (0.5 + 0.5 * math.cos(math.pi * done))
        for optimizer, rates in zip(self.optimizers, self.peak, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        device, parameters = generator.device, list(self.parameters.values())
        # On the CPU the fused attention kernels have a slow backward pass: unfused attention trains the tower 1.5x faster.
        with sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext():
            with half_precision(device, PrecisionPolicy.resolve(device, loss_scaling=False).half):
                terms = self.loss(step, generator)
            sum(terms.values()).backward()  # type: ignore[union-attr]
        agree([p.grad for p in parameters])  # type: ignore[misc]
        nn.utils.clip_grad_norm_(parameters, self.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        for p in parameters:
            p.grad = None
        if self.shadow:
            decay = min(self.average or 0.0, (step - self.start + 1) / (step - self.start + 10))
            torch._foreach_lerp_(list(self.shadow.values()), [p.detach() for p in parameters], 1 - decay)
        for key, value in terms.items():  # read every LOG_EVERY steps, because reading synchronizes the GPU
            self.sums[key] = self.sums.get(key, 0.0) + value.detach().float()

    def finish(self) -> None:
        with torch.no_grad():
            for name, smooth in self.shadow.items():
                self.parameters[name].copy_(smooth)
        self.bundle.requires_grad_(False)
        for p in self.parameters.values():
            p.requires_grad_(True)
        # safetensors stores contiguous tensors only.
        self.bundle.to(memory_format=torch.contiguous_format).eval()


@contextmanager
def _only(objective: Objective, objectives: Sequence[Objective]) -> Iterator[None]:
    """Freeze all other objectives: what their modules compute is differentiated, but not by their parameters."""
    others = [p for other in objectives if other is not objective for p in other.parameters.values()]
    for p in others:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in others:
            p.requires_grad_(True)


@contextmanager
def _termination() -> Iterator[list[int]]:
    """A list that becomes non-empty when the process is asked to end (SIGTERM)."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # the only one that may set handlers
        yield received
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def _cut_log(path: Path, step: int) -> None:
    """Remove the lines after `step`, which are about to be written again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if kept != lines:
            write_atomically(path, "".join(kept).encode())


def train_objectives(
    name: str,
    folder: Path,
    objectives: Mapping[str, Objective],
    *,
    steps: int,
    seed: int = 0,
    minutes: float | None = None,
    save_every_seconds: float = 60.0,
) -> None:
    """Train all objectives for `steps` steps with bf16 autocast where the device has it; they hold the result in place.

    The state is saved in `<folder>/<name>.state.safetensors` and the same call resumes from it, with the same result, to the
    bit, as without interruption (same device, threads and processes). Progress is logged to `<folder>/<name>.jsonl`. Under
    torchrun every process computes its part of each batch.

    Raises:
        Unfinished: `minutes` (or the limit of `limit_time`) have passed, or SIGTERM was received; the state was saved.
    """
    started = saved = time.monotonic()
    limits = [started + 60 * minutes] if minutes is not None else []
    limits += [_deadline] if _deadline is not None else []
    device = default_device()
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    folder.mkdir(parents=True, exist_ok=True)
    path, log_path = folder / f"{name}.state.safetensors", folder / f"{name}.jsonl"
    for objective in objectives.values():
        objective.prepare(device)
    first, spent = 0, 0.0
    if path.exists():
        tensors, facts = read_state(path)
        first, spent = facts["step"], facts["seconds"]
        for key, objective in objectives.items():
            own = {k.removeprefix(f"{key}/"): v for k, v in tensors.items() if k.startswith(f"{key}/")}
            objective.load_tensors(own, device)
    rank, ranks = process_rank()
    if rank == 0:
        sweep(path)  # what a kill during a save has left
        _cut_log(log_path, first)

    def seconds() -> float:
        return spent + time.monotonic() - started

    def save(step: int) -> None:
        if rank == 0:
            tensors = {f"{key}/{k}": v for key, objective in objectives.items() for k, v in objective.tensors().items()}
            write_state(path, tensors, {"name": name, "step": step, "steps": steps, "seconds": round(seconds(), 1)})

    def log(step: int) -> None:
        line: dict[str, float] = {"step": step, "seconds": round(seconds(), 1)}
        for objective in objectives.values():
            line |= {key: round(value.item() / LOG_EVERY, 5) for key, value in objective.sums.items()}
            objective.sums = {}
        if rank == 0:
            with log_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    stopping = False

    def agree(gradients: list[Tensor]) -> None:
        nonlocal stopping
        stopping = stopping or bool(received) or any(time.monotonic() > limit for limit in limits)
        if ranks > 1:  # the wish to stop is averaged too, so that all processes stop after the same step
            flat = torch.cat([*(gradient.flatten() for gradient in gradients), torch.tensor([float(stopping)], device=device)])
            torch.distributed.all_reduce(flat)
            stopping = flat[-1].item() > 0
            parts = flat[:-1].div_(ranks).split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    with _termination() as received:
        generator = torch.Generator(device)
        for step in range(first, steps):
            for number, objective in enumerate(objectives.values()):
                if step >= objective.start:
                    generator.manual_seed((seed << 40) + (step << 8) + (number << 4) + rank)
                    with _only(objective, list(objectives.values())):
                        objective.step(step, steps, generator, agree)
            if (step + 1) % LOG_EVERY == 0:
                log(step + 1)
            if stopping and step + 1 < steps:
                save(step + 1)
                raise Unfinished(f"{name}: stopped after step {step + 1} of {steps}; the same command goes on from there.")
            if time.monotonic() - saved > save_every_seconds:
                save(step + 1)
                saved = time.monotonic()
        if first < steps:
            save(steps)
    for objective in objectives.values():
        objective.finish()


def train(
    name: str,
    folder: Path,
    modules: dict[str, nn.Module],
    loss_of_step: Loss,
    *,
    steps: int,
    learning_rate: float,
    warm_up: int = 100,
    average: float | None = None,
    optimizer: Callable[[dict[str, nn.Parameter], float], list[torch.optim.Optimizer]] = adamw,
    seed: int = 0,
    minutes: float | None = None,
    save_every_seconds: float = 60.0,
) -> dict[str, nn.Module]:
    """Train `modules` by one loss: `train_objectives` with one `Objective`. Returns the modules."""
    objective = Objective(modules, loss_of_step, learning_rate, warm_up=warm_up, average=average, optimizer=optimizer)
    options = {"steps": steps, "seed": seed, "minutes": minutes, "save_every_seconds": save_every_seconds}
    train_objectives(name, folder, {"main": objective}, **options)  # type: ignore[arg-type]
    return modules
