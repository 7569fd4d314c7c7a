"""Where a run of `make mini` keeps what it makes: results of finished stages, and training states of the others.

A finished stage is a folder `results/STAGE` with its files and `result.json`: their SHA-256, what it measured, and the
identities of the results that it was made from. It is written under another name and renamed, so it is whole or absent. A stage
that was stopped has its state in `states/STAGE`.

`mini_world/next/results` holds finished stages that are part of the repository. A run looks for a stage in its own folder first
and there second, so that a fresh clone resumes where the repository ends: it trains only what is missing. Drawings and latents
are not kept, because they are quickly made again; whatever was made from them counts as made from the same.
A rehearsal (the plan "tiny") neither uses nor resembles results of the repository.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from e4t_cli.files import sha256_of
from mini_world.next.plans import TrainingPlan

COMMITTED = Path(__file__).parent / "results"
RESULT = "result.json"


class StaleResult(Exception):
    """A result was made from another one than is there now."""


@dataclass(frozen=True)
class Workspace:
    """The folder of one run and its plan."""

    folder: Path
    plan: TrainingPlan

    @cached_property
    def results(self) -> Path:
        return self.folder / "results"

    def state(self, stage: str) -> Path:
        """The folder of a stage's training state and log; it may not exist."""
        return self.folder / "states" / stage

    def find(self, stage: str) -> Path | None:
        """The folder of a finished stage, or None."""
        places = [self.results] if self.plan.name == "tiny" else [self.results, COMMITTED]
        return next((place / stage for place in places if (place / stage / RESULT).is_file()), None)

    def result(self, stage: str) -> Path:
        """The folder of a finished stage.

        Raises:
            FileNotFoundError: it is not finished.
        """
        if found := self.find(stage):
            return found
        raise FileNotFoundError(f"the stage {stage} is not finished; run: python -m mini_world.next {stage}")

    def facts(self, stage: str) -> dict[str, Any]:
        """What a finished stage measured."""
        return json.loads((self.result(stage) / RESULT).read_text())["facts"]

    def identity(self, stage: str) -> str:
        """Identify a finished stage by its files and those that it was made from, not by where or how fast."""
        record = json.loads((self.result(stage) / RESULT).read_text())
        kept = {key: record[key] for key in ("stage", "files", "needs")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def finish(self, stage: str, needs: tuple[str, ...], made: Path, facts: dict[str, Any], *, shipped: bool) -> None:
        """Turn the folder `made` into the result of a stage, with its log, and remove its training state.

        Args:
            needs: the stages that it was made from.
            shipped: whether its files identify it; else they can be made again, perhaps with other last bits, and what it says
                in JSON identifies it, such as the version of drawings.
        """
        state = self.state(stage)
        for log in sorted(state.glob("*.jsonl")):
            shutil.copyfile(log, made / log.name)
        paths = sorted(path for path in made.rglob("*") if path.is_file() and path.name != RESULT)
        files = {path.relative_to(made).as_posix(): sha256_of(path) for path in paths if path.suffix != ".jsonl"}
        record = {
            "stage": stage,
            "plan": self.plan.name,
            "facts": facts,
            "files": {name: digest for name, digest in files.items() if shipped or name.endswith(".json")},
            "needs": {name: self.identity(name) for name in needs},
        }
        (made / RESULT).write_text(json.dumps(record, indent=1) + "\n")
        self.results.mkdir(parents=True, exist_ok=True)
        made.replace(self.results / stage)
        shutil.rmtree(state, ignore_errors=True)

    def check(self, stage: str) -> None:
        """Compare what a finished stage was made from with what is there now.

        Raises:
            StaleResult: they differ.
        """
        found = self.result(stage)
        for name, identity in json.loads((found / RESULT).read_text())["needs"].items():
            if self.find(name) and self.identity(name) != identity:
                raise StaleResult(
                    f"the result of {stage} was made from another {name} than is there now; to make it again, remove {found}"
                )
