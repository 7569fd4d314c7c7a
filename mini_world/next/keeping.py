"""Keeps a run in the repository: finished stages in `mini_world/next/results`, training states of begun ones in its `states`.

A run in a fresh clone goes on from there. Kept states are exported in files of at most 16 MiB, in which the optimizer's moments
and the average are rounded (`state.state_files`): they go on as well as before, but not to the same bits.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mini_world.next import workspace
from mini_world.next.runner import Node
from mini_world.next.state import join_state_files, state_files
from mini_world.next.workspace import RESULT, StaleResult, Workspace

STATES = "states"
NEEDS = "needs.json"  # in the folder of a kept state: the identities of the results that it was trained on


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `target` when it is filled."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".keeping-", dir=target.parent) as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        yield made
        made.chmod(0o755)
        if target.exists():
            target.replace(Path(temporary) / "old")
        made.replace(target)


def _states_of(work: Workspace, stage: str) -> list[Path]:
    return sorted(work.state(stage).glob("*.state.safetensors"))


def keep(work: Workspace, nodes: Mapping[str, Node]) -> list[Path]:
    """Copy every finished and every begun stage of a run into the repository; returns their folders there.

    Large results that are quickly made again are left out, and so are states of stages whose state is not that of
    `mini_world.next.loop`.

    Raises:
        ValueError: the run is a rehearsal.
    """
    if work.plan.name == "tiny":
        raise ValueError("a rehearsal is not kept")
    kept = []
    for stage, node in nodes.items():
        target, state = workspace.COMMITTED / stage, workspace.COMMITTED / STATES / stage
        if node.shipped and (work.results / stage / RESULT).is_file():
            work.check(stage)
            with _replacing(target) as made:
                shutil.copytree(work.results / stage, made, dirs_exist_ok=True)
            shutil.rmtree(state, ignore_errors=True)
            kept.append(target)
        elif found := _states_of(work, stage):
            with _replacing(state) as made:
                for one in found:
                    state_files(one, made)
                for log in work.state(stage).glob("*.jsonl"):
                    shutil.copyfile(log, made / log.name)
                needs = {name: work.identity(name) for name in node.needs}
                (made / NEEDS).write_text(json.dumps(needs, indent=1) + "\n")
            kept.append(state)
    return kept


def restore_state(work: Workspace, stage: str) -> bool:
    """Take over the repository's state of a stage, unless the run has one; returns whether it did.

    Raises:
        StaleResult: it was trained on another result than is there now.
    """
    source = workspace.COMMITTED / STATES / stage
    if work.plan.name == "tiny" or not (source / NEEDS).is_file() or _states_of(work, stage):
        return False
    for name, identity in json.loads((source / NEEDS).read_text()).items():
        if work.find(name) and work.identity(name) != identity:
            raise StaleResult(f"the state of {stage} in {source} was trained on another {name}; to begin anew, remove it")
    target = work.state(stage)
    target.mkdir(parents=True, exist_ok=True)
    for log in source.glob("*.jsonl"):
        shutil.copyfile(log, target / log.name)
    for first in sorted(source.glob("*-1-of-*.safetensors")):
        name = first.name[: first.name.index("-1-of-")]
        join_state_files(sorted(source.glob(f"{name}-*-of-*.safetensors")), target / f"{name}.safetensors")
    return True
