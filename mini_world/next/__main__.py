"""Trains all parts of `mini` from nothing, or from where an earlier run or the repository ends.

python -m mini_world.next              everything that is not finished (all), or the one stage given and what it needs
python -m mini_world.next status       which stages are finished, and where each would begin
python -m mini_world.next pack OUT     all results and states as at most 8 files of 16 MiB
python -m mini_world.next unpack IN    restore them; then a run resumes
python -m mini_world.next keep         copy results and states into mini_world/next/results, where a fresh clone resumes
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mini_world.next.graph import STAGES
from mini_world.next.plans import training_plan
from mini_world.next.runner import STOPPED, Runner, StageFailed, needed
from mini_world.next.workspace import StaleResult, Workspace

FOLDER = Path(".mini-next")
COMMANDS = ("all", "status", "pack", "unpack", "keep")


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line says; returns the exit status, 75 if stages were stopped and can be resumed."""
    parser = argparse.ArgumentParser(
        prog="python -m mini_world.next", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="all", choices=(*COMMANDS, *STAGES), metavar="what")
    parser.add_argument("path", nargs="?", type=Path, help="the folder of `pack` and `unpack`")
    parser.add_argument("--parallel", type=int, default=1, help="stages at a time, on a CPU with one thread each [1]")
    parser.add_argument("--minutes", type=float, help="after which all states are saved and the run ends")
    parser.add_argument("--plan", default="", choices=("cpu", "cuda", "tiny"), help="default: for this machine")
    parser.add_argument("--tiny", action="store_true", help="--plan tiny: all stages at tiny lengths, a rehearsal")
    parser.add_argument("--folder", type=Path, help=f"of the run [{FOLDER}, with --tiny {FOLDER}-tiny]")
    options = parser.parse_args(arguments)
    if (options.what in ("pack", "unpack")) != (options.path is not None):
        parser.error("pack and unpack take a folder, the others none")
    if options.parallel < 1:
        parser.error("--parallel takes 1 or more")
    plan = "tiny" if options.tiny else options.plan
    if options.what == "keep" and plan == "tiny":
        parser.error("a rehearsal is not kept")
    folder = options.folder or (Path(f"{FOLDER}-tiny") if plan == "tiny" else FOLDER)
    work = Workspace(folder, training_plan(plan))
    try:
        if options.what == "status":
            return _show(work)
        if options.what == "keep":
            from mini_world.next.keeping import keep

            print(*keep(work, STAGES), sep="\n")
            return 0
        if options.what in ("pack", "unpack"):
            return _pack_or_unpack(options.what, work, options.path)
        # Drawings and latents are made only if something needs them.
        shipped = [name for name, node in STAGES.items() if node.shipped]
        return _run(work, shipped if options.what == "all" else [options.what], options.parallel, options.minutes)
    except (StageFailed, StaleResult) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _show(work: Workspace) -> int:
    for name in STAGES:
        found, state = work.find(name), work.state(name)
        print(f"{name:10}", found or (f"begun: {state}" if state.exists() else "-"))
    return 0


def _pack_or_unpack(what: str, work: Workspace, path: Path) -> int:
    from mini_world.next.packing import PackingError, pack, unpack

    try:
        if what == "pack":
            shipped = [name for name, node in STAGES.items() if node.shipped]
            done = [f"{file} {file.stat().st_size}" for file in pack(work, shipped, path)]
        else:
            done = unpack(work, path)
    except PackingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(*done, sep="\n")
    return 0


def _run(work: Workspace, targets: list[str], parallel: int, minutes: float | None) -> int:
    def finished(name: str) -> bool:
        if work.find(name) is None:
            return False
        work.check(name)
        return True

    if work.plan.name == "tiny" and parallel == 1 and minutes is None:  # importing takes longer than these stages
        from mini_world.next.stages import run_stage

        for name in needed(STAGES, targets, finished):
            print(f"── {name}", file=sys.stderr, flush=True)
            run_stage(work, name)
        return 0

    def command(name: str) -> list[str]:
        return [sys.executable, "-m", "mini_world.next.stages", name, work.plan.name, str(work.folder)]

    runner = Runner(STAGES, command, slots=parallel, split=work.plan.name != "cuda", minutes=minutes)
    if runner.run(targets, finished):
        return 0
    print("stopped with all states saved; the same command goes on from there", file=sys.stderr)
    return STOPPED


if __name__ == "__main__":
    sys.exit(main())
