"""Compares tuning on three portraits of a held-out identity with tuning on one of them, classified by the judge.

    python -m mini_world.photos face --identities 20

prints two rows for each set of portraits: the shares of the identity and of the prompt that are kept with one photo and with
three, at equal steps, with equal seeds, and their paired difference with its 95 % interval. The portraits of the set "plain"
differ in garment, background and position, as one photo of docs/mini.md does from the next; each of "varied" hides something: a
hat most of the hair, a distance of some steps the small attributes, and a scarf the chin. The one photo is each of the three in
turn. The scores of each identity go to stderr: those of `--identities 8` are the first eight of `--identities 20`.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
from collections.abc import Sequence

import numpy

from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.schedulers import SamplingConfig
from e4t_cli.training.tuning import tune
from mini_world.evaluate import generate, prepared_photo, score, tasks_of
from mini_world.identities import draw_identity
from mini_world.methods import SAMPLING
from mini_world.stages import PACKS, load_judge, load_model
from mini_world.world import Drawing, Scene, draw

SETS = {
    "plain": (Scene(), Scene(), Scene()),
    "varied": (Scene(role="hat"), Scene(framing="afar", place="beach"), Scene(framing="close", role="scarf")),
}


def portraits(kind: str, scenes: Sequence[Scene], number: int, seed: int) -> list[Drawing]:
    """One drawing in each scene of the held-out identity `number`, which is the same for all sets."""
    who = draw_identity(kind, random.Random(f"identity {kind} {seed} {number}"), held_out=True)
    rng = random.Random(f"portraits {kind} {seed} {number}")
    return [draw(who, scene, rng) for scene in scenes]


def paired(one: numpy.ndarray, several: numpy.ndarray) -> tuple[float, float]:
    """The mean difference of two rows of scores of the same identities, and half of its 95 % interval."""
    difference = several - one
    return float(difference.mean()), float(1.96 * difference.std(ddof=1) / len(difference) ** 0.5)


def compare(kind: str, sets: Sequence[str], identities: int, seed: int, sampling: SamplingConfig) -> None:
    """Print a table with a row for each set and score."""
    model, judge = load_model(), load_judge()
    pretrained = DomainWeights.load(PACKS / kind / "mini")
    tasks = tasks_of(kind)
    found: dict[tuple[str, str], list[list[float]]] = {(name, what): [] for name in sets for what in ("identity", "prompt")}
    for number in range(identities):
        for name in sets:
            drawn = portraits(kind, SETS[name], number, seed)
            row = []
            for photos in ([drawn[number % len(drawn)]], drawn):
                tuned = tune(model, pretrained, [prepared_photo(one) for one in photos], seed=number)
                images = generate(model, tuned, tasks, 1000 * number, sampling)
                assert drawn[0].who is not None
                row.append([float(numpy.mean(part)) for part in score(judge, drawn[0].who, tasks, images)])
            for place, what in enumerate(("identity", "prompt")):
                found[name, what].append([scores[place] for scores in row])
            print(f"identity {number}, {name}: {row}", file=sys.stderr, flush=True)
    print(f"{kind} on mini, {identities} held-out identities, {pretrained.tuning.steps} steps\n")
    print("| portraits | score | one photo | three photos | difference |\n|---|---|---|---|---|")
    for (name, what), rows in found.items():
        one, several = numpy.array(rows).T
        gain, half = paired(one, several)
        print(f"| {name} | {what} | {one.mean():.3f} | {several.mean():.3f} | {gain:+.3f} ± {half:.3f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("face", "cat"))
    parser.add_argument("--identities", type=int, default=20)
    parser.add_argument("--sets", nargs="+", choices=tuple(SETS), default=list(SETS))
    parser.add_argument("--seed", type=int, default=50)
    parser.add_argument("--sampling-steps", type=int, default=SAMPLING.steps)
    given = parser.parse_args()
    sampling = dataclasses.replace(SAMPLING, steps=given.sampling_steps)
    compare(given.kind, given.sets, given.identities, given.seed, sampling)
