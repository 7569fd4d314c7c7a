"""The losses between two reports: kept on the device until they are checked and smoothed."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from e4t_cli.progress import Progress
from e4t_cli.recipes import PretrainingRecipe

from .checkpoints import diverged
from .processes import Processes

REPORT_EVERY = 10
"""Steps between two progress reports; a report waits for the device."""

SMOOTHING = 0.9
"""Share of the past in the smoothed loss, from one report to the next."""


class RunningLosses:
    """The losses since the last report, kept on the device until then, and what became of them."""

    def __init__(self, recipe: PretrainingRecipe, done: int) -> None:
        self.recipe, self.reported = recipe, done
        self.recent: list[Tensor] = []
        self.since = time.perf_counter()
        self.smooth = self.weight = 0.0
        self.seconds = math.inf

    def add(self, diffusion: Tensor, penalty: Tensor) -> None:
        self.recent.append(torch.stack((diffusion.mean(), penalty.mean())))

    def report(self, step: int, kept: int, processes: Processes) -> Progress:
        """Return the means since the last report.

        Paper silent: no gradient clipping here, so a bad number shows in the loss.

        Raises:
            DivergedError: one of them is not finite.
        """
        now = time.perf_counter()
        spent = (now - self.since) / len(self.recent)
        both = torch.stack(self.recent).float()
        # Together with the losses, so that all processes hold the same number of seconds.
        found = processes.mean(torch.cat((both.flatten(), both.new_tensor([spent]))))
        rows, self.seconds = found[:-1].view(-1, 2).tolist(), float(found[-1])
        weight = self.recipe.embedding_penalty
        totals = [diffusion + weight * penalty for diffusion, penalty in rows]
        for index, loss in enumerate(totals):
            if not math.isfinite(loss):
                bad = self.reported + index + 1
                raise diverged(bad, f"the loss is {loss}", good=bad - 1, kept=kept)
        loss, diffusion, penalty = torch.tensor(
            [[total, *row] for total, row in zip(totals, rows, strict=True)]
        ).mean(dim=0).tolist()  # fmt: skip
        self.smooth = SMOOTHING * self.smooth + (1 - SMOOTHING) * loss
        self.weight = SMOOTHING * self.weight + (1 - SMOOTHING)
        self.recent.clear()
        self.since, self.reported = now, step
        return Progress(
            stage="pretrain",
            done=step,
            total=self.recipe.steps,
            values={
                "loss": loss,
                "diffusion": diffusion,
                "penalty": penalty,
                "smoothed": self.smooth / self.weight,
                "it/s": 1 / max(self.seconds, 1e-9),
            },
        )

    def steps_in(self, seconds: float) -> int:
        """Return how many steps fit into some seconds, 1 … REPORT_EVERY, alike in all processes."""
        return max(1, min(REPORT_EVERY, int(seconds / max(self.seconds, 1e-9))))
