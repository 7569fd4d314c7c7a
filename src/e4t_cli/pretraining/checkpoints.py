"""Resumable training state: everything that the next step depends on, in one safetensors file."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from e4t_cli.errors import DivergedError, E4TError, IntegrityError, ResourceError, UsageError, printable
from e4t_cli.files import file_error, write_atomically

LATEST = "latest"  # file that names the checkpoint to resume from; written when that one is safe on the disk
LAYOUT = ("processes", "micro_batch", "steps")  # settings that may change when a run is resumed
_OPTIMIZER = "optimizer."  # prefix of the optimizer's tensors; those of the modules have their own names


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Where and how often `pretrain_domain` saves its state."""

    folder: Path | None = None  # of the last two checkpoints; None keeps none
    every: int = 500  # steps
    resume: bool = True  # from the latest checkpoint in the folder, if there is one
    force: bool = False  # also from that of a run with other settings


class Checkpoints:
    """The files step-N.safetensors in a folder, each whole or absent.

    A checkpoint is written under another name, synced and renamed; then `latest` is made to point to it in the same
    way; only then is the oldest one removed. So at every moment, also after a power cut, `latest` names a whole
    checkpoint.

    Args:
        folder: created if it does not exist.
        run: the settings that decide every value of the run. `processes` and `recipe.batch_size` count as their
            product, the global batch.
    """

    def __init__(self, folder: Path, run: dict[str, Any]) -> None:
        self.folder, self.run = folder, run
        self.kept: list[Path] = []
        self.left_out: set[int] = set()  # images that were found to be unusable: a resumed run may not meet them
        self.remarks: list[str] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error, "the folder of checkpoints") from error

    def write(self, step: int, modules: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Save the state after `step`; ResourceError if the disk is full, with the checkpoints before intact."""
        tensors = modules.state_dict()
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"{_OPTIMIZER}{index}.{key}": value for key, value in moments.items()}
        path = self.folder / f"step-{step:08d}.safetensors"
        metadata = {"step": str(step), "run": json.dumps(self.run), "left_out": json.dumps(sorted(self.left_out))}
        try:
            write_atomically(path, save({key: value.cpu() for key, value in tensors.items()}, metadata))
            write_atomically(self.folder / LATEST, f"{path.name}\n".encode())
        except OSError as error:
            raise self._unwritable(error, f"the checkpoint of step {step}") from error
        self.kept = [*[old for old in self.kept if old != path][-1:], path]
        for old in self._all():
            if old not in self.kept:
                old.unlink(missing_ok=True)

    def restore(self, modules: nn.Module, optimizer: torch.optim.Optimizer, *, force: bool = False) -> int:
        """Load the latest checkpoint; return the steps done, 0 without one.

        Args:
            force: also one of a run with other settings, as far as its tensors fit.

        Raises:
            IntegrityError: it cannot be read.
            UsageError: it is of another run.
        """
        for torn in [*self.folder.glob(".step-*~"), *self.folder.glob(f".{LATEST}.*~")]:
            torn.unlink(missing_ok=True)  # a killed process was writing it
        path = self.latest()
        if path is None:
            return 0
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            step, run = int(metadata["step"]), json.loads(metadata["run"])
            left_out = {int(index) for index in json.loads(metadata.get("left_out", "[]"))}
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            message = f"the checkpoint {path.name} cannot be read: {error}"
            raise IntegrityError(message, hint="remove it to resume from the one before") from error
        self._compare(run, force)
        if run.get("data") == self.run.get("data"):
            self.left_out |= left_out
        moments: dict[int, dict[str, Tensor]] = {}
        for key in [key for key in tensors if key.startswith(_OPTIMIZER)]:
            index, _, moment = key.removeprefix(_OPTIMIZER).partition(".")
            moments.setdefault(int(index), {})[moment] = tensors.pop(key)
        try:
            modules.load_state_dict(tensors)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        except (RuntimeError, ValueError) as error:
            message = f"the checkpoint {path.name} has other shapes than this run: it cannot be forced"
            raise UsageError(message, hint="start anew, or in another folder") from error
        found = self._all()
        self.kept = found[: found.index(path) + 1][-2:]
        return step

    def latest(self) -> Path | None:
        """Return the checkpoint to resume from: that of the pointer, else the newest."""
        found = self._all()
        with contextlib.suppress(OSError, UnicodeDecodeError):
            name = (self.folder / LATEST).read_text(encoding="utf-8").strip()
            found = [path for path in found if path.name == name] or found
        return max(found, default=None)

    def _compare(self, saved: Mapping[str, Any], force: bool) -> None:
        """Raise UsageError if `saved` is another run, and add remarks on what may differ."""
        old, new = _flat(saved), _flat(self.run)
        keys = [key for key in sorted(old.keys() | new.keys()) if key not in LAYOUT and old.get(key) != new.get(key)]
        changed = ", ".join(f"{key} {_shown(old.get(key))} → {_shown(new.get(key))}" for key in keys)
        if changed and not force:
            message = f"the checkpoints in {printable(str(self.folder))} are of another run: {changed}"
            raise UsageError(
                message, hint="give the settings of before, or --resume-changed to go on with the new ones"
            )
        if changed:
            self.remarks.append(f"continuing with other settings: {changed}")
        same = ": the samples of each step stay the same, their sums are rounded in another order"
        for key, word in (("processes", "processes"), ("micro_batch", "samples at a time")):
            if key in old and old[key] != new[key]:
                self.remarks.append(f"{old[key]} {word} before, {new[key]} now{'' if changed else same}")

    def _all(self) -> list[Path]:
        names = [path for path in self.folder.iterdir() if re.fullmatch(r"step-\d{8,}\.safetensors", path.name)]
        return sorted(names, key=lambda path: int(path.stem.partition("-")[2]))

    def _unwritable(self, error: OSError, what: str) -> E4TError:
        intact = self.latest() if os.path.isdir(self.folder) else None
        kept = f"; {intact.name} before it is intact" if intact is not None else ""
        message = f"{what} could not be written in {printable(str(self.folder))}: {error.strerror or error}{kept}"
        found = file_error(error, self.folder)
        first = "make room" if isinstance(found, ResourceError) else found.hint
        return type(found)(message, hint=f"{first}; the same command then resumes from there")


def check_weights(step: int, modules: nn.Module, *, kept: int) -> None:
    """Raise DivergedError if a weight is not finite, with one transfer from the device."""
    norms = torch._foreach_norm([weight.detach() for weight in modules.parameters()])
    if not torch.stack([norm.float() for norm in norms]).isfinite().all():
        raise diverged(step, "a weight is not a finite number", good=kept, kept=kept)


def diverged(step: int, reason: str, *, good: int, kept: int) -> DivergedError:
    """Return the error of a run with a value that is not finite, first at `step`; the last `good` step is before."""
    saved = f"the checkpoint of step {kept} is kept" if kept else "nothing was saved"
    message = f"pre-training diverged at step {step}: {reason}; the last good step was {good}, {saved}"
    return DivergedError(message, hint="try a smaller learning rate, --base-lr")


def _flat(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings under dotted names, the batch counted over all processes."""
    flat: dict[str, Any] = {}
    for key, value in run.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": one for inner, one in _flat(value).items()}
        else:
            flat[key] = value
    if "recipe.batch_size" in flat:
        flat["global batch"] = flat.pop("recipe.batch_size") * flat.get("processes", 1)
    return flat


def _shown(value: Any) -> str:
    return "none" if value is None else printable(str(value), limit=40)
