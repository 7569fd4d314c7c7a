"""The rows of `make bench ARGS="--against REV"`: what is run in each checkout, in processes of their own."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.processes import Measured, environment_of, neighbour, run

# As `make demo`.
PROMPTS = (
    "S* as an astronaut", "S* on the beach", "S* in the snow", "S* in the forest",
    "S* wearing a crown", "S* wearing a red hat", "a pencil sketch of S*", "an oil painting of S*",
)  # fmt: skip
PHOTOS, PROMPTS_EACH = 20, 4

# The CPU time between the ends of the first and of the last step: without setup and merging.
STEPS_OF_TUNING = """
import json, sys, time
import e4t_cli

seen = []

def note(event):
    if event.stage == "tune" and event.done and event.total > 1:
        seen.append((event.done, time.process_time(), time.perf_counter()))

e4t_cli.personalize("face", sys.argv[1], ["a photo of S*"], seed=1, sampling={"steps": 1}, on_progress=note)
(first, cpu, wall), (last, *end) = seen[0], seen[-1]
scale = last / (last - first)
print(json.dumps([(end[1] - wall) * scale, (end[0] - cpu) * scale]))
"""
DRAW_PHOTOS = """
import sys
from mini_world.evaluate import held_out_photos

for number, drawing in enumerate(held_out_photos("face", int(sys.argv[2]), seed=321)):
    drawing.image.resize((256, 256), 0).save(f"{sys.argv[1]}/{number:02}.png")
"""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two checkouts.

    Args:
        name: as the table calls it.
        root: its folder.
        work: an empty folder for what it writes.
        newer: whether it is this checkout, not the one it is compared with.
        threads: CPU threads; 0 lets the program decide.
    """

    name: str
    root: Path
    work: Path
    newer: bool
    threads: int = 0

    def python(self, *words: str, home: str) -> Measured:
        """Run this interpreter on the checkout's packages; `home` names the folder with its caches."""
        place = self.work / home
        place.mkdir(parents=True, exist_ok=True)
        return run([sys.executable, *words], environment_of(self.root, place, self.threads), self.root)

    def e4t(self, *words: str, home: str) -> Measured:
        """Run a command of e4t."""
        return self.python("-m", "e4t_cli", *words, home=home)

    def fresh(self) -> str:
        """Return the name of an empty folder for the caches: no run finds what another one has kept."""
        shutil.rmtree(self.work / "once", ignore_errors=True)
        return "once"

    @property
    def photo(self) -> str:
        return str(self.root / "examples" / "me.png")

    def out(self, name: str) -> str:
        return str(self.work / "outputs" / name)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Something to measure.

    Args:
        title: what it is.
        measure: runs it once.
        beside: the neighbour that keeps a core busy meanwhile; see `processes.NEIGHBOURS`.
        opt_in: only measured where it is asked for by name.
        skipped: returns why this side cannot be measured, "" if it can.
    """

    title: str
    measure: Callable[[Side], Measured]
    beside: str = ""
    opt_in: bool = False
    skipped: Callable[[Side], str] = lambda side: ""

    def once(self, side: Side) -> Measured:
        """Measure one side, beside its neighbour."""
        with neighbour(self.beside):
            return self.measure(side)


def demo(side: Side) -> Measured:
    out = side.out("demo")
    return side.e4t("personalize", "face", side.photo, *PROMPTS, "--seed", "1", "--grid", "-o", out, home=side.fresh())


def steps_of_tuning(side: Side) -> Measured:
    found = side.python("-c", STEPS_OF_TUNING, side.photo, home=side.fresh())
    wall, cpu = json.loads(found.output)
    return replace(found, wall=wall, cpu=cpu, memory=0)


def second_generate(side: Side) -> Measured:
    """Draw a concept for the second time; made at the first call, with what is kept beside it."""
    concept, home = side.work / "me.e4t", "kept"
    asked = ("--seed", "1", "-o", side.out("second"), "--force")
    if not concept.exists():
        side.e4t("personalize", "face", side.photo, "--save", str(concept), home=home)
        side.e4t("generate", str(concept), PROMPTS[0], *asked, home=home)
    return side.e4t("generate", str(concept), PROMPTS[1], *asked, home=home)


def photos(side: Side) -> Measured:
    """Personalize many photos: by a shell's loop in the older checkout, by `e4t batch` in this one."""
    folder = side.work / "photos"
    if not folder.exists():
        folder.mkdir()
        side.python("-c", DRAW_PHOTOS, str(folder), str(PHOTOS), home="drawing")
    files, prompts, out = sorted(folder.glob("*.png")), PROMPTS[:PROMPTS_EACH], Path(side.out("photos"))
    shutil.rmtree(out, ignore_errors=True)
    if side.newer:
        listed = side.work / "prompts.txt"
        listed.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
        words = ("batch", "face", *map(str, files), "-f", str(listed), "--seed", "1", "-o", str(out))
        found = side.e4t(*words, home=side.fresh())
    else:
        asked = shlex.join([*prompts, "--seed", "1", "-o", str(out)])
        command = f'{shlex.quote(sys.executable)} -m e4t_cli personalize face "$photo" {asked}'
        loop = f"for photo in {shlex.quote(str(folder))}/*.png; do {command} || exit; done"
        home = side.work / side.fresh()
        home.mkdir()
        found = run(["sh", "-c", loop], environment_of(side.root, home, side.threads), side.root)
    drawn = len(list(out.rglob("*.png")))
    if drawn != PHOTOS * PROMPTS_EACH:
        raise RuntimeError(f"{drawn} pictures of {PHOTOS * PROMPTS_EACH}")
    return found


def no_batch(side: Side) -> str:
    """Say that there is no `e4t batch`, where it is needed and missing."""
    if not side.newer:
        return ""
    side.work.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "e4t_cli", "batch", "--help"]
    done = subprocess.run(command, env=environment_of(side.root, side.work), cwd=side.root, capture_output=True)
    return "" if done.returncode == 0 else "there is no command `e4t batch`"


def pretrain(side: Side) -> Measured:
    words = ("--domain", "bench_dogs", "--data", str(side.root / "examples" / "dogs"), "-y")
    return side.e4t("pretrain", *words, home=side.fresh())


ROWS = {
    "demo": Row(title="`make demo`'s command", measure=demo),
    "busy": Row(title="the same beside a busy loop", measure=demo, beside="loop"),
    "starts": Row(title="the same beside a process that starts others", measure=demo, beside="starts"),
    "tune": Row(title="15 steps of tuning", measure=steps_of_tuning),
    "second": Row(title="second `e4t generate` of a concept", measure=second_generate),
    "photos": Row(
        title=f"{PHOTOS} photos × {PROMPTS_EACH} prompts: a loop of commands, and `e4t batch`",
        measure=photos, skipped=no_batch,
    ),
    "pretrain": Row(title="`e4t pretrain` on 200 dogs", measure=pretrain, opt_in=True),
}  # fmt: skip
