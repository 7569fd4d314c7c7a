"""Resumable training state: everything that the next step depends on, in one safe file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from e4t_cli.errors import IntegrityError, UsageError
from e4t_cli.files import write_atomically


class Checkpoints:
    """Resumable state in a folder: step-N.safetensors, whole or absent, the last two kept."""

    def __init__(self, folder: Path, run: dict[str, Any]) -> None:
        self.folder, self.run = folder, run
        self.kept: list[Path] = []
        folder.mkdir(parents=True, exist_ok=True)

    def write(
        self,
        step: int,
        *,
        encoder: nn.Module,
        offsets: nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        tensors = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
        tensors |= {f"offsets.{key}": value for key, value in offsets.state_dict().items()}
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
        path = self.folder / f"step-{step:08d}.safetensors"
        metadata = {"step": str(step), "run": json.dumps(self.run)}
        write_atomically(path, save({key: value.cpu() for key, value in tensors.items()}, metadata))
        self.kept = [*[old for old in self.kept if old != path][-1:], path]
        for old in self._all():
            if old not in self.kept:
                old.unlink(missing_ok=True)

    def restore(
        self, *, encoder: nn.Module, offsets: nn.Module, optimizer: torch.optim.Optimizer
    ) -> int:
        """Load the newest checkpoint into all three; returns the steps done, 0 without one."""
        found = self._all()
        if not found:
            return 0
        path = found[-1]
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            step, run = int(metadata["step"]), json.loads(metadata["run"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise IntegrityError(
                f"the checkpoint {path.name} cannot be read: {error}",
                hint="remove it to go on from the one before",
            ) from error
        changed = sorted(key for key in self.run if run.get(key) != self.run[key])
        if changed:
            raise UsageError(
                f"the checkpoints in {self.folder} are of another run: {', '.join(changed)} differ",
                hint="use another folder, or start anew without resuming",
            )
        parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "offsets": {}, "optimizer": {}}
        for key, value in tensors.items():
            part, _, rest = key.partition(".")
            parts[part][rest] = value
        encoder.load_state_dict(parts["encoder"])
        offsets.load_state_dict(parts["offsets"])
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in parts["optimizer"].items():
            index, _, moment = key.partition(".")
            moments.setdefault(int(index), {})[moment] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.kept = found[-2:]
        return step

    def _all(self) -> list[Path]:
        pattern = re.compile(r"step-\d{8,}\.safetensors")
        names = [path for path in self.folder.iterdir() if pattern.fullmatch(path.name)]
        return sorted(names, key=lambda path: int(path.stem.partition("-")[2]))
